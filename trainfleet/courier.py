"""Somebody else's function, called in a thread beside the loop, which waits for it no longer than a deadline.

To the function it looks as if the loop called it: one call after the other, with the loop's context variables, grad
mode and CUDA device, and what it raises is raised in the loop. Only a function that never returns is left behind.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trainfleet.imports import imported

_LAST_WORDS_SECONDS = 1.0
"""For what a thread that is to be left behind is telling the loop's own observers in that moment."""


class Blocked(Exception):
    """A call did not return in time; `callers` are those that it was made for, the innermost last."""

    def __init__(self, callers: tuple[object, ...]) -> None:
        super().__init__("a call did not return before its deadline")
        self.callers = callers


class NotHeard(Exception):
    """Raised in a thread that was left behind, where it wants to tell the loop something."""


@dataclass(slots=True)
class _Call:
    function: Callable[[], None]
    caller: object
    modes: _Modes | None
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    under_way: threading.Lock = field(default_factory=threading.Lock)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.under_way.acquire()


class Courier:
    """One daemon thread that makes calls in turn. It starts with the first call, and is never waited for at the end."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._callers: list[object] = []
        self._began = time.monotonic()
        self._speaking = threading.RLock()
        self._left_behind = False
        threading.Thread(target=self._make_calls, daemon=True, name="observers").start()

    @property
    def is_usable(self) -> bool:
        """False once it was left behind, and in a forked process, which has no such thread."""
        return not self._left_behind and self.process == os.getpid()

    def call(self, function: Callable[[], None], *, caller: object, deadline_seconds: float) -> None:
        """Have `function` called; raises what it raises, and Blocked after the deadline.

        After Blocked the thread is left behind with whatever it is about. It may be that of an earlier call, where
        the wait for that was interrupted; then `function` has not been called.
        """
        call = _Call(function, caller, _modes())
        self._calls.put(call)
        remaining = deadline_seconds
        while not call.under_way.acquire(timeout=min(remaining, threading.TIMEOUT_MAX)):
            remaining = deadline_seconds - (time.monotonic() - self._began)
            if remaining <= 0:
                is_silent = self._speaking.acquire(timeout=_LAST_WORDS_SECONDS)
                self._left_behind = True
                if is_silent:
                    self._speaking.release()
                raise Blocked(tuple(self._callers))
        if call.error is not None:
            error, call.error = call.error, None
            raise error

    def end(self) -> None:
        """Let the thread end after the calls that it has."""
        self._calls.put(None)

    @contextmanager
    def calling(self, caller: object) -> Iterator[None]:
        """Around each call in this thread: `caller` is the innermost of those it was made for. NotHeard as below."""
        if self._left_behind:
            raise NotHeard
        self._callers.append(caller)
        try:
            yield
        finally:
            self._callers.pop()

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Around what a call does to the loop's own things, for which the loop waits; NotHeard if it waits no more."""
        with self._speaking:
            if self._left_behind:
                raise NotHeard
            yield

    def _make_calls(self) -> None:
        _this_thread.courier = self
        while not self._left_behind and (call := self._calls.get()) is not None:
            self._began = time.monotonic()
            try:
                with self.calling(call.caller), _held(call.modes):
                    call.context.run(call.function)
            except BaseException as error:  # raised where it is waited for
                call.error = error
            call.under_way.release()
            del call  # an idle thread keeps nobody's things alive


_this_thread = threading.local()


def current() -> Courier | None:
    """The courier whose thread this is."""
    courier: Courier | None = getattr(_this_thread, "courier", None)
    return courier


@dataclass(frozen=True, slots=True)
class _Modes:
    """What torch keeps for each thread on its own."""

    grad: bool
    inference: bool
    cuda_device: int | None


def _modes() -> _Modes | None:
    torch: Any = imported("torch")
    if torch is None:
        return None
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return _Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), device)


@contextmanager
def _held(modes: _Modes | None) -> Iterator[None]:
    """The modes in this thread, which is ours: nothing has to be put back but inference mode."""
    if modes is None:
        yield
        return
    torch: Any = imported("torch")
    if modes.cuda_device is not None and torch.cuda.current_device() != modes.cuda_device:
        torch.cuda.set_device(modes.cuda_device)
    if modes.inference:
        with torch.inference_mode():
            yield
        return
    if torch.is_grad_enabled() != modes.grad:
        torch.set_grad_enabled(modes.grad)
    yield
