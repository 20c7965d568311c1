"""Tensors are compared by name, within the rounding of the precision; what rounding makes is no difference."""

from __future__ import annotations

import numpy as np

from trainfleet.training.proof.verdict import compare, joined


def test_traces_of_several_ranks_are_one() -> None:
    one, other = {"a": np.zeros(1), "b": np.zeros(1)}, {"b": np.ones(1), "c": np.ones(1)}
    together = joined([one, other])
    assert sorted(together) == ["a", "b", "c"] and together["b"] == 0 and together["c"] == 1


def test_comparison_names_what_is_missing_surplus_and_of_another_shape() -> None:
    one = {"a": np.ones(3), "b": np.ones(2)}
    assert compare(one, {"a": np.ones(3)}, "fp32").first.tensor == "b"  # type: ignore[union-attr]
    assert compare(one, {**one, "c": np.ones(1)}, "fp32").first.tensor == "c"  # type: ignore[union-attr]
    assert compare(one, {"a": np.ones((3, 1)), "b": np.ones(2)}, "fp32").first.tensor == "a"  # type: ignore[union-attr]


def test_an_overflow_agrees_only_where_the_same_elements_overflow() -> None:
    one = {"norm": np.array([np.inf, 1.0])}
    assert compare(one, {"norm": np.array([np.inf, 1.0])}, "fp16").holds
    assert not compare(one, {"norm": np.array([1.0, 1.0])}, "fp16").holds


def test_tolerance_follows_the_precision() -> None:
    one, other = {"x": np.ones(4)}, {"x": np.ones(4) * 1.001}
    assert not compare(one, other, "fp32").holds
    assert compare(one, other, "bf16").holds


def test_rounding_hides_no_mistake() -> None:
    gradient, weight = np.array([1.0, -1.0, 1e-9, 2e-3]), np.array([0.5, 0.5, 0.1, 0.5])
    one = {"step 1, gradient of w": gradient, "step 1, parameter w": weight}
    assert compare(one, {**one, "step 1, parameter w": weight + np.array([0, 0, 0.1, 0])}, "fp32").holds
    for wrong in ([0, 0, 1e-4, 0], [0, 0, 0, 2e-3]):
        verdict = compare(one, {**one, "step 1, gradient of w": gradient + np.array(wrong)}, "fp32")
        assert verdict.first is not None and verdict.first.tensor == "step 1, gradient of w"
    assert not compare(one, {**one, "step 1, parameter w": weight + np.array([0, 0, 0, 1e-4])}, "fp32").holds
    small = {"step 1, gradient of v": np.full(4, 1e-6)}  # beside larger ones, and twice what it should be
    assert not compare({**one, **small}, {**one, "step 1, gradient of v": np.full(4, 2e-6)}, "fp32").holds


def test_what_an_optimizer_makes_of_rounding_is_measured() -> None:
    one, shaken = {"w": np.ones(4), "v": np.ones(4)}, {"w": np.ones(4) * (1 + 1e-4), "v": np.ones(4)}
    for name, error, holds in (("w", 2e-4, True), ("w", 8e-4, False), ("v", 2e-4, False), ("v", 1e-5, True)):
        found = {**one, name: np.ones(4) * (1 + error)}
        assert compare(one, found, "fp32", rounded=[shaken]).holds == holds
        assert compare(one, found, "fp32").holds == (error < 2e-5)
    unlike = {**one, "w": np.full(4, np.inf)}
    assert not compare(one, {**one, "w": np.ones(4) * 2}, "fp32", rounded=[unlike]).holds


def test_a_module_that_the_plan_never_calls_is_not_missing() -> None:
    one = {f"step 1, micro-batch {n}, output of {name}": np.ones(1) for n in (1, 2) for name in ("layers", "layers.0")}
    found = {name: value for name, value in one.items() if name.endswith("layers.0")}
    verdict = compare(one, found, "fp32")
    assert verdict.holds and verdict.compared == 2
    found.pop("step 1, micro-batch 2, output of layers.0")  # but a call of one that it does call is
    assert compare(one, found, "fp32").first.tensor == "step 1, micro-batch 2, output of layers.0"  # type: ignore[union-attr]


def test_a_module_that_stages_call_in_parts_is_not_compared() -> None:
    one = {f"step 1, micro-batch 1, output of drop (call {n})": np.ones(1) * n for n in (1, 2)}
    found = {"step 1, micro-batch 1, output of drop": np.ones(1)}
    assert compare({**one, "step 1, loss": np.ones(1)}, {**found, "step 1, loss": np.ones(1)}, "fp32").compared == 1


def test_what_a_module_gave_in_shapes_that_follow_from_numbers_is_not_compared() -> None:
    def seen(*tokens: int) -> dict[str, np.ndarray]:
        given = {f"step 1, micro-batch {n + 1}, output of experts": np.ones(3 * t) for n, t in enumerate(tokens)}
        return {**given, "step 1, loss": np.ones(1)}

    assert compare(seen(2, 3), seen(3, 2), "fp32").compared == 1
    assert compare(seen(2, 2), seen(3, 3), "fp32").compared == 1
    assert compare(seen(2, 2), seen(2, 2), "fp32").compared == 3
