"""Which functions of torch compute on pieces; every other is computed whole on each rank.

torch 2.13 splits many more, and some of them wrongly: the values of `logcumsumexp`, the gradients of `mse_loss` and
`amax`. These have been held against the whole, values and gradients (tests/parallel/tensor/test_functions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_BINARY = ("add", "sub", "mul", "div", "truediv", "matmul", "pow", "and", "or", "eq", "ne", "lt", "le", "gt", "ge")

BY_ELEMENT = frozenset(
    {
        *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "neg", "abs", "square", "pow"),
        *("exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "erf", "clamp", "clamp_min", "clamp_max"),
        *("sigmoid", "tanh", "relu", "gelu", "silu", "mish", "softplus", "leaky_relu", "elu"),
        *("selu", "celu"),
        *("where", "masked_fill", "minimum", "maximum"),
        *("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or"),
        *("to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach"),
        *("add_", "sub_", "mul_", "div_", "neg_", "relu_", "masked_fill_", "clamp_"),
        *("__neg__", "__invert__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
        *(f"__{name}__" for name in _BINARY),
        *(f"__r{name}__" for name in _BINARY),
    }
)
SHAPED = frozenset(
    {
        *("view", "reshape", "unflatten", "flatten", "transpose", "permute", "movedim", "swapaxes", "swapdims", "t"),
        *("unsqueeze", "squeeze", "expand", "expand_as", "narrow", "select", "cat", "stack", "repeat_interleave"),
    }
)
PRODUCTS = frozenset({"linear", "matmul", "bmm", "mm", "baddbmm", "addmm", "einsum"})
REDUCED = frozenset({"softmax", "log_softmax", "layer_norm", "rms_norm", "sum", "mean"})
ASKED = frozenset(
    {
        *("__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "__len__"),
        *(
            "is_floating_point",
            "is_complex",
            "element_size",
            "storage_offset",
            "__hash__",
            "register_hook",
            "requires_grad_",
        ),
    }
)
"""They tell something of a tensor without its numbers; `__get__` is that of its properties."""

ON_PIECES = BY_ELEMENT | SHAPED | PRODUCTS | REDUCED | ASKED


def splits(called: str, args: Sequence[Any]) -> bool:
    """Whether a function of this name computes on pieces; the index of a tensor does if it holds no tensor."""
    if called == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(each is None or isinstance(each, int | slice | EllipsisType) for each in index)
    return called in ON_PIECES


def chunk(mesh: DeviceMesh, whole: Callable[..., Any], input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """As torch's; the backward of its own fails on pieces where one of the parts is not used."""
    length = -(-input.shape[dim] // chunks)
    return split(mesh, whole, input, length, dim)


def split(
    mesh: DeviceMesh, whole: Callable[..., Any], tensor: Tensor, split_size_or_sections: Any, dim: int = 0, **more: Any
) -> tuple[Tensor, ...]:
    """As torch's, part by part."""
    size = more.get("split_size", split_size_or_sections)
    end = tensor.shape[dim]
    lengths = size if isinstance(size, list | tuple) else [min(size, end - start) for start in range(0, end, size)]
    if (isinstance(size, int) and size <= 0) or sum(lengths) != end:
        return whole(tensor, size, dim)  # type: ignore[no-any-return]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(tensor.narrow(dim, start, length) for start, length in zip(starts, lengths))


def unbind(mesh: DeviceMesh, whole: Callable[..., Any], input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """As torch's, part by part."""
    return tuple(input.select(dim, i) for i in range(input.shape[dim]))


def iterate(mesh: DeviceMesh, whole: Callable[..., Any], tensor: Tensor) -> Any:
    """What `for` and unpacking see."""
    return iter(unbind(mesh, whole, tensor))
