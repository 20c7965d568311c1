from __future__ import annotations

import json
import math

from trainfleet.monitor.alerts.facts import Facts


def test_facts_are_texts_for_a_command_and_strict_json_for_a_webhook() -> None:
    facts = Facts(alert="loss > 5", text="loss is nan", step=3, value=math.nan, run="runs/x", host="a")
    assert facts.variables() == {
        "ALERT_WHEN": "loss > 5",
        "ALERT_TEXT": "loss is nan",
        "ALERT_STEP": "3",
        "ALERT_VALUE": "nan",
        "ALERT_RUN": "runs/x",
        "ALERT_HOST": "a",
    }
    body = json.loads(json.dumps(facts.json(), allow_nan=False))
    assert body["value"] == "nan" and body["text"] == "loss is nan (runs/x on a)" and body["step"] == 3
