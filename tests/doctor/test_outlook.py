from __future__ import annotations

import pytest

from trainfleet.doctor import outlook as module
from trainfleet.doctor.finding import Finding
from trainfleet.doctor.outlook import outlook
from trainfleet.doctor.versions import Requirement

FOUND = [Finding(subject=name, fact="fine") for name in ("Python", "torch", "disk", "loopback", "gloo x 2", "clock")]


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    needs = ["tensorboard>=2.18", "cryptography>=43"]
    extras = [Requirement.parse(f'{need}; extra == "{extra}"') for need, extra in zip(needs, ("monitor", "net"))]
    there = {"tensorboard": "2.21", "cryptography": "50"}
    monkeypatch.setattr(module, "requirements", lambda: extras)
    monkeypatch.setattr(module, "version_of", there.get)
    return there


def rows(*found: Finding) -> dict[str, Finding]:
    return {row.subject: row for row in outlook([*FOUND, *found])}


def test_what_was_tried_and_is_installed_will_work():
    found = rows()
    assert found["ranks on CPUs"].verdict == found["TLS on the wire"].verdict == "ok"
    assert found["TensorBoard, pictures"].fact == "tensorboard 2.21" and all(row.outlook for row in found.values())
    assert found["GPUs"].verdict == "off" and found["GPUs"].remedy == ""


def test_what_was_found_wrong_prevents_with_its_remedy():
    wrong = Finding(subject="gloo x 2", fact="hangs", verdict="no", remedy="Set it.")
    found = rows(wrong)
    assert (found["ranks on CPUs"].verdict, found["ranks on CPUs"].remedy) == ("no", "Set it.")
    assert found["train in one process"].verdict == "ok"
    assert found["ranks on GPUs"].verdict == "off", "without a GPU it is not gloo that is missing"
    assert rows(Finding(subject="GPU", fact="torch is a CPU build", verdict="no"))["GPUs"].verdict == "no"


def test_a_missing_extra_is_no_fault_and_named_with_its_command(packages):
    del packages["tensorboard"]
    row = rows()["TensorBoard, pictures"]
    assert (row.verdict, row.fact) == ("off", "tensorboard missing")
    assert row.remedy == 'pip install "trainfleet[monitor]"'


def test_an_extra_that_is_too_old_does_not_work(packages):
    packages["tensorboard"] = "2.1"
    row = rows()["TensorBoard, pictures"]
    assert row.verdict == "no" and row.fact == "too old for tensorboard>=2.18"


def test_what_was_not_tried_is_not_promised():
    row = next(row for row in outlook(FOUND[:4]) if row.subject == "ranks on CPUs")
    assert row.verdict == "note" and "gloo x 2" in row.fact


def test_gpus_that_answer_will_work():
    more = [Finding(subject=name, fact="fine") for name in ("GPU 0", "CUDA", "nccl x 2")]
    found = rows(*more)
    assert found["GPUs"].verdict == found["ranks on GPUs"].verdict == "ok"
