"""Optimizers: which of torch's are right on shards, which are made right, and how a recipe names them.

FSDP2 hands an optimizer DTensors, of which each rank holds a piece. An update of each element by itself is
right on pieces; one that looks at the whole tensor (a norm, a factorisation, a line search) is not.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainfleet.errors import ConfigError, PlanError
from trainfleet.imports import load_object
from trainfleet.parallel.joined_optimizer import JoinedOptimizer
from trainfleet.parallel.muon import GatheredMuon
from trainfleet.parallel.spread import is_spread, spread_of
from trainfleet.plan import Plan

logger = logging.getLogger(__name__)

NamedParameters: TypeAlias = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What is known of one optimizer. Tests hold each against one process."""

    wrong_on_shards: str = ""
    """Why it fails or computes wrongly on shards; empty where it is right."""
    instead: str = ""
    """What to use there."""
    is_made_right: bool = False
    """`shard_safe` makes it right."""
    fused_on: tuple[str, ...] = ()
    """Devices where its fused kernel works."""
    fused_on_shards: bool = False
    """And whether it takes DTensors."""
    needs_closure: bool = False
    """Its step computes the loss again, several times."""


TABLE: dict[type[Optimizer], Standing] = {
    torch.optim.AdamW: Standing(fused_on=("cpu", "cuda"), fused_on_shards=True),
    torch.optim.Adam: Standing(fused_on=("cpu", "cuda"), fused_on_shards=True),
    torch.optim.SGD: Standing(fused_on=("cpu", "cuda")),
    torch.optim.Adagrad: Standing(fused_on=("cpu",)),
    torch.optim.RMSprop: Standing(),
    torch.optim.NAdam: Standing(),
    torch.optim.RAdam: Standing(),
    torch.optim.Adamax: Standing(),
    torch.optim.Adadelta: Standing(),
    torch.optim.ASGD: Standing(),
    torch.optim.Muon: Standing(wrong_on_shards="it orthogonalises whole matrices", is_made_right=True),
    torch.optim.Adafactor: Standing(wrong_on_shards="it takes means over whole rows and columns", instead="AdamW"),
    torch.optim.Rprop: Standing(wrong_on_shards="torch cannot run it on sharded tensors", instead="RMSprop"),
    torch.optim.LBFGS: Standing(
        wrong_on_shards="its line search needs all parameters in one vector", instead="AdamW", needs_closure=True
    ),
    torch.optim.SparseAdam: Standing(wrong_on_shards="sharded gradients are dense", instead="AdamW"),
}

SHORT_NAMES: dict[str, type[Optimizer]] = {
    cls.__name__.lower(): cls for cls in TABLE if cls not in (torch.optim.LBFGS, torch.optim.SparseAdam)
}


def check_optimizer(optimizer: Optimizer, plan: Plan) -> None:
    """PlanError, with what to use instead, if `optimizer` cannot work or computes wrongly under `plan`.

    An optimizer we do not know may shard: one warning says what it must fulfil and how to find out.
    """
    for part in optimizer.parts if isinstance(optimizer, JoinedOptimizer) else (optimizer,):
        _check(part, plan)


def _check(optimizer: Optimizer, plan: Plan) -> None:
    name, standing = type(optimizer).__name__, TABLE.get(type(optimizer))
    if standing is not None and standing.needs_closure and plan.precision == "fp16":
        raise PlanError(
            f"{name} computes the loss several times in a step, which fp16's loss scale does not survive. "
            "Set plan.precision to 'bf16' or 'fp32', or use AdamW."
        )
    if (plan.zero == 0 and plan.tp == 1) or isinstance(optimizer, GatheredMuon):
        return
    shards = f"plan.zero={plan.zero}" if plan.tp == 1 else f"plan.zero={plan.zero}, plan.tp={plan.tp}"
    without = "plan.zero=0" if plan.tp == 1 else "plan.zero=0 and plan.tp=1"
    if standing is None:
        logger.warning(
            "%s is not among the optimizers tested on shards (%s). It is right only if it updates each "
            "element by itself, without norms or shapes of whole tensors. `trainfleet verify` compares it with one "
            "process; %s needs no trust.",
            name,
            shards,
            without,
        )
    elif standing.is_made_right:
        raise PlanError(
            f"{name} is wrong on shards ({shards}): {standing.wrong_on_shards}. Make it right with "
            f"`optimizer = shard_safe(optimizer)` from trainfleet.parallel.optimizers, or set {without}."
        )
    elif standing.wrong_on_shards:
        raise PlanError(
            f"{name} does not work on shards ({shards}): {standing.wrong_on_shards}. "
            f"Use {standing.instead}, or set {without}."
        )
    elif not standing.fused_on_shards and any(map(_is_fused_on_shards, optimizer.param_groups)):
        raise PlanError(
            f"{name}(fused=True) does not work on shards ({shards}): torch has no such kernel for them. "
            f"Leave `fused` out, or set {without}."
        )


def _is_fused_on_shards(group: dict[str, Any]) -> bool:
    return bool(group.get("fused")) and any(isinstance(parameter, DTensor) for parameter in group["params"])


def shard_safe(optimizer: Optimizer) -> Optimizer:
    """The same optimizer, made right on shards where that can be done.

    Muon orthogonalises gathered matrices; groups that hold shards beside whole parameters are split for the step.
    """
    for part in optimizer.parts if isinstance(optimizer, JoinedOptimizer) else (optimizer,):
        if type(part) is torch.optim.Muon:
            part.__class__ = GatheredMuon
        elif type(part) in TABLE and any(len(_by_kind(group)) > 1 for group in part.param_groups):
            part.step = MethodType(_step_by_kind, part)  # type: ignore[method-assign]
    return optimizer


def _step_by_kind(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    """A step in which no kernel gets shards and whole tensors, or shards over different ranks, which torch refuses."""
    groups = self.param_groups
    self.param_groups = [kind for group in groups for kind in _by_kind(group)]
    try:
        return type(self).step(self, closure)  # type: ignore[arg-type]
    finally:
        self.param_groups = groups


def _by_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    kinds: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        kinds.setdefault(mesh, []).append(parameter)
    return [{**group, "params": parameters} for parameters in kinds.values()]


def build_optimizer(
    name: str, parameters: nn.Module | NamedParameters, lr: float, args: Mapping[str, Any] | None = None
) -> Optimizer:
    """The optimizer that a recipe names: a short name (`adamw`) or an import path, with its keyword arguments.

    Build it after `parallelize`. `weight_decay` is for matrices and kernels only: not for parameters of fewer than
    two dimensions, nor for norms and embeddings (known by their modules if `parameters` is the model, else by
    `embed` in the name), unless args hold `decay_all: true`. A fused kernel is used where torch has one. Muon takes
    the matrices that are decayed, AdamW (with the arguments under `adamw`) the rest, both at the rate `lr`.
    """
    args = dict(args or {})
    decay_all = bool(args.pop("decay_all", False))
    trained, special = _sort(parameters)
    whole = trained
    if isinstance(parameters, nn.Module) and is_spread(parameters) and (pipeline := spread_of(parameters).pipeline):
        # Every stage has the groups of the whole, if empty: a tied parameter is treated alike, and states agree.
        whole, special = _sort(pipeline.shadow.model)
    if not trained:
        raise ConfigError("There is no parameter that requires a gradient, so the optimizer has nothing to do.")
    if meta := [each for each, parameter in trained.items() if parameter.is_meta]:
        raise ConfigError(f"{meta[0]} is on the meta device. Materialise the model before you build its optimizer.")
    undecayed = set() if decay_all else special | {each for each, p in whole.items() if p.ndim < 2}
    make = _find(name)
    if make is not torch.optim.Muon:
        return _make(name, make, trained, whole, undecayed, lr, args)
    matrices = {each for each, p in whole.items() if p.ndim == 2 and each not in special}
    rest = {**({"weight_decay": args["weight_decay"]} if "weight_decay" in args else {}), **args.pop("adamw", {})}
    args.setdefault("adjust_lr_fn", "match_rms_adamw")  # so that one rate suits both
    parts = []
    if matrices:
        of_matrices = {each: p for each, p in trained.items() if each in matrices}
        parts.append(_make(name, make, of_matrices, matrices, set(), lr, args))
    if others := set(whole) - matrices:
        of_others = {each: p for each, p in trained.items() if each in others}
        parts.append(_make("adamw", torch.optim.AdamW, of_others, others, undecayed, lr, rest))
    return parts[0] if len(parts) == 1 else JoinedOptimizer(*parts)


def _find(name: str) -> Callable[..., Any]:
    if ":" in name:
        return load_object(name, key="optimizer.name")  # type: ignore[no-any-return]
    if name.lower() not in SHORT_NAMES:
        near = difflib.get_close_matches(name.lower(), SHORT_NAMES, n=1)
        raise ConfigError(
            f"optimizer.name is {name!r}, which is none of {', '.join(sorted(SHORT_NAMES))}."
            + (f" Did you mean {near[0]!r}?" if near else " Another is named by import path, 'package.module:Name'.")
        )
    return SHORT_NAMES[name.lower()]


def _make(
    name: str,
    make: Callable[..., Any],
    trained: Mapping[str, nn.Parameter],
    whole: Collection[str],
    undecayed: set[str],
    lr: float,
    args: dict[str, Any],
) -> Optimizer:
    """`whole` are the names over all stages of a pipeline, `trained` the parameters here."""
    known = _arguments(make)
    takes_any = not known or any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for arg in args:
        if arg == "lr":
            raise ConfigError("optimizer.args holds 'lr'; the rate is optimizer.lr. Set it there.")
        if arg == "params" or (arg not in known and not takes_any):
            near = difflib.get_close_matches(arg, known, n=1)
            raise ConfigError(
                f"optimizer.args holds {arg!r}, which {name} does not take. "
                + (f"Did you mean {near[0]!r}? " if near and near[0] != "params" else "")
                + f"It takes {', '.join(list(known)[2:])}; and decay_all."
            )
    args = {arg: tuple(value) if isinstance(value, list) else value for arg, value in args.items()}
    args |= _kernel(make, list(trained.values()), args)
    groups: list[dict[str, Any]] = [{"params": list(trained.values())}]
    if "weight_decay" in known and undecayed & set(whole):
        decayed = [{"params": [p for each, p in trained.items() if each not in undecayed]}]
        groups = decayed if set(whole) - undecayed else []
        groups += [{"params": [p for each, p in trained.items() if each in undecayed], "weight_decay": 0.0}]
    try:
        optimizer = make(groups, lr=lr, **args)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{name} refuses the arguments lr={lr}, {args}: {exc}. Correct optimizer.args.") from exc
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer.name is {name!r}, which makes a {type(optimizer).__name__}, not an Optimizer.")
    return shard_safe(optimizer)


def _arguments(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(make).parameters
    except ValueError:  # written in C, and says nothing of itself
        return {}


def _kernel(make: Callable[..., Any], parameters: list[nn.Parameter], args: Mapping[str, Any]) -> dict[str, bool]:
    """The fastest implementation torch has for these parameters, unless the arguments choose."""
    standing = TABLE.get(make) if isinstance(make, type) else None
    if standing is None or any(args.get(choice) is not None for choice in ("fused", "foreach", "differentiable")):
        return {}
    is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    devices = {parameter.device.type for parameter in parameters}
    is_real = all(parameter.is_floating_point() for parameter in parameters)
    if devices <= set(standing.fused_on) and is_real and (standing.fused_on_shards or not is_sharded):
        return {"fused": True}
    # DTensor costs some 20 us an operation and parameter; one operation on all saves two thirds of a step on a CPU.
    return {"foreach": True} if is_sharded and "foreach" in _arguments(make) else {}


def _sort(parameters: nn.Module | NamedParameters) -> tuple[dict[str, nn.Parameter], set[str]]:
    """The trainable parameters by name, each once; and which of them belong to norms and embeddings."""
    special: set[int] = set()
    if isinstance(parameters, nn.Module):
        for module in parameters.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in type(module).__name__.lower():
                special.update(id(parameter) for parameter in module.parameters(recurse=False))
        parameters = parameters.named_parameters()
    trained: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            trained[name] = parameter
            seen.add(id(parameter))
    return trained, {name for name, p in trained.items() if id(p) in special or "embed" in name.lower()}
