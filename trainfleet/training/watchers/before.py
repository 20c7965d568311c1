"""Before: what a step changes beside parameters and gradients, as it was before the step.

A bad batch reaches the running statistics of a BatchNorm in the forward, before anybody has seen the loss. They would
stay poisoned for ever, and evaluations with them, though the weights were spared. And a step that is run again must
meet what it met.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.parallel.layout import piece_of
from trainfleet.parallel.torch_private import eagerly
from trainfleet.training.watchers.watcher import Watcher

_Held: TypeAlias = "tuple[Tensor, Tensor] | None"
"""A buffer and a copy of its values; None where there was no buffer."""


class Before(Watcher):
    """Copies buffers, and the generators of `random` and NumPy, before each step; puts them back if it is given up or
    run again.

    Parameters are then still those before, and torch's random numbers a function of the step. With `whole` all buffers
    are copied, so that any step can be given up; else those that some step was seen to change, and all before the
    first. Generators are copied as long as steps draw from them: that alone takes 60 microseconds.
    """

    def __init__(self, model: nn.Module, *, whole: bool = False) -> None:
        self.model = model
        self._whole = whole
        self._places: list[tuple[str, dict[str, Tensor | None], str]] | None = None
        self._versions: list[tuple[Tensor | None, int]] = []
        """By place, the buffer and the count of its changes."""
        self._changing: set[int] | None = None
        """Places whose buffers some step has changed; None before the first step, when nobody knows."""
        self._copies: dict[int, _Held] = {}
        self._draws = True
        self._generators: tuple[Any, Any] | None = None

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        now = self._buffers()
        wanted = range(len(now)) if self._whole else self._seen_to_change(now)
        self._copies = {i: self._copied(i, now[i]) for i in wanted}
        self._versions = [(buffer, _version(buffer)) for buffer in now]
        if self._draws:
            before, self._generators = self._generators, _generators()
            self._draws = before is None or not _are_equal(before, self._generators)

    def give_up(self) -> None:
        self._put(self._copies)

    def close(self) -> None:
        self._copies, self._versions = {}, []

    def late(self) -> list[str]:
        """Buffers that the step has changed and that were not copied before it, for none before it had."""
        now = self._buffers()
        return [
            self._found()[i][0]
            for i, (was, version) in enumerate(self._versions)
            if i not in self._copies and (now[i] is not was or _version(was) != version)
        ]

    @contextmanager
    def again(self) -> Iterator[bool]:
        """Buffers and generators as they were before the step, and afterwards as they were after it.

        Gives whether modules that are compiled run as they were written, so that what is inside of them can be seen.
        """
        after = {i: _copied(buffer) for i, buffer in enumerate(self._buffers())}
        generators, of_torch = _generators(), torch.get_rng_state()
        on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._put(self._copies)
        if self._draws and self._generators is not None:
            _set_generators(self._generators)
        try:
            with eagerly(self.model) as is_compiled:
                yield is_compiled
        finally:
            self._put(after)
            _set_generators(generators)
            torch.set_rng_state(of_torch)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device)

    def _found(self) -> list[tuple[str, dict[str, Tensor | None], str]]:
        """(name, where it is held, under which key) of each buffer; to walk through all modules takes 0.1 ms."""
        if self._places is None:
            self._places = [
                (f"{path}.{name}".lstrip("."), module._buffers, name)
                for path, module in self.model.named_modules()
                for name in module._buffers
            ]
        return self._places

    def _buffers(self) -> list[Tensor | None]:
        return [buffers.get(name) for _, buffers, name in self._found()]

    def _seen_to_change(self, now: Sequence[Tensor | None]) -> set[int]:
        if not self._versions:
            return set(range(len(now)))
        seen = {i for i, (was, version) in enumerate(self._versions) if now[i] is not was or _version(was) != version}
        if self._changing is None:  # batch normalisation changes its statistics and no version
            seen |= {i for i, held in self._copies.items() if not _holds(now[i], held)}
        self._changing = (self._changing or set()) | seen
        return self._changing

    def _copied(self, place: int, buffer: Tensor | None) -> _Held:
        """In the memory of the copy before, where it fits."""
        held = self._copies.get(place)
        if held is None or buffer is None or not _are_alike(held[1], buffer):
            return _copied(buffer)
        with torch.no_grad():
            return buffer, held[1].copy_(buffer)

    @torch.no_grad()
    def _put(self, copies: dict[int, _Held]) -> None:
        """In place, for others may hold a buffer; and only where it differs, for what is written counts as changed."""
        for i, held in copies.items():
            _, buffers, name = self._found()[i]
            if held is None:
                buffers[name] = None
            elif not _holds(buffers.get(name), held):
                buffer, copy = held
                buffers[name] = buffer.copy_(copy) if _are_alike(buffer, copy) else copy.clone()


def _copied(buffer: Tensor | None) -> _Held:
    return None if buffer is None else (buffer, buffer.detach().clone())


def _version(buffer: Tensor | None) -> int:
    return 0 if buffer is None else buffer._version


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Under a plan a buffer may be a plain tensor at one step and a DTensor at the next."""
    kinds = type(one) is type(other) and one.dtype == other.dtype and one.device == other.device
    return kinds and one.shape == other.shape


def _holds(now: Tensor | None, held: _Held) -> bool:
    """Whether it is the same tensor with the same bits."""
    if now is None or held is None:
        return now is None and held is None
    buffer, copy = held
    if now is not buffer or not _are_alike(now, copy):  # another, or resized in place
        return False
    ours, theirs = piece_of(now), piece_of(copy)
    return bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())


def _generators() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_generators(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])


def _are_equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    (_, ours, *rest), (_, theirs, *others) = one[1], other[1]
    return one[0] == other[0] and rest == others and bool((ours == theirs).all())
