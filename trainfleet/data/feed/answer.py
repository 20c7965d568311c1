"""What a feeder answers and offers, checked before it counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainfleet.data.feed.terms import Offer
from trainfleet.data.samples import Made
from trainfleet.data.waits import Way
from trainfleet.errors import DataError, PeerError
from trainfleet.net.channel import Message


def parsed_answer(message: Message) -> tuple[int, Made | Exception]:
    """The number of a task, and the batch or the error that came of it; PeerError for what is no answer."""
    head = message.head
    task = head.get("task")
    if type(task) is not int:
        raise PeerError("A feeder answered without the number of a task.")
    if message.kind == "failed":
        error, hint = head.get("error"), head.get("hint")
        return task, DataError(str(error)[:4000], hint=hint[:1000] if isinstance(hint, str) else None)
    skipped = head.get("skipped")
    if not isinstance(skipped, list) or not all(_is_skip(each) for each in skipped):
        raise PeerError("A feeder told of bad samples in words that are none.")
    return task, Made(message.body, tuple((each[0], each[1]) for each in skipped))


def timed(made: Made | Exception, message: Message, seconds: float, num_bytes: int) -> Made | Exception:
    """`made` with what its feeder and we have measured; `seconds`: since it was asked for."""
    if isinstance(made, Exception):
        return made
    told = message.head.get("seconds")
    if told is None:
        return replace(made, num_bytes=num_bytes)
    if not isinstance(told, list) or len(told) != 4 or not all(_is_time(each) for each in told):
        raise PeerError("A feeder told of its time in words that are none.")
    source, transform, queued, outbox = told
    way = Way(queued, outbox, max(0.0, seconds - sum(told)))
    return replace(made, spent=(source, transform), way=way, num_bytes=num_bytes)


def _is_time(each: Any) -> bool:
    return type(each) is float and 0 <= each < 1e9


def _is_skip(each: Any) -> bool:
    return isinstance(each, list) and len(each) == 2 and type(each[0]) is int and isinstance(each[1], str)


def difference_of(name: str, theirs: dict[str, Offer], ours: dict[str, Offer]) -> str | None:
    """A sentence about the first stream whose samples differ. Size and order are what the trainer asks for."""
    for stream in sorted(set(theirs) | set(ours)):
        one, other = theirs.get(stream), ours.get(stream)
        if one is None or other is None:
            return f"Feeder {name} {'has no' if one is None else 'has a'} stream {stream!r}, unlike those before it."
        if one.samples != other.samples:
            return (
                f"Feeder {name} has {one.samples} samples ({one.source}) for {stream}, and those before it have "
                f"{other.samples} ({other.source}). Give all feeders the same data."
            )
        if one.digest != other.digest:
            return (
                f"Feeder {name} makes other samples for {stream} than those before it: its first, middle or last "
                "sample differs, or its transform, or what is held out. Give all feeders the same data and code."
            )
    return None
