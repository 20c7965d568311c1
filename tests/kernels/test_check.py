"""The check sees what goes wrong in kernels: edges, strides, dtypes, gradients, arguments that are changed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainfleet.errors import TrainfleetError
from trainfleet.kernels import Kernel, check_kernel, register_kernel

_numbers = itertools.count()
X = torch.randn(33, 20, generator=torch.Generator().manual_seed(0))


def kernel_of(implementation: Callable[[Tensor, float], Tensor] | None = None) -> Kernel[Any, Any]:
    @register_kernel(f"tests::checked_{next(_numbers)}")
    def scaled(x: Tensor, factor: float) -> Tensor:
        return x.tanh() * factor

    if implementation is not None:
        scaled.on("cpu")(implementation)
    return scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_sound_kernel_agrees(dtype: torch.dtype) -> None:
    found = check_kernel(kernel_of(lambda x, factor: factor * torch.tanh(x)), X.to(dtype), 3.0)
    assert [(each.layout, each.tensor) for each in found] == [
        (layout, tensor) for layout in ("as given", "strided") for tensor in ("output 0", "the gradient of argument 0")
    ]


def last_row_forgotten(x: Tensor, factor: float) -> Tensor:
    out = torch.tanh(x) * factor
    out[-1] = 0
    return out


def blind_to_strides(x: Tensor, factor: float) -> Tensor:
    return torch.tanh(torch.as_strided(x.detach(), x.shape, (x.shape[1], 1))) * factor


def changes_its_argument(x: Tensor, factor: float) -> Tensor:
    return x.tanh_() * factor


def of_another_shape(x: Tensor, factor: float) -> Tensor:
    return (torch.tanh(x) * factor).T.contiguous()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (last_row_forgotten, r"on cpu, arguments as given: output 0 differs"),
        (blind_to_strides, r"arguments strided: output 0 differs"),
        (changes_its_argument, r"arguments as given: argument 0 was changed"),
        (of_another_shape, r"output 0 has the shape \(20, 33\), and its twin the shape \(33, 20\)"),
    ],
)
def test_a_broken_kernel_is_named(broken: Callable[[Tensor, float], Tensor], said: str) -> None:
    with pytest.raises(TrainfleetError, match=said):
        check_kernel(kernel_of(broken), X.clone(), 3.0)


def test_a_wrong_gradient_is_named() -> None:
    kernel = kernel_of()
    kernel.gradient(lambda gradient, output, x, factor: gradient * factor)
    with pytest.raises(TrainfleetError, match="the gradient of argument 0 differs"):
        check_kernel(kernel, X, 3.0)


def test_a_device_that_is_not_here_is_named(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, so nothing is missing")
    kernel = kernel_of()
    kernel.on("cuda")(lambda x, factor: x)
    with caplog.at_level(logging.WARNING, logger="trainfleet"):
        logging.getLogger("trainfleet").propagate = True
        check_kernel(kernel, X, 3.0)
    assert "There is no cuda here" in caplog.text
