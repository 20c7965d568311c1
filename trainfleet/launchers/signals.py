"""SIGINT and SIGTERM as messages: who stays with a run passes them on, and has to finish its sentence first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def signals_to(tell: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `tell`; outside of the main thread they go where they went before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: tell()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
