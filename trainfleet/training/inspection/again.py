"""Again: the same step a second time, before anything was updated, as if it were the first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.loss import LossSum
from trainfleet.parallel import Engine
from trainfleet.parallel.torch_private import eagerly
from trainfleet.training.inspection.values import local

StepFunction: TypeAlias = Callable[[Engine, Sequence[Batch]], LossSum]


class Again:
    """Knows what a forward changes beside gradients, so that a step can be run again as it was.

    Parameters are still those before, and torch's random numbers a function of the step. What is left are buffers, such
    as running statistics, and the generators of `random` and NumPy. They are copied before each step if some step was
    seen to change them, and before the first (of buffers: all): to copy the generators alone takes 60 microseconds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: list[tuple[str, dict[str, Tensor | None], str]] = []
        self._versions: dict[str, tuple[Tensor, int]] = {}
        self._changing: set[str] | None = None
        """Names of buffers that some step has changed; None before the first step, when nobody knows."""
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}
        """By name, the buffer and what it held."""
        self._draws = True
        self._generators: tuple[Any, Any] | None = None

    def remember(self) -> None:
        """Before a step: copy what it will change."""
        if not self._places:  # walking through all modules takes a tenth of a millisecond
            self._places = [
                (f"{name}.{key}".lstrip("."), module._buffers, key)
                for name, module in self._model.named_modules()
                for key in module._buffers
            ]
        buffers = self._buffers()
        if self._versions:
            seen = {n for n, (was, version) in self._versions.items() if _changed(buffers.get(n), was, version)}
            if self._changing is None:  # batch normalisation changes its statistics and no version
                seen |= {n for n, (_, was) in self._copies.items() if not _same(buffers.get(n), was)}
            self._changing = (self._changing or set()) | seen
        self._versions = {name: (buffer, buffer._version) for name, buffer in buffers.items()}
        wanted = buffers if self._changing is None else self._changing & buffers.keys()
        self._copies = {name: (buffers[name], buffers[name].detach().clone()) for name in wanted}
        if self._draws:
            before, self._generators = self._generators, _generators()
            self._draws = before is None or not _are_equal(before, self._generators)

    def _buffers(self) -> dict[str, Tensor]:
        found = ((name, held.get(key)) for name, held, key in self._places)
        return {name: buffer for name, buffer in found if buffer is not None}

    @torch.no_grad()
    def _put(self, copies: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, held, key in self._places:
            if name in copies:
                buffer, value = copies[name]
                held[key] = buffer.copy_(value)

    def late(self) -> list[str]:
        """Buffers that the step has changed and that were not copied before it, for none before it had."""
        now = self._buffers()
        return [
            name
            for name, (was, version) in self._versions.items()
            if name not in self._copies and _changed(now.get(name), was, version)
        ]

    @contextmanager
    def as_before(self) -> Iterator[bool]:
        """Buffers and generators as they were before the step, and afterwards as they were after it.

        Gives whether modules that are compiled run as they were written, so that what is inside of them can be seen.
        """
        after = {name: (buffer, buffer.detach().clone()) for name, buffer in self._buffers().items()}
        generators, of_torch = _generators(), torch.get_rng_state()
        on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._put(self._copies)
        if self._draws and self._generators is not None:
            _set_generators(self._generators)
        try:
            with eagerly(self._model) as is_compiled:
                yield is_compiled
        finally:
            self._put(after)
            _set_generators(generators)
            torch.set_rng_state(of_torch)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device)


def _generators() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_generators(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])


def _are_equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    (_, ours, *rest), (_, theirs, *others) = one[1], other[1]
    return one[0] == other[0] and rest == others and bool((ours == theirs).all())


def _same(now: Tensor | None, was: Tensor) -> bool:
    if now is None:
        return False
    ours, theirs = local(now), local(was)  # code that runs on pieces may have made pieces of it
    if ours.shape != theirs.shape:
        return False
    return bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())


def _changed(now: Tensor | None, was: Tensor, version: int) -> bool:
    return now is not was or now._version != version
