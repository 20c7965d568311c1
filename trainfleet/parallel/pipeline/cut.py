"""cut: a whole model to the stages that this rank holds, in place and under the names of the whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from trainfleet.parallel.deferred import follow
from trainfleet.parallel.pipeline.stages import EVERYWHERE, Stages


class Elsewhere(nn.Module):
    """Stands for a module that another stage holds. It has no parameters but those that are tied to some held here.

    Attributes are those of the module without its numbers, so `model.head.weight.device` or `.in_features` still work.
    """

    def __init__(self, twin: nn.Module, stage: int) -> None:
        super().__init__()
        self.__dict__["_twin"] = twin
        self.__dict__["stage"] = stage

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_twin"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"This {type(self.__dict__['_twin']).__name__} is held by stage {self.__dict__['stage']} of the pipeline, "
            "not by this rank. Call the whole model, on all ranks."
        )

    def extra_repr(self) -> str:
        return f"{type(self.__dict__['_twin']).__name__} of stage {self.__dict__['stage']}"


def is_held(model: nn.Module, name: str) -> bool:
    """Whether this rank has the module `name`, and not what stands for it."""
    module = model
    for part in name.split(".") if name else ():
        found = module._modules.get(part)
        if found is None or isinstance(found, Elsewhere):
            return False
        module = found
    return True


def keep_stages(model: nn.Module, twin: nn.Module, stages: Stages, held: Collection[int]) -> None:
    """Take out of `model` what none of the stages `held` has; `twin` is a copy of the whole without numbers."""
    names = dict(model.named_parameters())
    kept = {id(names[name]) for name, holders in stages.parameters.items() if set(holders) & set(held)}
    absent = {
        id(model.get_submodule(name)): holders[0]
        for name, holders in stages.leaves.items()
        if EVERYWHERE not in holders and not set(holders) & set(held)
    }
    leaves = {id(model.get_submodule(name)) for name in stages.leaves}
    elsewhere: list[tuple[nn.Module, Elsewhere]] = []
    _keep(model, twin, absent, leaves, kept, elsewhere)
    for module, found in elsewhere:
        follow(model, module, found)


def _keep(
    module: nn.Module,
    twin: nn.Module,
    absent: Mapping[int, int],
    leaves: set[int],
    kept: set[int],
    elsewhere: list[tuple[nn.Module, Elsewhere]],
) -> None:
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and id(parameter) not in kept:
            del module._parameters[name]
            module.__dict__[name] = getattr(twin, name)  # its shape and device may be asked for
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        if id(child) in absent:
            module._modules[name] = _stand_in(child, getattr(twin, name), absent[id(child)], kept, elsewhere)
        elif id(child) not in leaves:
            _keep(child, getattr(twin, name), absent, leaves, kept, elsewhere)


def _stand_in(
    module: nn.Module, twin: nn.Module, stage: int, kept: set[int], elsewhere: list[tuple[nn.Module, Elsewhere]]
) -> Elsewhere:
    found = Elsewhere(twin, stage)
    elsewhere.append((module, found))
    found.train(module.training)
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) in kept:
            found._parameters[name] = parameter
    for name, child in module._modules.items():
        if child is not None and any(id(parameter) in kept for parameter in child.parameters()):
            found._modules[name] = _stand_in(child, getattr(twin, name), stage, kept, elsewhere)
    return found
