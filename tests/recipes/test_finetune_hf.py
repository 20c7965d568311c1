"""A model of transformers is trained on packed documents, on ranks that share it, and goes back to transformers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'trainfleet[hf]'")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "recipes"))

from finetune_hf import IGNORED, Blocks, causal_lm, collate, documents, loss_fn, make_small  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.config import load_config  # noqa: E402
from trainfleet.errors import DataError  # noqa: E402
from trainfleet.training.job import run  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "small"
    make_small(folder, vocabulary=400, width=32, layers=2, one_in=20)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few dozen short files of the standard library."""
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(text for text in documents("stdlib", "train") if len(text) < 4000):
        (folder / f"{number:03}.py").write_text(text)
    return str(folder)


def loaded(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def test_a_document_in_a_block_is_read_as_if_it_were_alone(small: str, texts: str) -> None:
    blocks, model = Blocks(texts, small, length=512), loaded(small)
    sample = next(sample for sample in map(blocks.__getitem__, range(len(blocks))) if sample["document"].max() > 0)
    logits = model(**collate([sample])).logits[0]
    for number in range(sample["document"].max() + 1):
        own = torch.from_numpy(sample["document"] == number)
        alone = model(torch.from_numpy(sample["input_ids"])[own][None]).logits[0]
        assert torch.allclose(logits[own], alone, atol=1e-5)


@torch.no_grad()
def test_the_loss_is_the_sum_over_tokens_that_follow_one_of_their_document(small: str, texts: str) -> None:
    blocks, model = Blocks(texts, small, length=64), loaded(small)
    batch = collate([blocks[0], blocks[1]])
    output = model(**batch)
    loss = loss_fn(output, batch)
    labels = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert torch.allclose(loss.total, expected)
    assert int(loss.weight) == int((labels != IGNORED).sum())


def test_texts_are_dealt_out_once_to_training_and_validation(tmp_path: Path) -> None:
    lines = [json.dumps({"words": f"text {number}"}) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\0")
    found = [*documents(str(tmp_path), "train", "words"), *documents(str(tmp_path), "validation", "words")]
    assert sorted(found) == sorted([f"text {number}" for number in range(200)] + ["one"])
    assert 0 < len(list(documents(str(tmp_path), "validation", "words"))) < 40


def test_too_little_text_is_refused(small: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="fewer than a block: 512"):
        Blocks(str(tmp_path / "a.txt"), small)


def trained(small: str, texts: str, folder: str, steps: list[int], plan: dict[str, Any]) -> list[float | None]:
    """The recipe for so many steps, and so many in all by a second start, and so on; the validation losses."""
    losses = []
    of_data = {"data": texts, "tokenizer": small, "length": 64}
    for count in steps:
        values = {
            "folder": folder,
            "model": {"args": {"path": small}, "init_from": small},
            "data": {"args": of_data, "evaluation": {"args": {**of_data, "split": "validation"}}},
            "plan": plan,
            "train": {"steps": count, "evaluate_every": 2, "evaluate_batches": 1},
            "checkpoint": {"every": 2},
            "schedule": {"name": "constant", "warmup_steps": 0},
        }
        recipe = load_config(Recipe, file=ROOT / "recipes" / "finetune_hf.yaml", values=values, env={}).value
        losses.append(run(recipe).evaluation)
    return losses


def test_a_run_ends_as_a_folder_of_transformers(small: str, texts: str, tmp_path: Path) -> None:
    losses = trained(small, texts, str(tmp_path / "run"), [2, 4], {"zero": 0})
    assert losses[1] is not None and losses[0] is not None and losses[1] < losses[0]
    from trainfleet.checkpoint.catalog import open_place, read_step
    from trainfleet.checkpoint.whole import whole_states

    store, _ = open_place(str(tmp_path / "run"))
    by_hand = causal_lm(small).eval()
    by_hand.load_state_dict(whole_states(store, read_step(store, 4)[1])["model"])
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "run" / "hf")(tokens).logits, by_hand(tokens).logits)
        assert not torch.allclose(loaded(small)(tokens).logits, by_hand(tokens).logits, atol=1e-3)


@pytest.mark.matrix
@torch.no_grad()
def test_a_run_on_shards_goes_on_and_ends_as_a_folder_of_transformers(
    ranks: RankPools, small: str, texts: str, tmp_path: Path
) -> None:
    before = ranks(2, trained, small, texts, str(tmp_path / "whole"), [4], {"zero": 0})[0]
    after = ranks(2, trained, small, texts, str(tmp_path / "shards"), [2, 4], {"zero": 3})[0]
    assert after[-1] == pytest.approx(before[-1], rel=1e-5)
    whole, shards = loaded(tmp_path / "whole" / "hf"), loaded(tmp_path / "shards" / "hf")
    tokens = torch.arange(20)[None]
    assert torch.allclose(whole(tokens).logits, shards(tokens).logits, atol=1e-4)


@pytest.mark.matrix
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    page = (ROOT / "docs" / "huggingface.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```bash\n")[1:]]
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(commands) >= 4
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        words = shlex.split(command, comments=True)
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
