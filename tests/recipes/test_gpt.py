"""The GPT of the recipes sees only what came before, weighs its loss by bytes, and continues a prompt."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the GPT is a torch module")
sys.path.append(str(Path(__file__).parents[2] / "recipes"))

import gpt  # noqa: E402


def small(seed: int = 0, **args: int) -> gpt.GPT:
    torch.manual_seed(seed)
    return gpt.GPT(**{"width": 32, "depth": 2, "heads": 2, **args})


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("position", [0, 1, 9, 15])
def test_a_byte_changes_its_own_and_later_predictions_only(position: int) -> None:
    model, tokens = small(), random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, position] = (changed[0, position] + 1) % 256
    differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.tolist() == [at >= position for at in range(16)]


def test_a_prediction_is_the_same_whatever_follows_or_shares_the_batch() -> None:
    model, tokens = small(), random_tokens(3, 20)
    alone = model(tokens[1:2, :7])[0, -1]
    assert torch.allclose(model(tokens)[1, 6], alone, atol=1e-5)


@pytest.mark.parametrize("lookback", [1, 2, 4])
def test_each_position_starts_from_its_byte_and_those_before_it(lookback: int) -> None:
    model, tokens = small(lookback=lookback), random_tokens(1, 8)
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens)
    expected = sum(table.weight[tokens[0, 5 - back]] for back, table in enumerate(model.embeddings))
    assert torch.allclose(seen[0][0, 5], expected)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    cos, sin = small()._rotary(32, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 32, 16)
    products = (gpt._rotate(q, cos, sin) @ gpt._rotate(k, cos, sin).mT)[0, 0]
    for distance in (0, 1, 7):
        diagonal = products.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(products[7, 0], products[8, 0], atol=1e-2)


def test_an_untrained_model_predicts_all_bytes_alike() -> None:
    tokens = random_tokens(4, 33)
    batch = {"input": tokens[:, :-1], "target": tokens[:, 1:]}
    with torch.no_grad():
        loss = gpt.loss_fn(small()(batch["input"]), batch)
    assert loss.mean == pytest.approx(math.log(256), abs=0.05)


def test_the_loss_is_summed_over_bytes_in_float32() -> None:
    logits, target = torch.randn(2, 5, 256).bfloat16(), random_tokens(2, 5)
    loss = gpt.loss_fn(logits, {"target": target})
    oracle = -logits.double().log_softmax(-1).gather(-1, target[..., None]).sum()
    assert loss.total.dtype == torch.float32 and loss.weight == 10
    assert float(loss.total) == pytest.approx(float(oracle), rel=1e-5)


def test_windows_of_weight_zero_count_for_nothing() -> None:
    logits, target = torch.randn(3, 5, 256), random_tokens(3, 5)
    padded = gpt.loss_fn(logits, {"target": target, "weight": torch.tensor([1.0, 1.0, 0.0])})
    whole = gpt.loss_fn(logits[:2], {"target": target[:2]})
    assert padded.weight == whole.weight == 10
    assert float(padded.total) == pytest.approx(float(whole.total))


def test_the_model_learns_a_text_by_heart_and_recites_it() -> None:
    text = b"def add(a, b):\n    return a + b\n"
    tokens = torch.tensor([list(text)])
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        batch = {"input": tokens[:, :-1], "target": tokens[:, 1:]}
        loss = gpt.loss_fn(model(batch["input"]), batch)
        (loss.total / loss.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.generate(text[:4], len(text) - 4, temperature=0) == text[4:]


def test_equal_generators_draw_equal_bytes() -> None:
    model = small()
    draws = [model.generate(b"x", 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 12


def test_an_empty_prompt_and_a_width_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        small().generate(b"", 3)
    with pytest.raises(ValueError, match="multiple of 2 x heads = 4"):
        small(width=30)
