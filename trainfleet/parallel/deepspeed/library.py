"""DeepSpeed itself: the one place that imports it, and that keeps it from building, searching and printing."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.optim import Optimizer

from trainfleet.comm.torch_group import TorchGroup
from trainfleet.deps import require
from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.stopwatch import timed

_SHARED_MEMORY_OPERATOR = "deepspeed_shm_comm"


def initialize(model: nn.Module, optimizer: Optimizer, config: Mapping[str, Any], mesh: Mesh) -> Any:
    """DeepSpeed's engine around `model`, over the process group of `mesh`; a collective.

    DependencyError where it is not installed, PlanError where it refuses `config`.
    """
    device_type = mesh.device.partition(":")[0]
    # It asks the environment, and as long as it lives; what a launcher or the user has set stands.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", str(mesh.local_rank))
    library = require("deepspeed", "deepspeed", purpose="plan.engine=deepspeed")
    library.utils.logger.setLevel(logging.WARNING)
    found = library.accelerator.get_accelerator().device_name()
    if found.partition(":")[0] != device_type:
        raise PlanError(
            f"The ranks compute on {device_type}, but DeepSpeed was loaded for {found} in this process. "
            f"Set DS_ACCELERATOR={device_type}, or leave out plan.engine."
        )
    # Only inference uses it, and it would be compiled on every rank: 40 s the first time.
    library.ops.__compatible_ops__[_SHARED_MEMORY_OPERATOR] = False
    # It calls torch's collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning, "torch.distributed")
    linear = functional.linear
    try:
        engine, *_ = library.initialize(
            model=model, optimizer=optimizer, config=dict(config), mpu=_Places(mesh), dist_init_required=False
        )
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise PlanError(f"DeepSpeed refuses this configuration: {error}") from error
    finally:
        functional.linear = linear  # stage 3 puts its own there, for all models and for ever: see `linear_layers`
    _time_exchanges(library.comm.comm.cdb)
    return engine


_EXCHANGES = (
    *("all_reduce", "all_reduce_coalesced", "inference_all_reduce", "reduce", "broadcast", "barrier"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor", "all_gather_coalesced"),
    *("all_to_all", "all_to_all_single"),
)
"""What its stages call of the backend that all its engines share."""


def _time_exchanges(backend: Any) -> None:
    """Let the time in which it exchanges, or waits for what it has begun, be that of communication."""
    for name in _EXCHANGES:
        exchange = getattr(backend, name, None)
        if exchange is not None and not isinstance(exchange, _Exchange):
            setattr(backend, name, _Exchange(exchange))


class _Exchange:
    def __init__(self, exchange: Callable[..., Any]) -> None:
        self._exchange = exchange

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with timed("communication"):
            work = self._exchange(*args, **kwargs)
        return _Work(work) if hasattr(work, "wait") else work


class _Work:
    """An exchange of DeepSpeed's under way."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with timed("communication"):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def linear_layers(engine: Any) -> Iterator[None]:
    """Inside, linear layers are those of stage 3, which keep no gathered weight for backward; else torch's."""
    if engine.zero_optimization_stage() < 3 or not engine._config.zero_config.memory_efficient_linear:
        yield
        return
    library = require("deepspeed", "deepspeed")
    linear = functional.linear
    functional.linear = library.runtime.zero.linear.zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = linear


@contextmanager
def gathered(parameter: nn.Parameter, *, write: bool = False) -> Iterator[None]:
    """Inside, a parameter of stage 3 is whole on every rank; with `write`, what rank 0 puts there stays."""
    library = require("deepspeed", "deepspeed")
    with library.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield


class _Places:
    """What DeepSpeed calls an `mpu`: our groups, so that it makes none of its own, whose deadlines were others."""

    def __init__(self, mesh: Mesh) -> None:
        assert isinstance(mesh.data_axes, TorchGroup)
        self._data = mesh.data_axes

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._data.process_group

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_group_ranks(self) -> range:
        return range(self._data.size)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    # These names it asks for when it loads a universal checkpoint.
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
