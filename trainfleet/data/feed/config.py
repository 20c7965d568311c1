"""The settings of a trainer that is fed: `data.args` where `data.source` is `remote`."""

from __future__ import annotations

import functools
import logging
import os
import socket
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainfleet.comm.environment import RankEnvironment
from trainfleet.config import load_config
from trainfleet.data.feed.feeders import Feeders
from trainfleet.data.feed.remote import RemoteBatches
from trainfleet.errors import ConfigError
from trainfleet.imports import load_object
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.entrance import Way
from trainfleet.net.tls import Certificates
from trainfleet.net.token import Token

logger = logging.getLogger(__name__)

NOT_KEPT = "(token)"
"""Stands for a token in what a run writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedConfig:
    """Where feeders are, or where they come to, and what a rank keeps of what they send."""

    feeders: tuple[str, ...] = ()
    """Addresses or tokens of data services."""
    listen: str | None = None
    """HOST:PORT where feeders connect to, in place of `feeders`. Each rank of a host listens at a port of its own."""
    tunnel: str | None = None
    """A way in where feeders cannot call this host: ssh:USER@HOST[:PORT], ssh-at:…, ngrok or cloudflared. One rank."""
    certificates: str | None = None
    """Folder with ca.pem, certificate.pem and key.pem, in place of a token."""
    recipe: str = "RECIPE"
    """What feeders call their recipe, for the line that they are told to run."""
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
        if self.tunnel is not None:
            self._check_tunnel()
        elif not self.feeders and self.listen is None:
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

    def _check_tunnel(self) -> None:
        Way.parse(self.tunnel or "")
        if self.feeders or self.certificates is not None:
            raise ConfigError(
                f"data.args.tunnel is {self.tunnel}, a way in for feeders that come with a token; "
                "data.args.feeders and certificates do not go with it."
            )
        if (ranks := RankEnvironment.from_env().world_size) > 1:
            raise ConfigError(
                f"data.args.tunnel leads to one rank, and there are {ranks}.",
                hint="Open it on the other side, by trainfleet feed RECIPE --tunnel …: its token serves all ranks.",
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
        credentials, listen = self._credentials(), self._listen()
        if listen is not None:
            # RemoteBatches counts ports by data-parallel rank; ranks of one host may share one of those.
            listen = replace(listen, port=listen.port and listen.port - int(terms.get("rank", 0)))
        batches = RemoteBatches(
            self.feeders,
            stream=stream,
            listen=listen,
            tunnel=self.tunnel,
            told=functools.partial(self._tell, credentials),
            among=self._among() if listen is not None else None,
            credentials=credentials,
            classes=[load_object(path, key="data.args.classes") for path in self.classes],
            buffer_bytes=self.buffer_bytes,
            timeout=self.timeout,
            pin=True,
            **terms,
        )
        if listen is not None:
            _listening[self] = batches.feeders
        return batches

    def _among(self) -> Feeders | None:
        """Those of another stream that listens as we do: feeders have one connection to a rank."""
        found = _listening.get(self)
        return found if found is not None and found.is_open else None

    def _credentials(self) -> Credentials | None:
        if self.certificates is not None:
            return Credentials(certificates=certificates_in(Path(self.certificates)))
        if self.identity is not None:
            return Credentials.make(folder=Path(self.identity))
        return Credentials.make() if self.tunnel is not None else None

    def _listen(self) -> Address | None:
        """The port of `listen` for the first rank of this host, and one more for each after it."""
        if self.listen is None:
            return Address("127.0.0.1", 0) if self.tunnel is not None else None
        address = Address.parse(self.listen)
        return replace(address, port=address.port and address.port + RankEnvironment.from_env().local_rank)

    def _tell(self, credentials: Credentials | None, place: Address | Token) -> None:
        if isinstance(place, Token):
            where = place.addresses[0]
        else:
            where = replace(place, host=socket.gethostname()) if place.host in ("0.0.0.0", "::") else place
            place = where
            if credentials is not None and credentials.secret is not None:
                place = credentials.token([where])
        # A line of its own, to be copied as a whole.
        logger.info(
            "Feeders come to %s. Where the data are:\n\n  trainfleet feed %s --dial %s\n", where, self.recipe, place
        )


# Several streams of this process that listen by the same settings: the port can be had once.
_listening: weakref.WeakValueDictionary[FeedConfig, Feeders] = weakref.WeakValueDictionary()


def certificates_in(folder: Path) -> Certificates:
    """ca.pem, certificate.pem and key.pem of a folder."""
    return Certificates(ca=folder / "ca.pem", certificate=folder / "certificate.pem", key=folder / "key.pem")
