"""The recipe of `make train` loads, names things that exist, and ends with a sample and figures to beat."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the recipe trains a torch module")
RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.append(str(RECIPES))

from gpt_stdlib import PROMPT, SAMPLE_BYTES, finish  # noqa: E402

from trainfleet.config import load_config  # noqa: E402
from trainfleet.data import open_source  # noqa: E402
from trainfleet.imports import load_object  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_config(Recipe, file=RECIPES / "gpt_stdlib.yaml", env={}).value


def test_the_model_has_about_a_million_parameters_and_takes_what_the_sources_give(recipe: Recipe) -> None:
    model = load_object(recipe.model.name, key="model.name")(**recipe.model.args)
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert recipe.data.source is not None and recipe.data.evaluation is not None
    for source in (recipe.data, recipe.data.evaluation):
        sample = open_source(source.source, **source.args)[0]
        batch = {key: torch.from_numpy(array)[None] for key, array in sample.items()}
        loss = load_object(recipe.loss, key="loss")(model(batch["input"]), batch)
        assert loss.weight == batch["input"].numel()


def test_training_and_evaluation_do_not_read_the_same_bytes(recipe: Recipe) -> None:
    assert recipe.data.evaluation is not None
    assert (recipe.data.args["split"], recipe.data.evaluation.args["split"]) == ("train", "validation")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_batch_is_the_same_on_one_two_and_four_ranks(recipe: Recipe, ranks: int) -> None:
    micro, accumulation, whole = recipe.batch.resolve(ranks)
    assert micro * accumulation * ranks == whole == recipe.batch.resolve(2)[2]
    assert recipe.data.evaluation is not None
    assert recipe.data.evaluation.args["windows"] % (micro * ranks) == 0


def test_two_ranks_accumulate_gradients_as_the_readme_says(recipe: Recipe) -> None:
    assert recipe.plan.zero == 2 and recipe.batch.resolve(2)[1] >= 2


def test_the_run_does_not_see_a_byte_twice(recipe: Recipe) -> None:
    """So the loss on held-out files and that of training may be compared."""
    samples = recipe.train.steps * recipe.batch.resolve(2)[2]
    assert samples <= len(open_source(recipe.data.source, **recipe.data.args))  # type: ignore[arg-type]


def test_the_end_of_the_run_shows_a_sample_and_what_counting_reaches(recipe: Recipe, tmp_path: Path) -> None:
    assert load_object(recipe.train.finish or "", key="train.finish").__name__ == finish.__name__
    asked: list[tuple[bytes, int]] = []

    def generate(prompt: bytes, n: int, **settings: object) -> bytes:
        asked.append((prompt, n))
        return b"f(x):\n\xff"

    model = SimpleNamespace(generate=generate)
    shown = finish(model, SimpleNamespace(device="cpu", is_main=True), tmp_path)  # type: ignore[arg-type]
    assert asked == [(PROMPT, SAMPLE_BYTES)]
    assert shown["sample"] == "def f(x):\n�"
    assert shown["baseline/trigram (nats/byte)"] < shown["baseline/unigram (nats/byte)"]  # type: ignore[operator]
    assert finish(model, SimpleNamespace(device="cpu", is_main=False), tmp_path) == {}  # type: ignore[arg-type]
    assert len(asked) == 2  # every rank generates, as forwards of a spread model are made together
