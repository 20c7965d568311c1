"""Linear layers however their classes keep them, convolutions, and the regions in which they are split."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

_LISTS = (nn.ModuleList, nn.ModuleDict)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: y = x W + b, however its class keeps W; or a convolution, whose features are channels."""

    in_features: int
    out_features: int
    out_dim: int
    """The dimension of the weight that has the output features."""
    groups: int = 1
    """Of a convolution: into how many parts its channels are divided, which know nothing of each other."""
    is_convolution: bool = False

    def split_dim(self, *, is_column: bool) -> int:
        """The dimension along which the weight is cut, by output (column) or input features; 0 has the groups."""
        return 0 if self.groups > 1 else self.out_dim if is_column else 1 - self.out_dim


def layer_of(module: nn.Module) -> Layer | None:
    """`module` as a linear layer, or None: nn.Linear, whose weight is [out, in], or the Conv1D of transformers,
    whose weight is [in, out]; or as a convolution of torch."""
    if "forward" in vars(module):
        return None
    if type(module) is nn.Linear:
        return Layer(module.in_features, module.out_features, 0)
    if type(module) in _CONVOLUTIONS and isinstance(module._parameters.get("weight"), nn.Parameter):
        assert isinstance(module, _ConvNd)
        return Layer(module.in_channels, module.out_channels, int(module.transposed), module.groups, True)
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.ndim == 2:
        return Layer(weight.shape[0], weight.shape[1], 1)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A module that takes and gives whole tensors, and whose linear layers or convolutions are split."""

    name: str
    module: nn.Module
    columns: tuple[str, ...]
    """Layers split by output features, by their names in the model; convolutions with groups by those."""
    rows: tuple[str, ...]
    """Those split by input features; a sum over ranks follows each."""
    source: str = "structure"
    """From where it is known how these layers are split."""


def called_by(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The modules that `module` calls itself: its children, and those of its lists."""
    called: list[tuple[str, nn.Module]] = []
    for key, child in module.named_children():
        child_name = f"{name}.{key}" if name else key
        called += called_by(child, child_name) if isinstance(child, _LISTS) else [(child_name, child)]
    return called


def is_in_list(module: nn.Module, child: nn.Module) -> bool:
    """Whether `module` calls `child` as one of a list that it has."""
    return child not in set(module.children())
