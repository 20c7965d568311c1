"""The forward of each module is a range while that is wanted, and nothing afterwards."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from trainfleet.monitor.profiling.module_ranges import ModuleRanges  # noqa: E402


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")


class Trying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.failing, self.linear = Failing(), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.failing(x)
        except ValueError:
            return self.linear(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def ranges_of(model: nn.Module) -> list[tuple[str, str | None]]:
    """(name, name of the range around it), in the order of time."""
    with torch.profiler.profile() as profiler, ModuleRanges(model):
        model(torch.ones(1, 2))
    events = [event for event in profiler.events() if event.name.startswith("module: ")]
    found = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        around = event.cpu_parent
        while around is not None and not around.name.startswith("module: "):
            around = around.cpu_parent
        found.append((event.name.removeprefix("module: "), around and around.name.removeprefix("module: ")))
    return found


def test_ranges_lie_in_one_another_also_after_a_module_that_raised() -> None:
    assert ranges_of(Trying()) == [("", None), ("failing", ""), ("linear", "")]


def test_hooks_are_gone_afterwards() -> None:
    model = Trying()
    ranges_of(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_compiled_module_is_one_range_and_is_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter

    model = nn.Sequential(Block(), nn.Linear(2, 2))
    torch._dynamo.reset()
    counter = CompileCounter()
    model[0].compile(backend=counter)
    model(torch.ones(1, 2))
    compiled = model[0]._compiled_call_impl
    assert ranges_of(model) == [("", None), ("0", ""), ("1", "")]
    assert counter.frame_count == 1
    assert model[0]._compiled_call_impl is compiled
