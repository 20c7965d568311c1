"""Plan: everything decided about how a model is spread and computed, and nothing about who decided it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from trainfleet.errors import PlanError

STRICT: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}
"""For `__pydantic_config__` of every settings dataclass: unknown keys are refused, docstrings describe."""

MODEL_AXES = ("tp", "cp", "pp")
"""Axes whose ranks see the same data, and compute one copy of the model together."""


Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"]
"""Schedules of a pipeline, from the plainest on."""


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
    repeat it. A degree of None takes what the world size leaves. `tp` ranks share each layer, `cp` groups of those
    share each sequence, and `pp` groups of all these hold the layers one after the other. `ep` of the ranks that see
    different data, or other pieces of it, share the experts.
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
    between them, convolutions by channels."""
    cp: int = 1
    """Ranks over which each sequence is split (context parallelism)."""
    cp_attention: Literal["ring", "all_to_all"] = "ring"
    """How attention sees the whole sequence under cp: keys and values go round the ranks, or ranks trade the sequence
    for heads."""
    ep: int = 1
    """Ranks over which the experts of a mixture are dealt out (expert parallelism); they are some of those that see
    different data or other pieces of sequences."""
    pp: int = 1
    """Ranks over which the layers are dealt out in turn (pipeline)."""
    schedule: Schedule = "1f1b"
    """The order in which a pipeline's ranks take micro-batches forward and backward."""
    stages_per_rank: int | None = None
    """Stages of the pipeline that each rank holds. None: 2 in schedules that need several, else 1."""
    stages: tuple[str, ...] = ()
    """Names of the modules with which the pipeline's second and further stages begin. Empty: balanced by cost."""
    microbatches: int = 1
    """Into how many parts, along its first dimension, each micro-batch is cut; a pipeline needs some to fill it."""
    engine: Literal["native", "deepspeed"] = "native"
    """What runs the plan: our own engine, or DeepSpeed (extra `deepspeed`), which takes data parallelism and ZeRO."""
    engine_required: bool = False
    """Refuse the run where the engine is not installed. False: our own takes its place, with a warning."""
    deepspeed_config: str | None = None
    """Path of a DeepSpeed JSON file with further settings for its engine."""
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
    recompute_budget: float | None = None
    """With `blocks`: the part, 0 to 1, of what blocks keep for backward that may be kept. The first step measures bytes
    and time of each block, and those that are dear to compute again are then left as they are. None: none are."""
    activations: Literal["keep", "offload", "partition"] = "keep"
    """Where what blocks keep for backward rests: on the device; in CPU memory, from which it comes back beside the
    backward of a later block; or, of recomputed blocks, one piece of each input on each rank of `tp`."""
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
    tp_columns: tuple[str, ...] = ()
    """Names or class names of linear layers and convolutions split by output features or channels. Unnamed ones: the
    `tp_plan` of a model of transformers, else found."""
    tp_rows: tuple[str, ...] = ()
    """Names or class names of linear layers and convolutions split by input features or channels."""
    tp_vocabulary: bool = False
    """Split embeddings and output heads by vocabulary too; `cross_entropy` then never gathers the logits."""
    tp_sequence: bool = False
    """Between split layers each rank of tp keeps its positions of each sequence only: norms, dropout and residuals take
    1/tp of the memory."""
    devices: tuple[str, ...] = ()
    """Devices of one process over which the blocks are dealt out in turn, such as cuda:0 and cuda:1. Empty: all is on
    the one device of each process."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", *MODEL_AXES, "ep", "stages_per_rank", "microbatches"):
            degree = getattr(self, name)
            if degree is not None and degree < 1:
                raise PlanError(f"plan.{name} is {degree}; use at least 1.")
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

        self._refuse_of_activations()
        self._refuse_of_pipeline()
        self._refuse_of_engine()
        if self.devices:
            self._refuse_of_devices()
        if self.engine == "deepspeed":
            self._refuse_of_deepspeed()
        if self.cp > 1:
            self._refuse_of_context()
        if self.ep > 1:
            self._refuse_of_experts()
        if self.tp_sequence:
            self._refuse_of_sequence()
        if self.compile and self.tp > 1:
            raise PlanError(
                f"plan.compile is set with plan.tp = {self.tp}; split layers are not compiled yet. "
                "Leave one of them out."
            )

    def _refuse_of_activations(self) -> None:
        budget, where = self.recompute_budget, self.activations
        if budget is not None:
            if not 0 <= budget <= 1:
                raise PlanError(f"plan.recompute_budget is {budget}; it is a part of what blocks keep, from 0 to 1.")
            if self.recompute != "blocks" or self.recompute_every > 1:
                raise PlanError(
                    f"plan.recompute_budget is {budget} with plan.recompute = {self.recompute!r} and recompute_every = "
                    f"{self.recompute_every}; it chooses among whole blocks. Set them to 'blocks' and 1."
                )
        if where == "offload" and self.recompute == "selective":
            raise PlanError(
                "plan.activations is 'offload' with plan.recompute = 'selective', whose kept results stay on the "
                "device. Set recompute to 'blocks' or 'none', or activations to 'keep'."
            )
        if where == "partition" and (self.tp == 1 or self.recompute != "blocks"):
            raise PlanError(
                f"plan.activations is 'partition' with plan.tp = {self.tp} and plan.recompute = {self.recompute!r}; it "
                "keeps the inputs of recomputed blocks in pieces on the ranks of tp. Set tp to 2 or more and recompute "
                "to 'blocks', or activations to 'keep' or 'offload'."
            )
        if where == "partition" and self.cp > 1:
            raise PlanError(
                f"plan.activations is 'partition' with plan.cp = {self.cp}, where inputs are pieces of sequences "
                "already. Set activations to 'keep' or 'offload', or cp to 1."
            )
        if self.compile and (budget is not None or where != "keep"):
            name = "recompute_budget" if budget is not None else "activations"
            raise PlanError(
                f"plan.compile is set with plan.{name} = {getattr(self, name)!r}; what compiled blocks keep is not "
                "seen from outside. Leave one of them out."
            )

    def _refuse_of_devices(self) -> None:
        alone = {"zero": 0, "compile": False, "engine": "native"} | dict.fromkeys((*MODEL_AXES, "ep"), 1)
        for name, value in alone.items():
            if getattr(self, name) != value:
                raise PlanError(
                    f"plan.devices deals blocks out over {len(self.devices)} devices of one process, which does not go "
                    f"with plan.{name} = {getattr(self, name)!r}. Leave one of them out, or start a process a device."
                )

    def _refuse_of_deepspeed(self) -> None:
        for name in (*MODEL_AXES, "ep"):
            if getattr(self, name) > 1:
                raise PlanError(
                    f"plan.{name} is {getattr(self, name)} with plan.engine = 'deepspeed', which takes data parallelism"
                    f" and ZeRO here. Set engine to 'native', or {name} to 1."
                )
        if self.zero and self.dp_replicate not in (None, 1):
            raise PlanError(
                f"plan.dp_replicate is {self.dp_replicate} with plan.zero = {self.zero} and plan.engine = 'deepspeed', "
                "which shards over all ranks that see different data. Leave dp_replicate out, or set engine to "
                "'native'."
            )
        if self.compile:
            raise PlanError("plan.compile is set with plan.engine = 'deepspeed'. Leave one of them out.")

    def _refuse_of_context(self) -> None:
        if self.compile:
            raise PlanError(
                f"plan.compile is set with plan.cp = {self.cp}; split sequences are not compiled yet. "
                "Leave one of them out."
            )

    def _refuse_of_sequence(self) -> None:
        if self.tp == 1:
            raise PlanError(
                "plan.tp_sequence is set with plan.tp = 1; it splits sequences over the ranks of tp. Set tp to 2 or "
                "more, or leave tp_sequence out."
            )
        for name in ("cp", "pp", "ep"):
            if getattr(self, name) > 1:
                raise PlanError(
                    f"plan.tp_sequence is set with plan.{name} = {getattr(self, name)}, beside which sequences are not "
                    f"split over tp yet. Leave tp_sequence out, or set {name} to 1."
                )
        if self.tp_vocabulary:
            raise PlanError(
                "plan.tp_sequence is set with plan.tp_vocabulary; logits lie in pieces of sequences already, and are "
                "never gathered. Leave one of them out."
            )
        if self.recompute == "selective":
            raise PlanError(
                "plan.tp_sequence is set with plan.recompute = 'selective', which counts operators, and their number "
                "may differ in backward where a function cannot be split. Set recompute to 'blocks' or 'none'."
            )
        if self.activations == "partition":
            raise PlanError(
                "plan.tp_sequence is set with plan.activations = 'partition'; the inputs of blocks lie in pieces over "
                "tp already. Set activations to 'keep' or 'offload', or leave tp_sequence out."
            )

    def _refuse_of_experts(self) -> None:
        if self.compile:
            raise PlanError(
                f"plan.compile is set with plan.ep = {self.ep}; tokens that travel are not compiled yet. "
                "Leave one of them out."
            )
        if self.offload == "parameters":
            raise PlanError(
                f"plan.offload is 'parameters' with plan.ep = {self.ep}; experts stay on their device. "
                "Offload 'optimizer', or set ep to 1."
            )

    def _refuse_of_pipeline(self) -> None:
        if self.pp == 1 and (self.stages or self.stages_per_rank is not None):
            name = "stages" if self.stages else "stages_per_rank"
            raise PlanError(f"plan.{name} is set with plan.pp = 1, which has no stages. Set pp to 2 or more.")
        if self.stages and len(self.stages) + 1 != self.num_stages:
            raise PlanError(
                f"plan.stages names {len(self.stages)} modules, which begin the second and further stages, so there "
                f"are {len(self.stages) + 1} stages; plan.pp x plan.stages_per_rank is {self.num_stages}. "
                "Make both agree."
            )

    def _refuse_of_engine(self) -> None:
        if self.engine != "deepspeed" and (self.deepspeed_config or self.engine_required):
            name = "deepspeed_config" if self.deepspeed_config else "engine_required"
            raise PlanError(f"plan.{name} is set with plan.engine = {self.engine!r}. Set engine to 'deepspeed'.")

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline; 1 without one."""
        several = self.pp > 1 and self.schedule not in ("gpipe", "1f1b")
        return self.pp * (self.stages_per_rank or (2 if several else 1))

    def fewest_ranks(self) -> int:
        """The fewest processes on which every degree of this plan shows; at least 2."""
        of_data = (self.dp_replicate or 1) * (self.dp_shard or (2 if self.zero and not self.dp_replicate else 1))
        return max(2, math.lcm(of_data * self.cp, self.ep) * self.tp * self.pp)

    def data_ranks(self, world_size: int) -> int:
        """How many of `world_size` ranks see different data, or PlanError."""
        plan = self.for_world(world_size)
        return (plan.dp_replicate or 1) * (plan.dp_shard or 1)

    def for_world(self, world_size: int) -> Plan:
        """The same plan with every degree filled in for `world_size` ranks, or PlanError."""
        if self.devices and world_size > 1:
            raise PlanError(
                f"plan.devices deals the blocks out over {len(self.devices)} devices of one process, but there are "
                f"{world_size} processes. Start one, or leave devices out: plan.pp deals layers out to processes."
            )
        replicate, shard = self.dp_replicate, self.dp_shard
        used = {axis: degree for axis in MODEL_AXES if (degree := getattr(self, axis)) > 1}
        others = math.prod(used.values())
        name = " x ".join(used) or "tp"
        for_data = _quotient(world_size, others, name)  # the ranks that see different data
        if self.zero == 0:
            shard = 1
        if replicate is None and shard is None:
            replicate = 1
        if shard is None:
            shard = _quotient(for_data, replicate or 1, "dp_replicate", others)
        if replicate is None:
            replicate = _quotient(for_data, shard, "dp_shard", others)
        needed = replicate * shard * others
        if needed != world_size:
            names, degrees = "dp_replicate x dp_shard", f"{replicate} x {shard}"
            for axis, degree in used.items():
                names, degrees = f"{names} x {axis}", f"{degrees} x {degree}"
            raise PlanError(
                f"The plan needs {names} = {degrees} = {needed} processes, "
                f"but there are {world_size}. Start {needed}, or change the plan."
            )
        _quotient(for_data * self.cp, self.ep, "ep", others // self.cp)
        return replace(self, dp_replicate=replicate, dp_shard=shard)

    def __str__(self) -> str:
        parts = [f"zero={self.zero}"]
        parts += [f"{name}={value}" for name in ("dp_replicate", "dp_shard") if (value := getattr(self, name))]
        parts += [f"{n}={value}" for n in (*MODEL_AXES, "ep", "microbatches") if (value := getattr(self, n)) > 1]
        parts += [self.schedule] * (self.pp > 1)
        parts += [self.cp_attention] * (self.cp > 1)
        parts += [f"engine={self.engine}"] * (self.engine != "native")
        parts.append(self.precision)
        every = f"/{self.recompute_every}" * (self.recompute_every > 1)
        parts += [f"recompute={self.recompute}{every}"] * (self.recompute != "none")
        parts += [f"budget={self.recompute_budget}"] * (self.recompute_budget is not None)
        parts += [f"activations={self.activations}"] * (self.activations != "keep")
        parts += [f"offload={self.offload}"] * (self.offload != "none")
        parts += ["compile"] * self.compile
        parts += [name for name in ("tp_vocabulary", "tp_sequence") if getattr(self, name)]
        parts += [f"devices={','.join(self.devices)}"] * bool(self.devices)
        return " ".join(parts)


def _quotient(number: int, degree: int, name: str, others: int = 1) -> int:
    """`number` is that of all processes, or of those left where `others` of them share each place."""
    if number % degree:
        divisors = [d for d in range(1, number + 1) if number % d == 0]
        kind = f"process{'es' * (number != 1)} of this run"
        if others > 1:
            kind = f"{'place' if number == 1 else 'places'} that {number * others} processes leave beside other degrees"
        raise PlanError(
            f"plan.{name}={degree} does not divide the {number} {kind}. "
            f"Use one of {divisors}, or start a multiple of {degree * others} processes."
        )
    return number // degree
