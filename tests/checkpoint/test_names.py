from __future__ import annotations

import pytest

from trainfleet.checkpoint.names import Attempt, folder_of, manifest_of, steps_and_files

RUN, OTHER = "0123456789ab", "ba9876543210"


def attempt(number):
    return Attempt(step=120, run=RUN, number=number, world_size=4)


def test_names_tell_step_run_save_and_rank():
    assert attempt(7).stem(1) == f"step-00000120/{RUN}.7-00001-of-00004"
    assert manifest_of(120) == "step-00000120/manifest.json"
    assert folder_of(1_234_567_890) == "step-1234567890"


def test_no_attempts_prefix_begins_anothers():
    assert not attempt(70).stem(0).startswith(attempt(7).prefix)


@pytest.mark.parametrize(
    ("file", "is_over"),
    [
        (f"{RUN}.6-00001-of-00004.json", True),
        (f"{RUN}.7-00001-of-00004.json", False),
        (f"{RUN}.10-00001-of-00004.safetensors", False),  # a rank that is ahead of rank 0
        (f"{OTHER}.10-00001-of-00004.failed", True),
        ("manifest.json", False),
        ("notes.txt", False),
        (f"{OTHER}.10-00001-of-00004.json.bak", False),
    ],
)
def test_an_attempt_supersedes_earlier_ones_and_those_of_other_runs(file, is_over):
    assert attempt(7).supersedes(file) == is_over


def test_only_names_of_our_making_are_taken_for_checkpoints():
    names = ["step-00000001/a", "step-00000001/b", "step-1/a", "step-000000001/a", "step-00000002", "x/step-00000003/a"]
    assert steps_and_files(names) == {1: ["a", "b"]}
