"""The options of `train` and `replay` for batches that other hosts make, and what they make of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.errors import ConfigError

if TYPE_CHECKING:
    from trainfleet.training.recipe import Recipe


CERTS = typer.Option(None, "--certs", help="For --feed: ca.pem, certificate.pem and key.pem.", metavar="FOLDER")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fed:
    """As they were given, and refused where they do not go together."""

    feeders: Sequence[str]
    certs: Path | None
    tunnel: str | None = None
    own_workers: int | None = None

    def __post_init__(self) -> None:
        if self.feeders and self.tunnel is not None:
            raise ConfigError("--feed calls feeders and --tunnel lets them call. Give one of the two.")
        for name, value in (("--certs", self.certs), ("--own-workers", self.own_workers)):
            if value is not None and not self.feeders:
                raise ConfigError(f"{name} is for --feed, which is not given.")

    def refuse_among_started(self) -> None:
        """For a rank that a launcher has started: the others of this host could not know of its feeder."""
        if self.own_workers is not None:
            raise ConfigError(
                "--own-workers is for the command that starts this host's ranks, and a launcher has started this one.",
                hint="Start `trainfleet feed RECIPE` on this host, and give --feed 127.0.0.1:7700 as well.",
            )

    @contextmanager
    def applied(self, settings: Recipe, recipe: Path) -> Iterator[Recipe]:
        """`settings` of a trainer that is fed so; its own feeder, where it has one, ends with the block."""
        from trainfleet.training.feed import as_fed, own_feeder

        ways: dict[str, object] = {"certificates": str(self.certs)} if self.certs is not None else {}
        with ExitStack() as closing:
            if self.feeders:
                feeders = list(self.feeders)
                if self.own_workers is not None:
                    certificates = None if self.certs is None else str(self.certs)
                    feeders.insert(0, closing.enter_context(own_feeder(settings, self.own_workers, certificates)))
                settings = as_fed(settings, feeders=feeders, **ways)
            elif self.tunnel is not None:
                settings = as_fed(settings, tunnel=self.tunnel, recipe=str(recipe))
            yield settings
