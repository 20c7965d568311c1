"""register_kernel: a CUDA, Triton or C++ operator with a twin in plain torch, a gradient, and shapes.

    @register_kernel("mine::swiglu")
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:         # the twin: plain torch, what the operator means
        return torch.nn.functional.silu(gate) * up

    @swiglu.on("cuda")
    def _(gate: Tensor, up: Tensor) -> Tensor:              # what runs there
        return my_extension.swiglu(gate, up)

    @swiglu.gradient                                        # optional; without it, that of the twin
    def _(gradient, output, gate, up):
        return my_extension.swiglu_backward(gradient, gate, up)

The operator is torch's own (torch.library), so torch.compile keeps it whole, autocast leaves it alone, and sharded
parameters reach it gathered. `check_kernel` holds every implementation against the twin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

from trainfleet.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

_names: set[str] = set()


def register_kernel(name: str) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Make the decorated function the twin of a new operator `namespace::name`, which is called in its place.

    The twin takes tensors, numbers, text and lists of them, with annotations, and returns a new tensor or a tuple of
    them. It changes no argument and returns none of them: torch's operators may not. It runs wherever nothing else
    was registered, and for torch.compile says shapes and dtypes.
    Raises ConfigError for a name that is taken or has no namespace, and for annotations that torch does not know.
    """
    namespace, _, short = name.partition("::")
    if not (namespace.isidentifier() and short.isidentifier()):
        raise ConfigError(
            f"A kernel is named {name!r}; it needs a namespace of its own, such as 'mine::{short or name}'."
        )
    if name in _names:
        raise ConfigError(f"There is a kernel {name!r} already. Give the new one another name.")

    def register(twin: Callable[P, R]) -> Kernel[P, R]:
        kernel = Kernel(name, twin)
        _names.add(name)
        return kernel

    return register


class Kernel(Generic[P, R]):
    """An operator: called like its twin, computed by what was registered for the device of its tensors."""

    def __init__(self, name: str, twin: Callable[P, R]) -> None:
        self.name = name
        self.twin = twin
        self.__doc__ = twin.__doc__
        self.devices: list[str] = []
        """Where something else than the twin runs."""
        self._signature = inspect.signature(twin)
        self._gradient: Callable[..., Any] | None = None
        try:
            schema = torch.library.infer_schema(_with_types(twin), mutates_args=())
        except (ValueError, NameError) as exc:
            raise ConfigError(f"The twin of kernel {name!r} cannot be an operator of torch: {exc}") from exc
        self.operator = torch.library.custom_op(name, self._run_twin, mutates_args=(), schema=schema)
        """Torch's own."""
        self.operator.register_fake(twin)
        self.operator.register_autograd(self._backward, setup_context=self._keep)
        self._backward_op = torch.library.custom_op(
            f"{name}_twin_gradient", self._run_gradient_of_twin, mutates_args=(), schema=_gradient_schema(schema)
        )
        self._backward_op.register_fake(lambda _, *inputs: [torch.empty_like(each) for each in _tensors(inputs)])

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.operator(*args, **kwargs)  # type: ignore[no-any-return]

    def on(self, device_type: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Let the decorated function, of the twin's arguments, compute the operator on `cuda`, `cpu` and so on."""

        def register(implementation: Callable[..., R]) -> Callable[..., R]:
            if device_type in self.devices:
                raise ConfigError(f"Kernel {self.name!r} has an implementation on {device_type!r} already.")
            self.operator.register_kernel(device_type, implementation)
            self.devices.append(device_type)
            return implementation

        return register

    def gradient(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Let `function(gradient, output, *inputs)` give the gradients of the tensors among `inputs`.

        One tensor, or a tuple in their order, None where there is none. Of an operator with several outputs,
        `gradient` and `output` are tuples.
        """
        self._gradient = function
        return function

    def _run_twin(self, *args: Any) -> Any:
        return self.twin(*args)  # type: ignore[call-arg]

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        kept = _tensors(inputs) + (list(outputs) if self._gradient is not None else [])
        ctx.save_for_backward(*kept)
        ctx.inputs = [None if isinstance(each, Tensor) else each for each in inputs]
        ctx.is_tensor = [isinstance(each, Tensor) for each in inputs]
        ctx.is_single = isinstance(output, Tensor)

    def _backward(self, ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        kept = iter(ctx.saved_tensors)
        inputs = [next(kept) if is_tensor else plain for is_tensor, plain in zip(ctx.is_tensor, ctx.inputs)]
        found: Sequence[Any]
        if self._gradient is None:
            # An operator too, for torch.compile cannot look into a backward within a backward.
            found = self._backward_op(list(gradients), *inputs)
        else:
            outputs = tuple(kept)
            given = self._gradient(*((gradients[0], outputs[0]) if ctx.is_single else (gradients, outputs)), *inputs)
            found = given if isinstance(given, tuple | list) else (given,)
        if len(found) != sum(ctx.is_tensor):
            raise ConfigError(
                f"The gradient of kernel {self.name!r} gave {len(found)} gradients for {sum(ctx.is_tensor)} tensors. "
                "Give one for each, in the order of the arguments, or None."
            )
        given_in_order = iter(found)
        return tuple(next(given_in_order) if is_tensor else None for is_tensor in ctx.is_tensor)

    def _run_gradient_of_twin(self, gradients: list[Tensor], *inputs: Any) -> list[Tensor]:
        places = [
            place
            for place, each in enumerate(inputs)
            if isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex())
        ]

        def run(*chosen: Tensor) -> tuple[Tensor, ...]:
            given = list(inputs)
            for place, value in zip(places, chosen):
                given[place] = value
            output: Any = self.twin(*given)  # type: ignore[call-arg]
            outputs = output if isinstance(output, tuple) else (output,)
            return tuple(each for each in outputs if each.is_floating_point() or each.is_complex())

        wanted = [each for each in gradients if each.is_floating_point() or each.is_complex()]
        # Not torch.autograd.grad: inside of an operator autograd does not record.
        pull_back = torch.func.vjp(run, *(inputs[place] for place in places))[1]
        found = dict(zip(places, pull_back(tuple(wanted))))
        return [_own(found.get(place), each) for place, each in enumerate(inputs) if isinstance(each, Tensor)]


def _own(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Memory of its own: an operator may not return the tensor that it was given."""
    return torch.zeros_like(like) if gradient is None else gradient.clone(memory_format=torch.preserve_format)


def _tensors(inputs: Sequence[Any]) -> list[Tensor]:
    return [each for each in inputs if isinstance(each, Tensor)]


def _with_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same signature with annotations as types, where a module has them as text."""
    hints = get_type_hints(function)

    def typed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    parameters = [
        each.replace(annotation=hints.get(each.name, each.annotation)) for each in signature.parameters.values()
    ]
    typed.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=hints.get("return", signature.return_annotation)
    )
    return typed


def _gradient_schema(schema: str) -> str:
    arguments, _, _ = schema.partition("->")
    inner = arguments.strip().removeprefix("(").removesuffix(")").replace("*,", "").strip()
    return f"(Tensor[] gradients, {inner}) -> Tensor[]"
