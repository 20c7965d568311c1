"""Gradients: those of a step as backward reaches tensors, and the first that is not finite.

A module is given each of its inputs through an identity of its own: the gradient there is what went through this
module, and not that of the tensor, which is the sum over all who read it.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainfleet.parallel.torch_private import without_torch_functions
from trainfleet.training.inspection.births import Frame
from trainfleet.training.inspection.values import Lines, Values, is_number, is_sound, lines_of, values_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """Whose tensor it is that a gradient arrives at."""

    kind: Literal["output", "input", "parameter", "loss"]
    module: str
    tensor: str
    frame: Frame | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BadGradient:
    """The first gradient of a step that was not finite on this rank."""

    claim: Claim
    values: Values
    lines: Lines
    at: int
    call: int
    """Of the model, so far; 0 where it is not called."""


class Gradients:
    """Looks at the gradients of a model's parameters, and of all tensors that somebody claims."""

    def __init__(self, model: nn.Module, tally: Callable[[str, Tensor], None] | None) -> None:
        """`tally(module, gradient)` gets those of the outputs of modules."""
        self._model, self._tally = model, tally
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._claims: dict[int, tuple[weakref.ref[Tensor], list[Claim]]] = {}
        self._hooked: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self._time = 0
        self._calls = 0
        self.first: BadGradient | None = None
        self.gives_up = False

    def open(self) -> None:
        for name, parameter in self._model.named_parameters():
            self._hook(name, parameter)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._claims.clear()

    def enter(self, name: str, module: nn.Module) -> None:
        """A module is called: what is sharded is another object while it is gathered."""
        self._calls += name == ""
        for own, parameter in module._parameters.items():
            if parameter is not None:
                self._hook(f"{name}.{own}".lstrip("."), parameter)

    def identity(self, tensor: Tensor, claim: Claim) -> Tensor:
        """What to give in place of `tensor`, so that the gradient through it is seen by itself."""
        if not tensor.requires_grad or not is_number(tensor):
            return tensor
        own: Tensor = torch.ops.aten.alias(tensor)
        self.claim(own, claim)
        return own

    def claim(self, tensor: Tensor, claim: Claim) -> None:
        """Look at the gradient of `tensor`; of several claims the last is nearest to where gradients come from."""
        if not tensor.requires_grad:
            return
        reference, claims = self._claims.get(id(tensor), (None, []))
        if reference is not None and reference() is tensor:
            claims.append(claim)
            return
        claims = [claim]
        self._claims[id(tensor)] = (weakref.ref(tensor), claims)
        tensor.register_hook(functools.partial(self._arrive, claims))  # type: ignore[no-untyped-call]

    def _hook(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.requires_grad and id(parameter) not in self._hooked:
            self._hooked.add(id(parameter))
            module, _, own = self._names.get(id(parameter), name).rpartition(".")
            arrive = functools.partial(self._arrive, [Claim("parameter", module, own, None)])
            self._handles.append(parameter.register_hook(arrive))  # type: ignore[no-untyped-call]

    def _arrive(self, claims: list[Claim], gradient: Tensor | None) -> None:
        if self.gives_up or gradient is None:
            return
        try:
            with without_torch_functions(), torch.no_grad():
                self._look(claims, gradient)
        except Exception:
            self.gives_up = True
            logger.warning("Looking at the gradients of this step failed; it is not looked at further.", exc_info=True)

    def _look(self, claims: list[Claim], gradient: Tensor) -> None:
        if self._tally is not None:
            for claim in claims:
                if claim.kind == "output":
                    self._tally(claim.module, gradient)
        self._time += 1
        if not self._is_wanted(claims[-1]) or not is_number(gradient) or is_sound(gradient):
            return
        self.first = BadGradient(
            claim=claims[-1],
            values=values_of(gradient),
            lines=lines_of(gradient),
            at=self._time,
            call=self._calls,
        )

    def _is_wanted(self, claim: Claim) -> bool:
        """The first; where that is of a parameter, then of the same module's input, which tells the samples."""
        first = self.first.claim if self.first is not None else None
        if first is None:
            return True
        return first.kind == "parameter" and claim.kind == "input" and claim.module == first.module
