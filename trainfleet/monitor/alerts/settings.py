"""One alert of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from urllib.parse import urlsplit

from trainfleet.errors import ConfigError
from trainfleet.monitor.alerts.condition import Condition, parse
from trainfleet.plan import STRICT

KEY = "monitor.alerts"
HIDDEN = "<hidden>"
"""What a run folder has in the place of a webhook's path, which often is its password."""
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """When to tell somebody, and whom beside the log."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    when: str
    """A condition such as `loss > 5 for 20 steps`, or the import path of a function (row) -> bool or text."""
    command: str | None = None
    """A program with its arguments, started without a shell; variables ALERT_* hold the facts. null: none."""
    shell: bool = False
    """Give `command` to the shell, for pipes and variables."""
    webhook: str | None = None
    """An http or https URL to which the facts are posted as JSON. null: none."""
    timeout_seconds: float = 60.0
    """How long the command may take, and the webhook be tried, until they are given up."""

    def __post_init__(self) -> None:
        self.condition  # noqa: B018  # raises what is wrong with it
        if self.timeout_seconds <= 0:
            raise ConfigError(f"{KEY}: timeout_seconds is {self.timeout_seconds}; it must be positive.")
        if self.shell and self.command is None:
            raise ConfigError(f"{KEY}: {self.when!r} has shell, but no command to give to it.")
        if self.command is not None:
            split_command(self.command)
        if self.webhook is not None:
            _check_webhook(self.webhook)

    @property
    def condition(self) -> Condition | None:
        """None where `when` names a function."""
        return None if _FUNCTION.fullmatch(self.when.strip()) else parse(self.when, key=KEY)

    def without_secrets(self) -> Alert:
        """As a run may write it down."""
        return self if self.webhook is None else replace(self, webhook=f"{site_of(self.webhook)}/{HIDDEN}")


def split_command(command: str) -> list[str]:
    """Its words, as a shell would split them; ConfigError where there are none."""
    import shlex

    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise ConfigError(f"{KEY}: the command {command!r} cannot be split into words: {exc}.") from exc
    if not words:
        raise ConfigError(f"{KEY}: the command is empty; name a program, or leave it out.")
    return words


def site_of(url: str) -> str:
    """Scheme and host: what may be shown of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"


def _check_webhook(url: str) -> None:
    """The error shows no more of the URL than its site."""
    try:
        parts = urlsplit(url)
        site = site_of(url)
    except ValueError as exc:
        raise ConfigError(f"{KEY}: the webhook is no URL: {exc}.") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{KEY}: the webhook begins with {parts.scheme or 'no scheme'!r}; give an http or https URL.")
    if "@" in parts.netloc:
        raise ConfigError(f"{KEY}: the webhook at {site} has a name or password before its host, which is not sent.")
    if any(char.isspace() or not char.isprintable() for char in url):
        raise ConfigError(f"{KEY}: the webhook at {site} holds a space or a control character.")
