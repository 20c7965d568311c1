"""record: the graph of one forward, found by running it on a shadow, with the stages' modules as leaves.

Nothing of the model is rewritten: a TorchFunctionMode sees the functions of torch that the code between the modules
calls, and the leaves say when they are called. Python's own branches and loops are taken as they come, so a graph
holds for inputs of these shapes, and what depends on the numbers in a tensor is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.graph import Graph, Kind, Modes, Named, Node, Value, replaced, signature
from trainfleet.parallel.pipeline.shadow import Shadow
from trainfleet.parallel.torch_private import DATA_DEPENDENT, UNSEEN_OPERATORS, FakeTensor, without_numbers

_TORCH, _OURS = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])


def record(shadow: Shadow, run: Callable[[Any, Any], Any], inputs: Any) -> Graph:
    """The graph of `run(model, inputs)`, with the modules that `shadow` watches as leaves.

    Raises PlanError, with the line, where the forward depends on the numbers in a tensor.
    """
    recorder = Recorder(shadow)
    twins = shadow.of(inputs)
    for tensor in tensors_of(twins):
        recorder.new_value(tensor)
    recorder.graph.num_inputs = len(recorder.graph.kinds)
    recorder.graph.modes = recorder.modes()
    shadow.recorder = recorder
    try:
        with shadow.fake, recorder:
            output = run(shadow.model, twins)
    except DATA_DEPENDENT as exc:
        raise PlanError(
            f"{_line_of(exc)}: the forward of {type(shadow.model).__name__} depends on the numbers in a tensor, so the "
            "stages of a pipeline cannot know what comes next.",
            hint="Compute with torch.where or masks there, move it into a block or out of the model, or set plan.pp=1.",
        ) from exc
    except UNSEEN_OPERATORS as exc:
        raise PlanError(
            f"{_line_of(exc)}: an operator does not say what it would give for tensors without numbers, which a "
            f"pipeline asks each: {exc}. Give it a shape function (trainfleet.kernels does), or set plan.pp to 1."
        ) from exc
    finally:
        shadow.recorder = None
    recorder.graph.output = recorder.template(output, "the output")
    return recorder.graph


class Recorder(TorchFunctionMode):
    """Notes every function of torch that makes or changes a tensor, and every call of a leaf."""

    def __init__(self, shadow: Shadow) -> None:
        super().__init__()
        self.graph = Graph()
        self._is_paused = False
        self._model = shadow.model
        self._seen: dict[Hashable, tuple[Any, Meter]] = {}
        self._device_type = shadow.device.type
        self._values: dict[int, Value] = {}
        self._named: dict[int, Named] = {}
        self._storages: dict[int, int] = {}
        self._kept: list[Tensor] = []
        for name, parameter in shadow.model.named_parameters():
            self._named[id(parameter)] = Named(name, True)
        for name, buffer in shadow.model.named_buffers():
            self._named[id(buffer)] = Named(name, False)

    def modes(self) -> Modes:
        kind = self._device_type
        return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def new_value(self, tensor: Tensor) -> Value:
        value = Value(len(self.graph.kinds))
        self._values[id(tensor)] = value
        self._kept.append(tensor)  # or another tensor might get its id
        self.graph.kinds[value.number] = Kind(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        self.graph.storages[value.number] = self._storages.setdefault(_memory(tensor), len(self._storages))
        return value

    def template(self, nested: Any, what: str) -> Any:
        """`nested` with references in place of tensors. Tensors that nobody made here are constants."""

        def reference(tensor: Tensor) -> Any:
            found = self._values.get(id(tensor)) or self._named.get(id(tensor))
            if found is None and isinstance(tensor, FakeTensor):
                raise PlanError(
                    f"{_line()}: {what} takes a tensor whose making was not seen, so the model cannot be cut into "
                    "stages there. Make it by functions of torch within the forward, or name larger plan.blocks."
                )
            return tensor if found is None else found

        _refuse_hidden(nested, what)
        return replaced(nested, (Tensor,), reference)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._is_paused:
            return func(*args, **kwargs)
        called = getattr(func, "__name__", str(func))
        if func is torch.autograd.grad:
            raise PlanError(
                f"{_line()}: the forward calls torch.autograd.grad between modules, which stages cannot do: each has "
                "but its own part of the graph. Set plan.pp to 1."
            )
        target = args[0] if args and writes(called) and isinstance(args[0], Tensor) else None
        target = kwargs["out"] if isinstance(kwargs.get("out"), Tensor) else target
        template = self.template((args, kwargs), called)  # before an in-place function makes its target new
        with Meter() as meter:
            result = func(*args, **kwargs)
        if target is not None or tensors_of(result):
            self._note(func, template, result, meter, target)
        return result

    def arrive(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The leaf `name` is called."""
        if self._is_paused:
            return call(*args, **kwargs)
        template = self.template((args, kwargs), name)
        self._is_paused = True
        try:
            result, meter = self._run_leaf(name, call, args, kwargs)
        finally:
            self._is_paused = False
        _refuse_hidden(result, name)
        self._note(name, template, result, meter, None)
        return result

    def _run_leaf(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Meter]:
        """What a leaf gives; what one that is like it has given, if its inputs were like these: blocks are many."""
        given = tensors_of((args, kwargs))
        key = (fingerprint(self._model.get_submodule(name)), signature((args, kwargs)), self.modes())
        if key in self._seen:
            result, meter = self._seen[key]
            return replaced(result, (Tensor,), self._like), meter
        with Meter() as meter:
            result = call(*args, **kwargs)
        memories = {_memory(tensor) for tensor in given}
        if not any(_memory(tensor) in memories for tensor in tensors_of(result)):
            self._seen[key] = result, meter
        return result, meter

    def _like(self, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad).clone()

    def _note(self, call: Any, template: Any, result: Any, meter: Meter, target: Tensor | None) -> None:
        changes = None if target is None else self._values.get(id(target)) or self._named.get(id(target))
        output: Any = replaced(result, (Tensor,), self.new_value)
        renewed = None
        if isinstance(changes, Value) and not any(each is target for each in tensors_of(result)):
            assert target is not None
            renewed = self.new_value(target)  # of __setitem__, which returns nothing
        args, kwargs = template
        self.graph.nodes.append(
            Node(
                call=call,
                args=args,
                kwargs=kwargs,
                output=output,
                modes=self.modes(),
                cost=meter.cost,
                is_random=meter.is_random,
                changes=changes,
                renewed=renewed,
                where=_line(),
            )
        )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else -id(tensor)


def fingerprint(module: nn.Module) -> Hashable:
    """Equal for modules that compute alike, but for the numbers in their tensors. Like no other's where in doubt."""
    return tuple((name, type(part), _settings(part)) for name, part in module.named_modules())


def _settings(module: nn.Module) -> Hashable:
    tensors = [*module._parameters.items(), *module._buffers.items()]
    kinds = tuple((name, signature(tensor)) for name, tensor in tensors)
    own = ((name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE)
    return kinds, module.training, tuple((name, signature(value)) for name, value in own)


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_watched"}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is computed inside, and whether random numbers were drawn."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = 0.0
        self.is_random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        result = without_numbers(func, args, kwargs)
        self.is_random = self.is_random or _draws(func, args, kwargs)
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.cost += float(formula(*args, **kwargs, out_val=result))
        else:
            self.cost += sum(float(tensor.numel()) for tensor in tensors_of(result))
        return result


def _draws(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator of torch draws random numbers: attention without dropout could, but does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    given = {each.name: each.default_value for each in func._schema.arguments}
    given |= dict(zip(given, args)) | dict(kwargs)
    return bool(given.get("dropout_p", given.get("dropout", 1)) != 0)


def writes(called: str) -> bool:
    """Whether a function of torch of this name changes its first argument."""
    if called.startswith("__"):
        in_place = called.startswith("__i") and called not in ("__int__", "__index__", "__invert__", "__iter__")
        return in_place or called in ("__setitem__", "__set__")
    return called.endswith("_")


def tensors_of(nested: Any) -> list[Tensor]:
    """Every tensor of a nesting, in order."""
    found: list[Tensor] = []
    replaced(nested, (Tensor,), lambda each: found.append(each) or each)  # type: ignore[func-returns-value]
    return found


def _refuse_hidden(nested: Any, what: str) -> None:
    """PlanError for an object in `nested` that holds tensors, where no reference could take their place."""

    def look(value: Any) -> Any:
        held = {} if isinstance(value, Tensor | nn.Module | type) else getattr(value, "__dict__", {})
        if any(isinstance(each, FakeTensor) for each in tensors_of(dict(held))):
            raise PlanError(
                f"{_line()}: {what} takes or gives a {type(value).__name__}, which holds tensors. Stages hand on "
                "tensors in dicts, lists, tuples and dataclasses only. Leave it out, or set plan.pp to 1."
            )
        return value

    replaced(nested, (_Other,), look)


class _OtherMeta(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return not isinstance(value, Mapping | list | tuple | slice) and not is_dataclass(value)


class _Other(metaclass=_OtherMeta):
    """Whatever is no nesting."""


def _line() -> str:
    """File and line of the model's code that is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, _OURS)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "the model"


def _line_of(error: BaseException) -> str:
    found, step = "the model", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith((_TORCH, _OURS)):
            found = f"{name}:{step.tb_lineno}"
        step = step.tb_next
    return found
