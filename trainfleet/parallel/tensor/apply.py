"""split_layers: cut the parameters of regions over tensor-parallel ranks, and let them compute on pieces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from trainfleet.parallel.layout import is_sharded
from trainfleet.parallel.tensor.find import find_regions, named
from trainfleet.parallel.tensor.layer import Region, layer_of
from trainfleet.parallel.tensor.region import keeping_logits, on_pieces
from trainfleet.parallel.tensor.vocabulary import vocabulary_regions
from trainfleet.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """What tensor parallelism did to a model."""

    regions: tuple[str, ...]
    """The modules whose linear layers are split."""
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    whole: tuple[str, ...]
    """Modules with parameters of their own that every tensor-parallel rank holds and computes whole."""
    split_share: float
    """The part of all parameters that is split."""
    sources: tuple[str, ...] = ("structure",)
    """From where it is known how to split them."""
    logits: DeviceMesh | None = None
    """Over what the logits lie in pieces where the loss is computed; None where heads give them whole."""

    def compute(self, compute: Callable[[Any], Any], batch: Any) -> Any:
        """`compute(batch)`, of the model and its loss, on logits in pieces if they are."""
        return compute(batch) if self.logits is None else keeping_logits(compute, batch, self.logits)

    def __str__(self) -> str:
        kept = f"; whole on each: {_few(self.whole)}" if self.whole else ""
        told = f"{_few(self.regions)} (from {', '.join(self.sources)})"
        return f"{100 * self.split_share:.0f} % of the parameters are split, in {told}{kept}"


def _few(names: Sequence[str]) -> str:
    shown = [name or "the model" for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def split_model(model: nn.Module, mesh: DeviceMesh, plan: Plan) -> Split:
    """`split_layers` as `plan` says."""
    return split_layers(
        model,
        mesh,
        plan.tp_whole,
        plan.entry_points,
        columns=plan.tp_columns,
        rows=plan.tp_rows,
        vocabulary=plan.tp_vocabulary,
    )


def split_layers(
    model: nn.Module,
    mesh: DeviceMesh,
    whole: Sequence[str] = (),
    entry_points: Sequence[str] = (),
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    vocabulary: bool = False,
) -> Split:
    """Split the linear layers of `model` over `mesh` (one axis), in place; all ranks hold equal parameters before.

    Raises PlanError before anything is changed where that cannot be.
    """
    regions = find_regions(model, mesh.size(), whole, columns=columns, rows=rows)
    of_tokens = vocabulary_regions(model, mesh.size(), regions, named(model, whole)) if vocabulary else []
    return split_regions(model, mesh, regions, of_tokens, entry_points)


def split_regions(
    model: nn.Module,
    mesh: DeviceMesh,
    regions: Sequence[Region],
    of_tokens: Sequence[Region] = (),
    entry_points: Sequence[str] = (),
) -> Split:
    """Split the layers of `regions`, and embeddings and heads by tokens; the heads' logits stay in pieces."""
    heads = {region.module for region in of_tokens if region.columns}
    regions = [*(region for region in regions if region.module not in heads), *of_tokens]
    _cut_parameters(model, regions, mesh)
    for region in regions:
        calls = ("forward", *entry_points) if region.module is model else ("forward",)
        for call in calls:
            setattr(
                region.module,
                call,
                on_pieces(getattr(region.module, call), region.name, mesh, is_head=region.module in heads),
            )
    split = _described(model, regions, mesh if heads else None)
    logger.info("Tensor parallel over %d ranks: %s.", mesh.size(), split)
    return split


def _cut_parameters(model: nn.Module, regions: Sequence[Region], mesh: DeviceMesh) -> None:
    placements = _placements(model, regions)
    made: dict[int, nn.Parameter] = {}
    for region in regions:
        for module in region.module.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or isinstance(parameter, DTensor):
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = _cut(parameter, placements.get(id(parameter), Replicate()), mesh)
                module._parameters[name] = made[id(parameter)]
    for module in model.modules():  # what stands for a module of another stage may hold a tied one
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in made:
                module._parameters[name] = made[id(parameter)]


def _placements(model: nn.Module, regions: Sequence[Region]) -> dict[int, Placement]:
    """How each parameter of a split layer lies, by its id; a row's bias is added once, so it stays whole."""
    found: dict[int, Placement] = {}
    for region in regions:
        if isinstance(region.module, nn.Embedding):
            found[id(region.module.weight)] = Shard(0)
        for name in (*region.columns, *region.rows):
            module = model.get_submodule(name)
            layer = layer_of(module)
            assert layer is not None
            is_column = name in region.columns
            found |= {id(parameter): Shard(0) for parameter in module.parameters() if is_column}
            found[id(module.weight)] = Shard(layer.split_dim(is_column=is_column))
    return found


def _cut(parameter: nn.Parameter, placement: Placement, mesh: DeviceMesh) -> nn.Parameter:
    whole = parameter.detach()
    piece = whole
    if isinstance(placement, Shard):
        length = whole.shape[placement.dim] // mesh.size()
        # A copy, or the memory of the whole would stay.
        piece = whole.narrow(placement.dim, mesh.get_local_rank() * length, length).clone(
            memory_format=torch.contiguous_format
        )
    array = DTensor.from_local(piece, mesh, [placement], run_check=False)
    cut = nn.Parameter(array, requires_grad=parameter.requires_grad)
    cut.__dict__.update(parameter.__dict__)
    return cut


def _described(model: nn.Module, regions: Sequence[Region], logits: DeviceMesh | None) -> Split:
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    numbers = [(p.numel(), isinstance(p, DTensor) and p.placements[0].is_shard()) for p in parameters]
    inside = {module for region in regions for module in region.module.modules()}
    return Split(
        regions=tuple(region.name for region in regions),
        columns=tuple(name for region in regions for name in region.columns),
        rows=tuple(name for region in regions for name in region.rows),
        whole=tuple(
            name
            for name, module in model.named_modules()
            if module not in inside and any(True for _ in module.parameters(recurse=False))
        ),
        logits=logits,
        sources=tuple(dict.fromkeys(region.source for region in regions)),
        split_share=sum(number for number, is_split in numbers if is_split) / sum(number for number, _ in numbers),
    )


def settle_gradients(model: nn.Module) -> None:
    """Let the gradient of each split or copied parameter lie as the parameter does, as soon as backward has it.

    A copy that met pieces gets a part of its gradient on each rank; those are summed. FSDP2 does so by itself.
    """
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and not is_sharded(parameter) and parameter.requires_grad:
            parameter.register_hook(_settled(parameter.placements))  # type: ignore[no-untyped-call]


def _settled(placements: Sequence[Placement]) -> Callable[[Tensor], Tensor]:
    def settle(gradient: Tensor) -> Tensor:
        assert isinstance(gradient, DTensor)
        if tuple(gradient.placements) == tuple(placements):
            return gradient
        return gradient.redistribute(placements=placements)

    return settle
