"""A run in Weights & Biases: sent from a thread of its own, and going on as the same run there after a resume."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil

from trainfleet.deps import installed, require
from trainfleet.events import AlertFired, AnomalySeen, Event, Noted, RunEnded, RunStarted
from trainfleet.monitor.outbox import Outbox
from trainfleet.monitor.scalars import scalars_in
from trainfleet.plan import STRICT

logger = logging.getLogger(__name__)

START_SECONDS = 30.0
"""For W&B to answer when a run begins there; then it is written beside the run, to be sent later."""
CLOSE_SECONDS = 45.0
"""For what is still to be sent when the run has ended: a start that fails, and then the run written beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Where the run goes in Weights & Biases; what is not set here, its own variables and `wandb login` say."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    project: str | None = None
    """null: WANDB_PROJECT, or `uncategorized`."""
    entity: str | None = None
    """User or team. null: WANDB_ENTITY, or the default of the account."""
    name: str | None = None
    """Of the run. null: the name of the run folder."""
    tags: tuple[str, ...] = ()
    """Of the run."""
    mode: Literal["online", "offline"] | None = None
    """offline: write the run below its folder, for `wandb sync`. null: WANDB_MODE, or online."""


class WandB:
    """Numbers of each `every`-th step, evaluations, tracked numbers, alerts, and the recipe as configuration.

    The id of the run there is kept in `folder`/wandb/run_id. Each point has its step as the number `step`, so that
    steps which are taken again after a resume do not get lost, as they would by W&B's own count.
    """

    in_loop = True

    def __init__(self, config: WandbConfig | str, *, folder: str | Path, every: int = 1) -> None:
        if installed("wandb") is None:  # importing it takes a second, which the thread has
            require("wandb", "wandb", purpose="Weights & Biases")
        self.config = WandbConfig(project=config) if isinstance(config, str) else config
        self._folder = Path(folder)
        self._every = every
        self._run: Any = None
        self._outbox: Outbox[Event] = Outbox("Weights & Biases", self._deliver)

    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted | RunEnded | Noted | AlertFired | AnomalySeen) or scalars_in(
            event, every=self._every
        ):
            self._outbox.put(event)

    def close(self) -> None:
        if not self._outbox.close(CLOSE_SECONDS):
            _end_service()

    # in the thread

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, RunStarted):
                self._run = self._run or self._start(event)
            if self._run is None:
                raise RuntimeError("the run has not begun there")
            if isinstance(event, RunEnded):
                self._run.summary.update(dict(event.summary) | {"reason": event.reason})
                self._run.finish(exit_code=0 if event.reason in ("finished", "stopped early") else 1)
                self._run = None
            elif isinstance(event, AlertFired):
                self._run.alert(title=event.alert[:80], text=event.text or event.alert)
            elif isinstance(event, AnomalySeen):
                self._run.alert(title=event.kind, text=event.what)
            elif isinstance(event, Noted):
                html = f"<pre>{_escaped(event.text)}</pre>"
                self._run.log({"step": event.step, event.title: require("wandb", "wandb").Html(html)})
            elif (scalars := scalars_in(event, every=self._every)) is not None:
                step, numbers = scalars
                self._run.log({"step": step, **numbers})

    def _start(self, event: RunStarted) -> Any:
        wandb = require("wandb", "wandb")
        config = self.config
        fields: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "name": config.name or self._folder.name,
            "tags": list(config.tags) or None,
            "id": run_id(self._folder),
            "resume": "allow",
            "dir": str(self._folder),
            "config": {"plan": event.plan, "parameters": event.parameters, **event.recipe},
            "settings": wandb.Settings(console="off", silent=True, init_timeout=START_SECONDS),
        }
        try:
            run = wandb.init(mode=config.mode, **fields)
        except Exception as exc:
            logger.warning(
                "Weights & Biases did not begin the run: %s. It is written to %s; send it with `wandb sync`.",
                re.sub(r"\s+", " ", str(exc))[:300] or type(exc).__name__,
                self._folder / "wandb",
            )
            wandb.teardown(exit_code=1)  # it would take the id for one in use
            run = wandb.init(mode="offline", **fields)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def run_id(folder: Path) -> str:
    """That of the run there; made and kept where the folder has none."""
    path = folder / "wandb" / "run_id"
    try:
        kept = path.read_text().strip()
    except OSError:
        kept = ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", kept):
        kept = secrets.token_hex(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kept + "\n")
    return kept


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _end_service() -> None:
    """W&B has a process of its own, for which its farewell at the end of the program would wait."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()
