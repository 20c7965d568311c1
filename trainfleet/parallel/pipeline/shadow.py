"""Shadow: a copy of a model without memory, which says what a forward would do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from trainfleet.batch import map_arrays
from trainfleet.errors import PlanError
from trainfleet.parallel.deferred import forget_recording, without_recording
from trainfleet.parallel.torch_private import FakeTensorMode

if TYPE_CHECKING:
    from trainfleet.parallel.pipeline.record import Recorder


class Shadow:
    """The whole model, also where a rank holds but its stages: shapes, dtypes and devices, and no numbers."""

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = torch.device(device)
        self.recorder: Recorder | None = None
        """Who hears of the calls of watched modules."""
        memo: dict[int, Any] = dict(without_recording(model))
        for tensor in [*model.parameters(), *model.buffers()]:
            if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                raise PlanError(
                    f"{type(model).__name__} has parameters that do not know their shape yet. Run it once on a batch, "
                    "then spread it."
                )
            memo[id(tensor)] = self._twin(tensor)
        try:
            self.model: nn.Module = copy.deepcopy(model, memo)
        except Exception as exc:
            raise PlanError(
                f"{type(model).__name__} cannot be copied, which a pipeline needs to see what its parts hand on: "
                f"{exc}. Keep what cannot be copied out of the model, or set plan.pp to 1."
            ) from exc
        forget_recording(self.model)

    def _twin(self, tensor: Tensor) -> Tensor:
        with self.fake:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(twin, requires_grad=tensor.requires_grad)
        return twin

    def of(self, nested: Any) -> Any:
        """The same nesting, with tensors of the same kinds and without numbers."""
        return map_arrays(lambda array: self._twin(array) if isinstance(array, Tensor) else array, nested)

    def watch(self, names: Iterable[str]) -> None:
        """From now on the recorder hears of the calls of the modules `names`, in place of what they do inside."""
        for name in names:
            module = self.model.get_submodule(name)
            if "_watched" not in module.__dict__:
                module.__class__ = _watched(type(module))
                module.__dict__["_watched"] = (self, name)


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _watched(plain: type[nn.Module]) -> type[nn.Module]:
    """A class like `plain` whose calls the recorder hears of; one for each, so that modules alike stay alike."""
    if plain in _made:
        return _made[plain]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        shadow, name = self.__dict__["_watched"]
        inner = functools.partial(plain.__call__, self)
        return inner(*args, **kwargs) if shadow.recorder is None else shadow.recorder.arrive(name, inner, args, kwargs)

    _made[plain] = type(plain.__name__, (plain,), {"__call__": call, "__module__": plain.__module__})
    return _made[plain]
