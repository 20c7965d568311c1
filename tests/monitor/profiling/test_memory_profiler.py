"""The report is held against the C library's own account of the same step, taken while nobody profiles it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from allocated import measure, needs_glibc  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.optimizer import _global_optimizer_pre_hooks  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from trainfleet.monitor import MemoryProfiler, MemoryReport  # noqa: E402

WIDTH = 256


class Mlp(nn.Module):
    def __init__(self, *, recompute: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(4)
        )
        self.embedding, self.head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.recompute = recompute
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


class Doubled(torch.autograd.Function):
    """Keeps tensors where hooks of autograd do not see them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x * 2, x.exp()
        return ctx.kept[0].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2 + 0 * ctx.kept[1]


class Images(nn.Module):
    """Convolutions with buffers, channels last, and an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)
        self.register_buffer("table", torch.zeros(100, 1000))

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.first(images.to(memory_format=torch.channels_last))).relu_()
        x = Doubled.apply(self.second(x) + x)
        return self.head(x.mean((2, 3)))


def tokens() -> tuple[Tensor, Tensor]:
    drawn = torch.randint(WIDTH, (8, 128))
    return drawn, drawn.flatten()


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 64, 64), torch.randint(10, (8,))


def training_step(
    model: nn.Module, batch: tuple[Tensor, Tensor], *, bf16: bool = False, accumulation: int = 1, **optimizer: Any
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, **optimizer)

    def step() -> None:
        for _ in range(accumulation):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                output = model(batch[0])
                loss = F.cross_entropy(output.flatten(0, -2).float(), batch[1])
            del output
            loss.backward()
        adamw.step()
        adamw.zero_grad()

    for _ in range(2):
        step()
    return step, adamw


def report_of(model: nn.Module, step: Callable[[], None], optimizer: Any, *, steps: int = 1) -> MemoryReport:
    with MemoryProfiler(model, optimizer) as profiler:
        for _ in range(steps):
            step()
            profiler.step()
    return profiler.get_memory_report()


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, Tensor], dict[str, Any]]]] = {
    "plain": lambda: (Mlp(), tokens(), {}),
    "accumulation": lambda: (Mlp(), tokens(), {"accumulation": 2}),
    "foreach": lambda: (Mlp(), tokens(), {"foreach": True}),
    "fused": lambda: (Mlp(), tokens(), {"fused": True}),
    "tied": lambda: (Mlp(tied=True), tokens(), {}),
    "recompute": lambda: (Mlp(recompute=True), tokens(), {}),
    "bf16": lambda: (Mlp(), tokens(), {"bf16": True}),
    "images": lambda: (Images(), images(), {}),
}
LONG = ("tied", "accumulation", "foreach", "fused", "bf16")


@needs_glibc
@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.matrix] * (case in LONG)) for case in CASES])
def test_the_peak_and_the_end_are_those_of_the_c_library_within_3_percent(case: str) -> None:
    model, batch, more = CASES[case]()
    step, optimizer = training_step(model, batch, **more)
    report = report_of(model, step, optimizer)
    measured = measure(step, until=0.98 * (report.peak_bytes - report.begin_bytes))
    assert report.peak_bytes - report.begin_bytes == pytest.approx(measured.peak, rel=0.03)
    assert report.end_bytes - report.begin_bytes == pytest.approx(measured.end, abs=0.01 * measured.peak)
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    parameters = sum(sizes.values())
    assert sum(kinds.get("parameters", 0) for kinds in report.modules.values()) == parameters
    assert sum(kinds.get("gradients", 0) for kinds in report.modules.values()) == pytest.approx(parameters, rel=0.01)
    assert sum(kinds.get("optimizer", 0) for kinds in report.modules.values()) == pytest.approx(
        2 * parameters, rel=0.01
    )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert sum(kinds.get("buffers", 0) for kinds in report.modules.values()) == buffers


def test_activations_belong_to_the_module_that_made_them() -> None:
    model = Mlp()
    report = report_of(model, *training_step(model, tokens()))
    rows = 8 * 128 * WIDTH * 4
    for i in range(4):
        assert report.modules[f"blocks.{i}.0"]["activations"] == rows  # what GELU needs
        assert report.modules[f"blocks.{i}.1"]["activations"] == rows  # what the norm needs
        assert report.modules[f"blocks.{i}.2"]["activations"] == pytest.approx(
            rows, rel=0.01
        )  # what the next one needs
    assert report.modules["head"]["gradients"] == WIDTH * WIDTH * 4
    assert report.peak_phase == "backward"
    assert report.phases["optimizer"]["gradients"] == sum(p.numel() * 4 for p in model.parameters())
    assert report.phases["optimizer"]["activations"] < 100  # the loss, which the loop still has


def test_a_step_that_recomputes_keeps_less_and_computes_again_in_backward() -> None:
    plain, frugal = (Mlp(recompute=recompute) for recompute in (False, True))
    of_plain = report_of(plain, *training_step(plain, tokens()))
    of_frugal = report_of(frugal, *training_step(frugal, tokens()))
    assert of_frugal.phases["forward"]["activations"] < 0.5 * of_plain.phases["forward"]["activations"]
    assert of_frugal.phases["backward"]["activations"] > of_frugal.phases["forward"]["activations"]


def test_what_stays_alive_from_step_to_step_is_named() -> None:
    model = Mlp()
    step, optimizer = training_step(model, tokens())
    kept: list[Tensor] = []
    report = report_of(
        model, lambda: (step(), kept.append(model.blocks[0](torch.zeros(64, WIDTH)))), optimizer, steps=5
    )
    growth = report.growth
    assert growth.bytes_per_step >= 2 * 64 * WIDTH * 4  # what the norm needs and what it gives are kept too
    assert {suspect.module for suspect in growth.suspects} >= {"blocks.0.1", "blocks.0.2"}
    (norm,) = [suspect for suspect in growth.suspects if suspect.module == "blocks.0.1"]
    assert (norm.shape, norm.blocks, norm.bytes_per_step) == ((64, WIDTH), 5, 64 * WIDTH * 4)
    assert "GROWS" in str(report)


@pytest.mark.parametrize(
    "case",
    [pytest.param("plain", marks=pytest.mark.matrix), "recompute", pytest.param("images", marks=pytest.mark.matrix)],
)
def test_a_clean_run_raises_no_suspicion(case: str) -> None:
    model, batch, more = CASES[case]()
    optimizer = torch.optim.AdamW(model.parameters())
    state_fills = report_of(model, training_step(model, batch, **more)[0], optimizer, steps=4)
    assert state_fills.growth.suspects == ()
    assert state_fills.growth.bytes_per_step == 0
    assert "GROWS" not in str(state_fills)


def test_before_any_step_it_tells_what_tensors_hold_now() -> None:
    model = Mlp()
    report = MemoryProfiler(model).get_memory_report()
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert report.phases["other"]["parameters"] == parameters
    assert report.peak_bytes >= parameters
    everything = MemoryProfiler().get_memory_report()
    assert everything.peak_bytes >= parameters and "parameters" not in everything.phases["other"]


def test_nothing_is_left_behind() -> None:
    model = Mlp()
    step, optimizer = training_step(model, tokens())
    report_of(model, step, optimizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not _global_optimizer_pre_hooks and not torch.autograd._profiler_enabled()


def test_another_profiler_of_torch_is_refused_in_a_sentence() -> None:
    with torch.profiler.profile(), pytest.raises(RuntimeError, match="another profiler of torch runs"):
        MemoryProfiler().start()
    assert not torch.autograd._profiler_enabled()
