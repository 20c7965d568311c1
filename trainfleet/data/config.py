"""The settings of data: where samples come from, how they are batched, and how large a batch is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainfleet.data.iterable import IterableBatches
from trainfleet.data.loader import LocalBatches
from trainfleet.data.source import is_indexed, open_source
from trainfleet.data.split import Part
from trainfleet.errors import ConfigError
from trainfleet.imports import load_object
from trainfleet.plan import STRICT

if TYPE_CHECKING:
    from trainfleet.data.feed.remote import RemoteBatches

OnSkip = Callable[[int, str], None]
ON_DEVICE = {"pixels": "trainfleet.data.pixels:Pixels"}
"""The short names of `data.on_device`, and what each stands for."""
REMOTE = "remote"
"""The source whose batches feeders make."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How many samples a step takes: global_batch = micro_batch x accumulation x data ranks.

    Any two give the third; with one alone, accumulation is 1.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    global_batch: int | None = None
    """Samples in an optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Samples in one forward and backward of one rank."""
    accumulation: int | None = None
    """Micro-batches of each rank in an optimizer step."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "accumulation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"batch.{name} is {value}; it must be at least 1.")

    def resolve(self, data_ranks: int) -> tuple[int, int, int]:
        """(micro_batch, accumulation, global_batch) on `data_ranks` ranks, or ConfigError with all the numbers."""
        micro, accumulation, whole = self.micro_batch, self.accumulation, self.global_batch
        if micro is None and whole is None:
            raise ConfigError("No batch size is given. Set batch.micro_batch or batch.global_batch.")
        if whole is None:
            assert micro is not None
            accumulation = accumulation or 1
            return micro, accumulation, micro * accumulation * data_ranks
        if whole < data_ranks:
            raise ConfigError(
                f"batch.global_batch is {whole}, fewer samples than the {data_ranks} data ranks, "
                "so some would hold none. Use a larger batch, or fewer processes."
            )
        if micro is not None and accumulation is not None:
            if micro * accumulation * data_ranks != whole:
                raise ConfigError(
                    f"batch.micro_batch x batch.accumulation x data ranks = {micro} x {accumulation} x {data_ranks} "
                    f"= {micro * accumulation * data_ranks}, but batch.global_batch is {whole}. Leave one of them out."
                )
            return micro, accumulation, whole
        if micro is not None:
            return micro, _share(whole, micro, "micro_batch", data_ranks), whole
        accumulation = accumulation or 1
        return _share(whole, accumulation, "accumulation", data_ranks), accumulation, whole


def _share(whole: int, given: int, name: str, data_ranks: int) -> int:
    if whole % (given * data_ranks):
        step = given * data_ranks
        below, above = whole // step * step, -(-whole // step) * step
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"batch.global_batch = {whole} is no multiple of batch.{name} x data ranks = {given} x {data_ranks} = "
            f"{step}. Use a global_batch of {near}, or another {name}."
        )
    return whole // (given * data_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where samples come from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: str | None = None
    """As data.source; remote: the stream `evaluation` of the feeders."""
    args: dict[str, Any] = field(default_factory=dict)
    """What the source is opened with, such as path; for remote, where data.source is remote too: as there."""
    fraction: float | None = None
    """In place of `source`: this part of data.source is held out, from everywhere in it, and not trained on."""
    seed: int = 0
    """Of what `fraction` holds out. It is not that of the run: runs of other seeds are compared on the same samples."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.fraction is None):
            raise ConfigError(
                f"data.evaluation has source={self.source} and fraction={self.fraction}; it needs one of the two.",
                hint="Give a source of its own, or the fraction of data.source to hold out, such as 0.1.",
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ConfigError(f"data.evaluation.fraction is {self.fraction}; it lies between 0 and 1, often 0.1.")
        if self.fraction is not None and self.args:
            raise ConfigError("data.evaluation.args are for a source of its own; with fraction it is data.source.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where samples come from, for training and for evaluation, and how they are made into batches."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: str | None = None
    """csv, numpy, parquet, arrow, text, images, hf, webdataset, mds or flight (docs/data.md); the import path
    package.module:Name of a dataset; or remote:
    feeders make the batches, with their own transform, collate and workers."""
    args: dict[str, Any] = field(default_factory=dict)
    """What the source is opened with, such as path; for remote: feeders, listen, tunnel, certificates, identity,
    classes, buffer_bytes, timeout (docs/feed.md)."""
    evaluation: SourceConfig | None = None
    """The source to evaluate on, never shuffled; none: no evaluation."""
    transform: str | None = None
    """Import path of a function sample -> sample, or (sample, rng) -> sample."""
    collate: str | None = None
    """Import path of a function from a list of samples to a batch. None: stacked."""
    on_device: str | None = None
    """What the trainer does to a batch on its device, so that bytes travel small: pixels (uint8 images to float32), or
    the import path of a function batch -> batch."""
    on_device_args: dict[str, Any] = field(default_factory=dict)
    """For pixels: mean, std, channels. A class or function named by its path is called with them first."""
    shuffle: bool = True
    """Training samples in another order each epoch."""
    seed: int | None = None
    """The order and the randomness of transforms derive from it. None: train.seed."""
    workers: int = 0
    """Processes on each rank that make batches ahead; 0 makes them in the loop."""
    prefetch: int = 2
    """Batches each worker makes ahead."""
    short: Literal["drop", "pad", "keep"] = "drop"
    """What to do with the end of an epoch that does not fill a micro-batch on every rank."""
    bad: Literal["raise", "skip"] = "raise"
    """A sample that cannot be read: end the run, or leave it out and count it."""
    shards: int | None = None
    """For an iterable source that can be sharded: into how many parts, a multiple of the ranks."""
    worker_timeout: timedelta = timedelta(minutes=2)
    """How long a worker may make no progress before it is replaced."""
    worker_restarts: int = 3
    """How many workers may be lost within a thousand batches."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"data.workers is {self.workers}; use 0 to make batches in the loop, or more.")
        if self.prefetch < 1:
            raise ConfigError(f"data.prefetch is {self.prefetch}; each worker makes at least 1 batch ahead.")
        if self.worker_timeout <= timedelta(0):
            raise ConfigError(f"data.worker_timeout is {self.worker_timeout}; it must be more than nothing.")
        if self.worker_restarts < 0:
            raise ConfigError(f"data.worker_restarts is {self.worker_restarts}; use 0 or more.")
        if self.shards is not None and self.shards < 1:
            raise ConfigError(f"data.shards is {self.shards}; use at least 1, or leave it out.")
        for name in ("transform", "collate"):
            value = getattr(self, name)
            if value is not None and ":" not in value:
                raise ConfigError(f"data.{name} is {value!r}; give its import path as package.module:name.")

    def open_on_device(self) -> Callable[..., Any] | None:
        """The function that `on_device` names."""
        if self.on_device is None:
            return None
        found = load_object(ON_DEVICE.get(self.on_device, self.on_device), key="data.on_device")
        if not self.on_device_args and self.on_device not in ON_DEVICE and not isinstance(found, type):
            return found  # type: ignore[no-any-return]
        try:
            return found(**self.on_device_args)  # type: ignore[no-any-return]
        except TypeError as exc:
            raise ConfigError(
                f"data.on_device {self.on_device!r} does not take data.on_device_args {self.on_device_args}: {exc}"
            ) from exc

    def open_training(
        self,
        *,
        size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        on_skip: OnSkip | None = None,
        source: Any = None,
    ) -> LocalBatches | IterableBatches | RemoteBatches:
        """The endless stream of a rank's micro-batches of `size`.

        `source` takes the place of the configured one; `seed` is that of the run, for where data.seed is none.
        """
        if source is None:
            if self.source == REMOTE:
                return self._open_remote(
                    "training",
                    self.args,
                    size=size,
                    rank=rank,
                    world_size=world_size,
                    seed=seed if self.seed is None else self.seed,
                    shuffle=self.shuffle,
                    short=self.short,
                    on_skip=on_skip,
                )
            source = self._open_source()
        return self._open(
            source,
            held_out=False,
            size=size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            on_skip=on_skip,
            workers=self.workers,
            short=self.short,
            shuffle=self.shuffle,
            shards=self.shards,
        )

    def open_evaluation(
        self,
        *,
        size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        on_skip: OnSkip | None = None,
        source: Any = None,
        training: Any = None,
    ) -> LocalBatches | IterableBatches | RemoteBatches | None:
        """One pass in order that leaves no sample out, to be rewound for the next; None where none is configured.

        `source` takes the place of the configured one, `training` that of data.source where a fraction of it is held
        out. It has no workers of its own: they would be idle between evaluations.
        """
        held_out = None
        if source is None:
            if self.evaluation is None:
                return None
            is_fed = self.source == REMOTE and training is None
            if self.evaluation.source == REMOTE or (self.evaluation.fraction is not None and is_fed):
                own = self.evaluation.args
                return self._open_remote(
                    "evaluation",
                    own or self.args if self.source == REMOTE else own,
                    size=size,
                    rank=rank,
                    world_size=world_size,
                    seed=seed if self.seed is None else self.seed,
                    shuffle=False,
                    short="keep",
                    on_skip=on_skip,
                )
            if self.evaluation.fraction is not None:
                source, held_out = training if training is not None else self._open_source(), True
            else:
                assert self.evaluation.source is not None
                source = open_source(self.evaluation.source, **self.evaluation.args)
        return self._open(
            source,
            held_out=held_out,
            size=size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            on_skip=on_skip,
            workers=0,
            short="keep",
            shuffle=False,
            shards=None,
            epochs=1,
        )

    def _open_source(self) -> Any:
        if self.source is None:
            raise ConfigError("data.source is not set. Name a source (csv, text, ...) or package.module:Name.")
        return open_source(self.source, **self.args)

    def _part(self, source: Any, held_out: bool | None) -> Part | None:
        """Of a source that both streams have, the one's or the other's; None: all of it."""
        if held_out is None or self.evaluation is None or self.evaluation.fraction is None:
            return None
        if not is_indexed(source):
            raise ConfigError(
                f"data.evaluation.fraction is {self.evaluation.fraction}, but data.source is only iterated, so what is "
                "held out cannot be found in it.",
                hint="Give data.evaluation a source of its own, or data.source len() and [index].",
            )
        return Part(source, self.evaluation.fraction, seed=self.evaluation.seed, held_out=held_out)

    def _open_remote(self, stream: str, args: Mapping[str, Any], **terms: Any) -> RemoteBatches:
        from trainfleet.data.feed.config import FeedConfig

        return FeedConfig.of(args).open(stream, bad=self.bad, **terms)

    def _open(
        self, source: Any, *, held_out: bool | None, seed: int, shuffle: bool, shards: int | None, **common: Any
    ) -> LocalBatches | IterableBatches:
        common |= {
            "seed": seed if self.seed is None else self.seed,
            "prefetch": self.prefetch,
            "bad": self.bad,
            "transform": load_object(self.transform, key="data.transform") if self.transform else None,
            "collate": load_object(self.collate, key="data.collate") if self.collate else None,
            "pin": True,
            "timeout": self.worker_timeout,
            "restarts": self.worker_restarts,
        }
        part = self._part(source, held_out)
        if is_indexed(source):
            return LocalBatches(source, shuffle=shuffle, part=part, **common)
        return IterableBatches(source, shards=shards, **common)
