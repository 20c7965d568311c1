"""NaN and infinities, planted in a small net at known places and for one known sample; and the hunt for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.data import LocalBatches
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.layout import piece_of
from trainfleet.plan import Plan
from trainfleet.training.before import Before
from trainfleet.training.inspection import Finding, Inspector
from trainfleet.training.recipe import TrainConfig
from trainfleet.training.trainer import Trainer
from trainfleet.training.watcher import Judgement, UnderWay, Watcher

SAMPLES, WIDTH, MARKED = 64, 32, 37
"""The sample of this index carries a mark in its first number, which hidden states keep in theirs."""
MARK = 1000.0


class Points:
    """Rows of eight numbers, and what is to be found from them; in one of them a mark."""

    def __init__(self, broken: bool = False) -> None:
        draw = np.random.default_rng(0)
        self.inputs = draw.normal(size=(SAMPLES, 8)).astype(np.float32)
        self.inputs[:, 0] = 0
        self.inputs[MARKED, 0] = MARK
        if broken:
            self.inputs[MARKED, 5] = np.nan
        self.targets = draw.normal(size=(SAMPLES, 4)).astype(np.float32)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self.inputs[index], "target": self.targets[index]}


def marked(hidden: Tensor) -> Tensor:
    """The rows of the marked sample, also behind a LayerNorm, which leaves sqrt(31) of the mark, and what follows."""
    return hidden[..., :1] > 4


class Block(nn.Module):
    """Norm, two layers, and the trunk beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        with torch.no_grad():  # the mark goes on into the branch
            self.up.weight[0] = torch.eye(WIDTH)[0]

    def before(self, hidden: Tensor) -> Tensor:
        """Code between `norm` and `up`, for plants."""
        return hidden

    def join(self, trunk: Tensor, branch: Tensor) -> Tensor:
        return trunk + branch

    def forward(self, hidden: Tensor) -> Tensor:
        return self.join(hidden, self.down(self.act(self.up(self.before(self.norm(hidden))))))


class Statistics(nn.Module):
    """Adds a running number to what it is given; its buffer is what a plant breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        shifted = hidden + 0 * self.mean
        if self.training and torch.is_grad_enabled():
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return shifted


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.statistics = Statistics()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        with torch.no_grad():
            self.embed.weight[:, 0] = 0  # the mark goes to the first hidden number alone
            self.embed.weight[0, 0] = 1

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.statistics(self.embed(input))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def squares(output: Tensor, batch: Batch) -> LossSum:
    return LossSum((output - batch["target"]).square().mean(-1).sum(), len(output))


# what is planted


def _nan(hidden: Tensor) -> Tensor:
    return torch.where(marked(hidden), torch.nan, hidden)


class _BadBackward(torch.autograd.Function):
    """Gives what it is given; of the marked rows' gradients, NaN."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        context.save_for_backward(rows)
        return hidden.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return torch.where(context.saved_tensors[0], torch.nan, gradient), None


def _behind(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let `module` give change(what it was given, what it would give)."""
    forward = module.forward

    @functools.wraps(forward)
    def changed(hidden: Tensor) -> Tensor:
        return change(hidden, forward(hidden))

    module.forward = changed  # type: ignore[method-assign]


def _in_forward(name: str, model: Net) -> None:
    _behind(model.get_submodule(name), lambda given, found: torch.where(marked(given), torch.nan, found))


def _overflow(name: str, model: Net) -> None:
    _behind(model.get_submodule(name), lambda given, found: torch.where(marked(given), found.abs() * 3e38 * 1e3, found))


def _in_backward(name: str, model: Net) -> None:
    _behind(model.get_submodule(name), lambda given, found: _BadBackward.apply(found, marked(given)))


def _in_code(model: Net) -> None:
    model.blocks[2].before = _nan  # type: ignore[assignment, union-attr]


def _in_code_backward(model: Net) -> None:
    """A length whose gradient at 0 is 0 / 0: the classic of losses and attention."""

    def before(hidden: Tensor) -> Tensor:
        rows = marked(hidden)
        still = torch.where(rows, 0 * hidden, hidden)
        return hidden + still.square().sum(-1, keepdim=True).sqrt() * 1e-3

    model.blocks[1].before = before  # type: ignore[assignment, union-attr]


def _bad_loss(output: Tensor, batch: Batch) -> LossSum:
    """The logarithm of a target that is 0, for the marked sample."""
    rows = batch["input"][:, 0] == MARK
    logs = torch.where(rows, 0.0, 1.0).log()
    return LossSum(squares(output, batch).total + (logs * batch["target"][:, 0]).sum(), len(output))


def _huge_loss(output: Tensor, batch: Batch) -> LossSum:
    """Gradients of 1e25, whose squares float32 cannot hold."""
    usual = squares(output, batch)
    return LossSum(usual.total * 1e25, usual.weight)


class BadSteps(torch.optim.AdamW):
    """Its second update breaks a number of one parameter."""

    broken: Tensor
    taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.taken += 1
        if self.taken == 2:
            with torch.no_grad():
                piece_of(self.broken).view(-1)[3] = torch.nan


class _BreaksBuffer(Watcher):
    """As a step would whose statistics went wrong: the third step meets it."""

    def __init__(self, model: Net) -> None:
        self._model = model

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        if step == 3:
            self._model.statistics.mean[4] = torch.nan


@dataclass(frozen=True, kw_only=True)
class Plant:
    """Something that is not finite, and what a hunt for it has to say."""

    name: str
    kind: str
    module: str | None
    words: str = ""
    """That the sentence has in it."""
    into: Callable[[Net], None] | None = None
    loss: Callable[[Any, Batch], Any] = squares
    broken_data: bool = False
    breaks: str | None = None
    """The parameter that the optimizer breaks."""
    breaks_buffer: bool = False
    of_sample: bool = True
    """Whether it comes from the marked sample alone."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    nproc: int = 1
    ranks: tuple[int, ...] = (0,)
    """That saw it."""


def _module(module: str, into: Callable[[str, Net], None], **settings: Any) -> Plant:
    return Plant(into=functools.partial(into, module), module=module, **settings)


PLANTS = [
    _module("blocks.2.up", _in_forward, name="forward of a deep module", kind="module", words="blocks.2.up"),
    _module("blocks.1.up", _overflow, name="overflow first, NaN behind it", kind="module", words="infinities"),
    Plant(
        name="code between two modules",
        into=_in_code,
        kind="code",
        module="blocks.2",
        words="between blocks.2.norm and blocks.2.up",
    ),
    Plant(name="the loss function", loss=_bad_loss, kind="loss", module=""),
    _module("blocks.1.act", _in_backward, name="backward of an own function", kind="backward", words="blocks.1.act"),
    _module(
        "blocks.2.down", _in_backward, name="backward on a residual branch", kind="backward", words="blocks.2.down"
    ),
    Plant(
        name="square root of 0 in code, backward",
        into=_in_code_backward,
        kind="backward",
        module="blocks.1",
        words="between blocks.1.norm and blocks.1.up",
    ),
    Plant(name="the data of one sample", broken_data=True, kind="batch", module=None, words="['input']"),
    Plant(
        name="a parameter, by the optimizer",
        breaks="blocks.1.up.weight",
        kind="parameter",
        module="blocks.1.up",
        words="blocks.1.up.weight",
        of_sample=False,
    ),
    Plant(
        name="a buffer",
        breaks_buffer=True,
        kind="buffer",
        module="statistics",
        words="statistics.mean",
        of_sample=False,
    ),
    Plant(name="the norm alone", loss=_huge_loss, kind="norm", module="head", words="head", of_sample=False),
    _module(
        "blocks.2.up", _in_forward, name="one rank only, ZeRO-2", kind="module", plan={"zero": 2}, nproc=2, ranks=(1,)
    ),
    _module(
        "blocks.3.down",
        _in_backward,
        name="backward, one rank, ZeRO-3, recomputed",
        kind="backward",
        plan={"zero": 3, "recompute": "blocks"},
        nproc=2,
        ranks=(1,),
    ),
    _module(
        "blocks.3.up",
        _in_forward,
        name="the second stage of a pipeline",
        kind="module",
        plan={"pp": 2, "microbatches": 2},
        nproc=2,
        ranks=(1,),
    ),
    _module(
        "blocks.1.act",
        _in_backward,
        name="backward in the first stage",
        kind="backward",
        plan={"pp": 2, "microbatches": 2},
        nproc=2,
        ranks=(0,),
    ),
    _module(
        "blocks.1.norm",
        _in_forward,
        name="before a split layer, tp=2",
        kind="module",
        plan={"tp": 2},
        nproc=2,
        ranks=(0, 1),
    ),
]


class Hunter(Watcher):
    """Asks for an explanation of the first step that is not finite, and ends the run there."""

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector
        self.finding: Finding | None = None

    def judge(self, under_way: UnderWay) -> Judgement | None:
        self.finding = self._inspector.explain(under_way)
        if self.finding is None:
            return None
        return Judgement(policy="stop", kind="loss_not_finite", what=self.finding.what)


def hunt(plant: Plant, *, steps: int = 8, folder: Path | None = None, precision: str = "fp32") -> Finding | None:
    """Train with the plant on this rank's mesh until it is met, and explain it; None where it never was."""
    plan = Plan(**{"precision": precision, **plant.plan})
    with Mesh.from_env(plan, device="cpu") as mesh:
        batches, trainer, hunter = trainer_of(plant, plan, mesh, folder)
        try:
            trainer.fit(steps)
        except Exception:
            if hunter.finding is None:
                raise
        finally:
            batches.close()
        return hunter.finding


def trainer_of(plant: Plant, plan: Plan, mesh: Mesh, folder: Path | None) -> tuple[LocalBatches, Trainer, Hunter]:
    torch.manual_seed(0)
    model: Any = Net()
    if plant.into is not None:
        plant.into(model)
    batches = LocalBatches(
        Points(plant.broken_data), size=8, rank=mesh.data_axes.rank, world_size=mesh.data_axes.size, seed=1
    )
    rows = Points()
    example = {"input": torch.as_tensor(rows.inputs[:8]), "target": torch.as_tensor(rows.targets[:8])}
    model = parallelize(model, mesh, plan, example=example)
    if plant.breaks is not None:
        optimizer: Any = BadSteps(model.parameters(), lr=1e-3)
        optimizer.broken = model.get_parameter(plant.breaks)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inspector = Inspector(Before(model), batches, clip_norm=1.0, folder=folder)
    hunter = Hunter(inspector)
    watchers = [*([_BreaksBuffer(model)] if plant.breaks_buffer else []), inspector.before, inspector, hunter]
    config = TrainConfig(check_replicas_every=None)
    trainer = Trainer(
        model, optimizer, plant.loss, batches, mesh=mesh, config=config, accumulation=2, watchers=watchers
    )
    return batches, trainer, hunter


def wrong_in(plant: Plant, finding: Finding | None) -> str | None:
    """What a hunt got wrong; None where all of it is right."""
    if finding is None:
        return "nothing was found"
    if (finding.kind, finding.module) != (plant.kind, plant.module):
        return f"it is said to be {finding.kind} of {finding.module!r}, not {plant.kind} of {plant.module!r}"
    if plant.words not in finding.what:
        return f"{plant.words!r} is not in {finding.what!r}"
    if plant.of_sample and finding.indices != (MARKED,):
        return f"the samples are said to be {finding.indices}"
    if plant.of_sample and finding.ranks != plant.ranks:
        return f"the ranks are said to be {finding.ranks}"
    return None


def hunt_numbered(number: int, folder: Path | None = None) -> Finding | None:
    """As one rank of those that `PLANTS[number]` wants."""
    return hunt(PLANTS[number], folder=folder)
