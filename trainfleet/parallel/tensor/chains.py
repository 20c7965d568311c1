"""Find which convolutions of a model are split by the channels they give, which by those they take.

    x ──► convolution ──► norm, activation, pool, convolution by groups … ──► convolution ──► sum over ranks
          by what it gives         each rank its channels                     by what it takes

What comes between is known by its class. As with linear layers, a wrong guess costs time, never the result.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from trainfleet.parallel.tensor.layer import Layer, Region, layer_of

Link = tuple[str, Layer] | None
"""A convolution by its name, or None: something that is not known to work channel by channel."""

_FLAT_DROPOUTS = (nn.Dropout, nn.AlphaDropout)


def convolution_regions(model: nn.Module, size: int, left_whole: set[nn.Module]) -> list[Region]:
    """The smallest modules that hold a chain of convolutions, for `size` ranks; inner ones first."""
    found: list[Region] = []
    _links(model, "", size, left_whole, found)
    return found


def _links(module: nn.Module, name: str, size: int, left_whole: set[nn.Module], found: list[Region]) -> list[Link]:
    """The convolutions of `module` that found no partner in it, as they are called; regions in it are added."""
    if module in left_whole:
        return [None]
    if (layer := layer_of(module)) is not None:
        return [(name, layer)] if layer.is_convolution else [None]
    if (is_known := _keeps_channels(module, size)) is not None:
        return [] if is_known else [None]
    links: list[Link] = [None] if any(True for _ in module.parameters(recurse=False)) else []
    for key, child in module.named_children():
        links += _links(child, f"{name}.{key}" if name else key, size, left_whole, found)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # nobody knows in which order they are called
        return [None]
    pairs = paired(links, size)
    if pairs and not any(isinstance(inner, nn.SyncBatchNorm) for inner in module.modules()):
        columns = tuple(column for each, _ in pairs for column in each)
        found.append(Region(name=name, module=module, columns=columns, rows=tuple(row for _, row in pairs)))
    # A convolution with its norm and activation stands for itself; of more, none follows those outside.
    return links if len(links) < 2 and not pairs else [None]


def _keeps_channels(module: nn.Module, size: int) -> bool | None:
    """Whether `module` computes each channel by itself; None where that is for its children to say."""
    if isinstance(module, _BatchNorm):
        return not isinstance(module, nn.SyncBatchNorm)
    if isinstance(module, nn.GroupNorm):
        return module.num_groups % size == 0
    if isinstance(module, _InstanceNorm):
        return not module.track_running_stats
    if isinstance(module, _DropoutNd):
        return isinstance(module, _FLAT_DROPOUTS)
    return True if not any(True for _ in module.parameters()) else None


def paired(links: Sequence[Link], size: int) -> list[tuple[tuple[str, ...], str]]:
    """(split by what they give, split by what it takes) of convolutions that follow each other, for `size` ranks.

    One with groups goes between others, or first, where `size` divides its groups.
    """
    pairs: list[tuple[tuple[str, ...], str]] = []
    columns: list[str] = []
    width = 0
    for link in links:
        if link is None:
            columns = []
            continue
        name, layer = link
        follows = bool(columns) and layer.in_features == width
        if follows and layer.groups == 1:
            pairs.append((tuple(columns), name))
            columns = []
            continue
        divides = (layer.groups if layer.groups > 1 else layer.out_features) % size == 0
        columns = [*(columns if follows else []), name] if divides else []
        width = layer.out_features
    return pairs
