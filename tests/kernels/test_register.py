"""A kernel is an operator of torch with the meaning, the gradient and the shapes of its twin."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from trainfleet.errors import ConfigError
from trainfleet.kernels import Kernel, register_kernel

_numbers = itertools.count()


def twin(gate: Tensor, up: Tensor, power: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """The gated unit."""
    out = silu(gate) * up * power
    return out if bias is None else out + bias


def new_name() -> str:
    return f"tests::kernel_{next(_numbers)}"


def kernel_of(function: Any) -> Kernel[Any, Any]:
    return register_kernel(new_name())(function)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


def test_it_computes_what_the_twin_does_and_so_does_its_gradient() -> None:
    kernel, (gate, up, bias) = kernel_of(twin), leaves((3, 4), (3, 4), (4,))
    assert torch.equal(kernel(gate, up, power=2.0, bias=bias), twin(gate, up, 2.0, bias))
    assert torch.autograd.gradcheck(lambda *args: kernel(args[0], args[1], 2.0, args[2]), (gate, up, bias))
    assert torch.autograd.gradcheck(lambda *args: kernel(*args), (gate, up))
    assert kernel.__doc__ == "The gated unit."


def test_several_outputs_and_arguments_without_a_gradient() -> None:
    def sorted_scaled(x: Tensor, places: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return x[places] * scale, places.clone()

    kernel, (x,) = kernel_of(sorted_scaled), leaves((5,))
    places = torch.tensor([4, 0, 2])
    chosen, again = kernel(x, places, 3.0)
    chosen.sum().backward()
    assert torch.equal(again, places) and x.grad is not None and x.grad.tolist() == [3.0, 0.0, 3.0, 0.0, 3.0]


def test_what_is_registered_for_a_device_runs_there() -> None:
    kernel, (gate, up) = kernel_of(twin), leaves((2, 3), (2, 3))

    @kernel.on("cpu")
    def _(gate: Tensor, up: Tensor, power: float = 1.0, bias: Tensor | None = None) -> Tensor:
        return torch.full_like(gate, 7.0)

    assert kernel(gate, up).unique().tolist() == [7.0] and kernel.devices == ["cpu"]
    with pytest.raises(ConfigError, match="has an implementation on 'cpu' already"):
        kernel.on("cpu")(twin)


def test_a_gradient_of_its_own_is_taken_and_may_use_the_output() -> None:
    def root(x: Tensor) -> Tensor:
        return x.sqrt()

    kernel = kernel_of(root)

    @kernel.gradient
    def _(gradient: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return gradient / (2 * output)

    x = torch.rand(4, dtype=torch.float64).add_(1).requires_grad_()
    assert torch.autograd.gradcheck(kernel, (x,))
    kernel.gradient(lambda gradient, output, x: (gradient, gradient))
    with pytest.raises(ConfigError, match="gave 2 gradients for 1 tensors"):
        kernel(x).sum().backward()


def test_compiled_models_keep_it_whole() -> None:
    kernel, (gate, up) = kernel_of(twin), leaves((3, 4), (3, 4), dtype=torch.float32)
    kernel(gate, up).sin().sum().backward()
    plain = gate.grad
    gate.grad = None
    torch.compile(lambda a, b: kernel(a, b).sin().sum(), fullgraph=True, backend="aot_eager")(gate, up).backward()
    assert plain is not None and gate.grad is not None and torch.equal(plain, gate.grad)


def without_types(x, y):  # type: ignore[no-untyped-def]
    return x + y


def test_what_cannot_be_an_operator_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be an operator of torch"):
        kernel_of(without_types)
    with pytest.raises(ConfigError, match="such as 'mine::fast'"):
        register_kernel("fast")
    name = new_name()
    register_kernel(name)(twin)
    with pytest.raises(ConfigError, match="There is a kernel"):
        register_kernel(name)
