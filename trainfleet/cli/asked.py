"""The options of `validate` and `predict` that say which model answers, and the model they mean."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.errors import ConfigError

if TYPE_CHECKING:
    from trainfleet.serve.terms import Answering
    from trainfleet.training.recipe import Recipe

FEED = typer.Option(
    None,
    "--feed",
    help="Ask the model that stands there, by `trainfleet gpu-service RECIPE`; may be given again.",
    metavar="HOST:PORT|TOKEN",
)
LISTEN = typer.Option(
    None, "--listen", help="Let GPU services come here, by their --dial, in place of --feed.", metavar="HOST:PORT"
)
FOLDER = typer.Option(
    None, "--folder", help="For --listen: keeps the identity, so that the token outlives a restart.", metavar="FOLDER"
)
CERTS = typer.Option(
    None, "--certs", help="For --feed, --listen: ca.pem, certificate.pem and key.pem.", metavar="FOLDER"
)
WEIGHTS = typer.Option(
    None,
    "--weights",
    help="A run, a checkpoint, or a file that others saved.  [default: the newest checkpoint of the recipe's run]",
    metavar="PLACE",
)
DEVICE = typer.Option(None, "--device", help="Where to compute.  [default: cuda if there is one]")
STREAM = typer.Option("evaluation", "--stream", help="Which data of the recipe.", metavar="evaluation|training")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """As they were given, and refused where they do not go together."""

    feeders: Sequence[str]
    listen: str | None
    folder: Path | None
    certs: Path | None
    weights: str | None
    device: str | None

    def __post_init__(self) -> None:
        if self.feeders and self.listen is not None:
            raise ConfigError("--feed calls services and --listen lets them call. Give one of the two.")
        for name, value in (("--weights", self.weights), ("--device", self.device)):
            if self.is_remote and value is not None:
                raise ConfigError(f"{name} is for `trainfleet gpu-service`, where the model stands; leave it out here.")
        if self.certs is not None and not self.is_remote:
            raise ConfigError("--certs is for --feed and --listen, which are not given.")
        if self.folder is not None and self.listen is None:
            raise ConfigError("--folder is for --listen, which is not given.")

    @property
    def is_remote(self) -> bool:
        return bool(self.feeders) or self.listen is not None

    @contextmanager
    def opened(self, settings: Recipe, recipe: Path) -> Iterator[Answering]:
        """The recipe's model here, or services on other hosts; then no model is built here."""
        if not self.is_remote:
            from trainfleet.training.inference import predictor_of

            yield predictor_of(settings, self.weights, self.device)
            return
        from trainfleet.cli.standing import credentials_for
        from trainfleet.net.address import Address
        from trainfleet.serve.remote import RemoteModel

        credentials = credentials_for(self.listen, None, self.folder, self.certs)
        remote = RemoteModel(
            list(self.feeders),
            listen=self.listen,
            credentials=credentials,
        )
        with remote:
            if (place := remote.services.address) is not None:
                anywhere = place.host in ("0.0.0.0", "::")
                called: Address = replace(place, host=socket.gethostname()) if anywhere else place
                has_secret = credentials is not None and credentials.secret is not None
                way = credentials.token([called]) if credentials is not None and has_secret else called
                print(f"Where the GPU is:\n\n  trainfleet gpu-service {recipe} --dial {way}\n", file=sys.stderr)
            yield remote
