"""The settings of a trainer that is fed: `data.args` where `data.source` is `remote`."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainfleet.comm.environment import RankEnvironment
from trainfleet.config import load_config
from trainfleet.data.feed.remote import RemoteBatches
from trainfleet.errors import ConfigError
from trainfleet.imports import load_object
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.tls import Certificates

logger = logging.getLogger(__name__)

NOT_KEPT = "(token)"
"""Stands for a token in what a run writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedConfig:
    """Where feeders are, or where they come to, and what a rank keeps of what they send."""

    feeders: tuple[str, ...] = ()
    """Addresses or tokens of data services."""
    listen: str | None = None
    """HOST:PORT where feeders connect to, in place of `feeders`. Each rank of a host listens at ports of its own."""
    certificates: str | None = None
    """Folder with ca.pem, certificate.pem and key.pem, in place of a token."""
    identity: str | None = None
    """Folder that keeps the identity and the secret of this side, where it listens off loopback."""
    classes: tuple[str, ...] = ()
    """Import paths of dataclasses and named tuples that batches are made of."""
    buffer_bytes: int = 1 << 29
    """Of batches that wait on a rank for the loop."""
    timeout: timedelta = timedelta(minutes=2)
    """How long a rank waits while no feeder is there."""

    def __post_init__(self) -> None:
        if NOT_KEPT in self.feeders:
            raise ConfigError(
                "The token of the feeders is not kept with a run, because whoever has it may connect.",
                hint="Give it again: trainfleet train RECIPE --feed TOKEN.",
            )
        if not self.feeders and self.listen is None:
            raise ConfigError(
                "data.source is remote, but data.args names no feeders.",
                hint="Give `feeders: [HOST:PORT]` or --feed HOST:PORT|TOKEN, as `trainfleet feed` prints it.",
            )
        is_open = self.listen is not None and not Address.parse(self.listen).is_loopback
        if is_open and self.identity is None and self.certificates is None:
            raise ConfigError(
                f"data.args.listen is {self.listen}, which others can reach, and there are no credentials.",
                hint="Give data.args.identity, a folder: it keeps a secret, and the token for feeders is printed.",
            )

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> FeedConfig:
        """From `data.args`, where one feeder needs no list; ConfigError for keys and values that are none."""
        values = dict(args)
        if isinstance(values.get("feeders"), str):
            values["feeders"] = [values["feeders"]]
        return load_config(cls, values=values, env={}, dotenv=Path(os.devnull)).value

    def open(self, stream: str, **terms: Any) -> RemoteBatches:
        """This rank's batches of a stream, `training` or `evaluation`. Waits for the first feeder."""
        credentials, listen = self._credentials(), self._listen(stream)
        if listen is not None:
            self._tell(credentials, listen)
            # RemoteBatches counts ports by data-parallel rank; ranks of one host may share one of those.
            listen = replace(listen, port=listen.port and listen.port - int(terms.get("rank", 0)))
        return RemoteBatches(
            self.feeders,
            stream=stream,
            listen=listen,
            credentials=credentials,
            classes=[load_object(path, key="data.args.classes") for path in self.classes],
            buffer_bytes=self.buffer_bytes,
            timeout=self.timeout,
            pin=True,
            **terms,
        )

    def _credentials(self) -> Credentials | None:
        if self.certificates is not None:
            return Credentials(certificates=certificates_in(Path(self.certificates)))
        if self.identity is not None:
            return Credentials.make(folder=Path(self.identity))
        return None

    def _listen(self, stream: str) -> Address | None:
        """Ports from that of `listen` on: first all ranks of this host for training, then all for evaluation."""
        if self.listen is None:
            return None
        ranks = RankEnvironment.from_env()
        address = Address.parse(self.listen)
        step = ranks.local_rank + (ranks.local_world_size if stream == "evaluation" else 0)
        return replace(address, port=address.port and address.port + step)

    def _tell(self, credentials: Credentials | None, listen: Address) -> None:
        place = replace(listen, host=socket.gethostname()) if listen.host in ("0.0.0.0", "::") else listen
        if credentials is not None and credentials.secret is not None:
            logger.info("Feeders come to %s by: trainfleet feed RECIPE --dial %s", place, credentials.token([place]))
        else:
            logger.info("Feeders come to %s by: trainfleet feed RECIPE --dial %s", place, place)


def certificates_in(folder: Path) -> Certificates:
    """ca.pem, certificate.pem and key.pem of a folder."""
    return Certificates(ca=folder / "ca.pem", certificate=folder / "certificate.pem", key=folder / "key.pem")
