"""Plan: everything decided about how a model is spread and computed, and nothing about who decided it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from trainfleet.errors import PlanError

STRICT: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}
"""For `__pydantic_config__` of every settings dataclass: unknown keys are refused, docstrings describe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScale:
    """How fp16 gradients are kept from vanishing. Only fp16 uses it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    initial: float = 65536.0
    """The first scale; the only one if `fixed`."""
    window: int = 2000
    """Steps without overflow after which the scale doubles."""
    minimum: float = 1.0
    """The scale never falls below; an overflow there ends the run with a sentence."""
    fixed: bool = False
    """Keep `initial` for ever."""

    def __post_init__(self) -> None:
        if not (self.initial >= self.minimum > 0):
            raise PlanError(
                f"plan.loss_scale.initial is {self.initial} and minimum {self.minimum}; "
                "both must be positive and initial at least minimum."
            )
        if self.window < 1:
            raise PlanError(f"plan.loss_scale.window is {self.window}; use at least 1 step.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How one model is spread over ranks and computed.

    `zero` 0 replicates the model (data parallel); 1 splits the optimizer state, 2 the gradients too,
    3 the parameters too (ZeRO, arXiv:1910.02054), over `dp_shard` ranks; `dp_replicate` groups of those
    repeat it. A degree of None takes what the world size leaves. `tp` ranks share each layer, and `pp` groups of those
    hold the layers one after the other.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    zero: Literal[0, 1, 2, 3] = 0
    """What is split over the data-parallel ranks: 0 nothing, 1 optimizer state, 2 + gradients, 3 + parameters."""
    dp_replicate: int | None = None
    """Copies of the (possibly sharded) model. None: 1 with zero >= 1, all ranks with zero = 0."""
    dp_shard: int | None = None
    """Ranks over which one copy is sharded. None: what dp_replicate leaves."""
    tp: int = 1
    """Ranks over which each layer is split (tensor parallelism): attention by heads, pairs of linear layers by what is
    between them."""
    pp: int = 1
    """Ranks over which the layers are dealt out in turn (pipeline). So far only for NumPy models over MPI."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The dtype of matrix products and convolutions; parameters, gradients and optimizer state stay float32."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """Loss scaling of fp16."""
    float32_modules: tuple[str, ...] = ()
    """Names or class names of further modules that compute in float32 under bf16 and fp16."""
    recompute: Literal["none", "blocks", "selective"] = "none"
    """`blocks`: keep only the inputs of each block in forward and compute it again in backward. `selective`: keep what
    is dear to compute too, and compute the rest again."""
    recompute_keep: tuple[str, ...] = ()
    """Operators of torch whose results `selective` keeps, such as `addmm`. Empty: matrix products, convolutions and
    attention."""
    recompute_every: int = 1
    """Recompute each so many-th block only: 2 is every other one, for half of the memory at half of the time."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in CPU memory between uses: the optimizer state, or the parameters (with zero = 3) and it."""
    blocks: tuple[str, ...] = ()
    """Names or class names of the modules sharded and recomputed as units. Empty: repeated children, found; with `zero`
    1 or 2 a model of up to 25 MiB is then sharded as one unit."""
    entry_points: tuple[str, ...] = ()
    """Methods of the model besides `forward` that run its parameters, such as `generate`."""
    sync_batch_stats: bool = True
    """Batch normalisation sees the batch of all data-parallel ranks, as one process would."""
    compile: bool = False
    """Compile each block with torch.compile."""
    tp_whole: tuple[str, ...] = ()
    """Names or class names of modules that every tensor-parallel rank computes whole."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "tp", "pp"):
            degree = getattr(self, name)
            if degree is not None and degree < 1:
                raise PlanError(f"plan.{name} is {degree}; a degree is at least 1.")
        if self.zero == 0 and self.dp_shard not in (None, 1):
            raise PlanError(
                f"plan.zero is 0, which shards nothing, but plan.dp_shard is {self.dp_shard}. "
                "Set zero to 1, 2 or 3, or leave dp_shard out."
            )
        if self.recompute_every < 1:
            raise PlanError(f"plan.recompute_every is {self.recompute_every}; use 1 for every block, or more.")
        if self.recompute_keep and self.recompute != "selective":
            raise PlanError(
                f"plan.recompute_keep is given with plan.recompute = {self.recompute!r}, which keeps nothing. "
                "Set recompute to 'selective'."
            )
        if self.offload == "parameters" and self.zero != 3:
            raise PlanError(
                f"plan.offload is 'parameters' with plan.zero = {self.zero}; parameters can leave the device "
                "only where they are gathered for each use. Set zero to 3, or offload to 'optimizer'."
            )
        if self.offload == "optimizer" and self.zero == 0:
            raise PlanError("plan.offload is 'optimizer' with plan.zero = 0; set zero to 1, 2 or 3.")

        if self.compile and self.tp > 1:
            raise PlanError(
                f"plan.compile is set with plan.tp = {self.tp}; split layers are not compiled yet. "
                "Leave one of them out."
            )

    def data_ranks(self, world_size: int) -> int:
        """How many of `world_size` ranks see different data, or PlanError."""
        plan = self.for_world(world_size)
        return (plan.dp_replicate or 1) * (plan.dp_shard or 1)

    def for_world(self, world_size: int) -> Plan:
        """The same plan with every degree filled in for `world_size` ranks, or PlanError."""
        replicate, shard = self.dp_replicate, self.dp_shard
        others = self.tp * self.pp
        name = "tp" if self.pp == 1 else "pp" if self.tp == 1 else "tp x pp"
        for_data = _quotient(world_size, others, name)  # the ranks that see different data
        if self.zero == 0:
            shard = 1
        if replicate is None and shard is None:
            replicate = 1
        if shard is None:
            shard = _quotient(for_data, replicate or 1, "dp_replicate")
        if replicate is None:
            replicate = _quotient(for_data, shard, "dp_shard")
        needed = replicate * shard * others
        if needed != world_size:
            names, degrees = "dp_replicate x dp_shard", f"{replicate} x {shard}"
            if others > 1:
                names, degrees = f"{names} x tp x pp", f"{degrees} x {self.tp} x {self.pp}"
            raise PlanError(
                f"The plan needs {names} = {degrees} = {needed} processes, "
                f"but there are {world_size}. Start {needed}, or change the plan."
            )
        return replace(self, dp_replicate=replicate, dp_shard=shard)

    def __str__(self) -> str:
        parts = [f"zero={self.zero}"]
        parts += [f"{name}={value}" for name in ("dp_replicate", "dp_shard") if (value := getattr(self, name))]
        parts += [f"{name}={value}" for name in ("tp", "pp") if (value := getattr(self, name)) > 1]
        parts.append(self.precision)
        every = f"/{self.recompute_every}" * (self.recompute_every > 1)
        parts += [f"recompute={self.recompute}{every}"] * (self.recompute != "none")
        parts += [f"offload={self.offload}"] * (self.offload != "none")
        parts += ["compile"] * self.compile
        return " ".join(parts)


def _quotient(world_size: int, degree: int, name: str) -> int:
    if world_size % degree:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise PlanError(
            f"plan.{name}={degree} does not divide the {world_size} process{'es' * (world_size != 1)} of this run. "
            f"Use one of {divisors}, or start a multiple of {degree} processes."
        )
    return world_size // degree
