from __future__ import annotations

import pytest

from trainfleet.errors import ConfigError
from trainfleet.monitor.alerts.settings import HIDDEN, Alert, site_of, split_command

SECRET = "https://hooks.example.com:8443/services/T0/very-secret?key=hush"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"when": "loss >"}, "a number should follow"),
        ({"when": "loss > 5", "timeout_seconds": 0}, "must be positive"),
        ({"when": "loss > 5", "shell": True}, "no command to give"),
        ({"when": "loss > 5", "command": "  "}, "command is empty"),
        ({"when": "loss > 5", "command": "echo 'a"}, "cannot be split"),
        ({"when": "loss > 5", "webhook": "file:///etc/passwd"}, "begins with 'file'"),
        ({"when": "loss > 5", "webhook": "hooks.example.com/x"}, "begins with 'no scheme'"),
        ({"when": "loss > 5", "webhook": "https://[::1/x"}, "is no URL"),
        ({"when": "loss > 5", "webhook": "https://a:hush@b/x"}, "name or password before its host"),
        ({"when": "loss > 5", "webhook": "https://b/x\r\nHost: c"}, "a space or a control character"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Alert(**fields)  # type: ignore[arg-type]
    assert says in str(caught.value) and "hush" not in str(caught.value)


def test_an_import_path_is_a_function_and_anything_else_a_condition() -> None:
    assert Alert(when="my.module:too_hot").condition is None
    assert Alert(when="loss > 5").condition is not None


def test_what_is_written_down_holds_no_more_of_a_webhook_than_its_site() -> None:
    kept = Alert(when="loss > 5", webhook=SECRET).without_secrets()
    assert kept.webhook == f"https://hooks.example.com:8443/{HIDDEN}" == f"{site_of(SECRET)}/{HIDDEN}"
    plain = Alert(when="loss > 5", command="a b")
    assert plain.without_secrets() is plain


def test_a_command_is_split_as_a_shell_would() -> None:
    assert split_command("./page.sh 'at night' now") == ["./page.sh", "at night", "now"]
