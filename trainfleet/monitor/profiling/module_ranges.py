"""Named ranges around the forward of every module, for torch's profiler to see, while they are wanted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainfleet.monitor.profiling.allocations import MODULE

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


class ModuleRanges:
    """While it is entered, the forward of each module of `model` runs in a range `module: NAME`.

    A compiled module is one range: hooks inside it, or on it, would have it compiled again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[RemovableHandle] = []
        self._compiled: list[tuple[nn.Module, Callable[..., Any]]] = []

    def __enter__(self) -> ModuleRanges:
        inside: set[nn.Module] = set()
        for name, module in self._model.named_modules():
            compiled = getattr(module, "_compiled_call_impl", None)
            if compiled is not None:
                self._compiled.append((module, compiled))
                module._compiled_call_impl = _ranged(MODULE + name, compiled)
                inside |= set(module.modules())
            elif hasattr(module, "_orig_mod"):  # what torch.compile(model) gave
                inside |= set(module.modules())
            elif module not in inside:
                self._watch(MODULE + name, module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, compiled in self._compiled:
            module._compiled_call_impl = compiled
        self._hooks, self._compiled = [], []

    def _watch(self, name: str, module: nn.Module) -> None:
        from torch.autograd.profiler import record_function

        open_: list[record_function] = []  # a module may call itself

        def begin(module: nn.Module, args: Any) -> None:
            open_.append(record_function(name))
            open_[-1].__enter__()  # type: ignore[no-untyped-call]

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if open_:
                open_.pop().__exit__(None, None, None)

        # First and last: what other hooks allocate, such as those that gather parameters, is the module's.
        self._hooks.append(module.register_forward_pre_hook(begin, prepend=True))
        # Also where a recomputation leaves by an exception, having found all that it wanted.
        self._hooks.append(module.register_forward_hook(end, always_call=True))


def _ranged(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    from torch.autograd.profiler import record_function

    @functools.wraps(call)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return ranged
