"""The webhook of an alert: one POST of JSON, tried again for a while, which follows nobody elsewhere."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from trainfleet.monitor.alerts.facts import Facts
from trainfleet.monitor.alerts.settings import site_of
from trainfleet.net.retry import pauses

ANSWER_SECONDS = 10.0
"""For each connection, and each wait for bytes of the answer."""
_PASSING = (408, 425, 429)
"""Of the answers 4xx, those that another try may change."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """What was meant for one site is sent to no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Webhook:
    """Posts the facts of an alert to a URL, of which no error shows more than the site: the rest may be a password."""

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self._url = url
        self._timeout_seconds = timeout_seconds
        self._opener = urllib.request.build_opener(_Stay)

    def post(self, facts: Facts) -> None:
        """Returns once the site has taken it; OSError with what it said last where it has not in time, or will not."""
        body = json.dumps(facts.json(), allow_nan=False).encode()
        ends = time.monotonic() + self._timeout_seconds
        for pause in pauses(first=0.5, most=10.0):
            left = ends - time.monotonic()
            reason, may_pass = self._try(body, max(0.1, min(ANSWER_SECONDS, left)))
            if reason is None:
                return
            if not may_pass or time.monotonic() + pause >= ends:
                raise OSError(f"{site_of(self._url)} {reason}")
            time.sleep(pause)

    def _try(self, body: bytes, seconds: float) -> tuple[str | None, bool]:
        """Why it was not taken, and whether that may pass."""
        headers = {"Content-Type": "application/json", "User-Agent": "trainfleet"}
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=seconds):
                return None, False
        except urllib.error.HTTPError as exc:
            exc.close()
            if 300 <= exc.code < 400:
                return f"sends elsewhere ({exc.code}), where nothing is posted: give the final URL", False
            return f"answered {exc.code}", exc.code >= 500 or exc.code in _PASSING
        except urllib.error.URLError as exc:
            return f"could not be reached: {exc.reason}", True
        except (OSError, HTTPException, ValueError) as exc:
            return f"did not answer as a web server does: {type(exc).__name__}", True
