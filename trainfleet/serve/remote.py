"""RemoteModel: a model on other hosts that answers for batches of this one."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType

from trainfleet.batch import Batch, batch_size
from trainfleet.errors import ConfigError, TrainfleetError
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.frames import Limits
from trainfleet.net.peers import Ways
from trainfleet.net.token import Token
from trainfleet.serve.offer import Offer
from trainfleet.serve.respondent import Question
from trainfleet.serve.respondents import Respondents
from trainfleet.serve.session import weight_of
from trainfleet.serve.terms import Answer, Terms


class RemoteModel:
    """An `Answering` over any number of GPU services: batches are answered by whichever is free, in order, once each.

        with RemoteModel(["gpu-0:7800", "gpu-1:7800"]) as model:
            print(validate(model, batches))

    An answer is a pure function of weights, batch and terms. So a service that dies, hangs or is cut off loses
    nothing: its batches are asked of the others, or of itself when it is back. All must have the same weights, and a
    batch is not to be changed after it was given.

    services      addresses or tokens; any number, and those that come later count too
    listen        where services connect to, if they cannot be called
    via           token of a relay, if neither side can be reached
    window_bytes  of batches and answers that may wait here; batches are read no further ahead
    nearby        batches for services on this host go through shared memory
    timeout       how long to wait while no service is there, or none comes any further

    Raises PeerError when no service is there in time, NotAdmitted for wrong credentials or other weights, ConfigError
    for addresses that cannot be; and what a batch met there: DataError, ConfigError, OutOfMemory.
    """

    def __init__(
        self,
        services: Sequence[str | Address | Token] | str | Address | Token = (),
        *,
        listen: str | Address | None = None,
        via: Token | str | None = None,
        credentials: Credentials | None = None,
        window_bytes: int = 1 << 28,
        limits: Limits | None = None,
        nearby: bool = True,
        timeout: timedelta = timedelta(minutes=2),
    ) -> None:
        places = [services] if isinstance(services, str | Address | Token) else list(services)
        if not places and listen is None and via is None:
            raise ConfigError("RemoteModel needs services to call, an address to listen at, or a relay.")
        if window_bytes < 1 or timeout <= timedelta(0):
            raise ConfigError(f"window_bytes={window_bytes} and timeout={timeout}; both must be more than nothing.")
        ways = Ways(
            places=places,
            listen=listen,
            via=via,
            credentials=credentials,
            limits=limits,
            nearby=nearby,
        )
        self.services = Respondents(ways, timeout=timeout, window_bytes=window_bytes)
        """Those who answer, with what they have done so far."""
        self._tasks = itertools.count()
        self._is_answering = False

    @property
    def offer(self) -> Offer:
        """What the first service said of its model. Waits for it."""
        return self.services.offer()

    @property
    def digest(self) -> str:
        """Of the weights. Waits for the first service."""
        return self.offer.digest

    def answers(self, batches: Iterable[Batch], terms: Terms) -> Iterator[Answer]:
        """One for each batch, in order. Batches are taken as far ahead as `window_bytes` goes, on the caller's thread.

        What a batch met is raised in its turn, with its rows; the model can be asked again afterwards.
        """
        if self._is_answering:
            raise ConfigError("This RemoteModel is answering for other batches. Finish them first, or open another.")
        self._is_answering = True
        try:
            yield from self._answers(iter(batches), terms)
        finally:
            self._is_answering = False
            self.services.forget()

    def _answers(self, batches: Iterator[Batch], terms: Terms) -> Iterator[Answer]:
        asked: deque[tuple[int, int]] = deque()  # tasks and rows of batches whose answers have not been taken
        row, ended = 0, False
        while True:
            while not ended and self.services.wants_more and not (asked and self.services.has(asked[0][0])):
                batch = next(batches, None)
                if batch is None:
                    ended = True
                    break
                task = next(self._tasks)
                asked.append((task, batch_size(batch)))
                self.services.submit(task, Question(batch, terms, weight_of(batch)))
                del batch
            if not asked:
                return
            task, rows = asked.popleft()
            answer = self.services.receive(task)
            if isinstance(answer, TrainfleetError):
                raise type(answer)(f"Rows {row} to {row + rows - 1}: {answer}", hint=answer.hint)
            yield answer
            row += rows

    def close(self) -> None:
        """End all connections. May be called twice."""
        self.services.close()

    def __enter__(self) -> RemoteModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
