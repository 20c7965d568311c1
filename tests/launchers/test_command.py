"""Every host is given the same words but for its number, and what cannot work is refused before they are sent."""

from __future__ import annotations

from typing import Any

import pytest

from trainfleet.config import load_config
from trainfleet.errors import ConfigError, LaunchError, PlanError
from trainfleet.launchers.command import Command, check_command
from trainfleet.training.recipe import Recipe


def command(**changes: Any) -> Command:
    return Command(**{"recipe": "r.yaml", "nodes": 2, "nproc_per_node": 4, "overrides": ("plan.zero=2",), **changes})


def recipe(**values: Any) -> Recipe:
    return load_config(Recipe, values={"batch.micro_batch": 2, **values}, env={}).value


def test_the_hosts_differ_by_their_number_alone() -> None:
    first, second = (command().arguments(node_rank=node, rendezvous="a:1") for node in (0, 1))
    assert " ".join(first) == (
        "trainfleet train r.yaml plan.zero=2 --nproc 4 --nnodes 2 --rendezvous a:1 --max-restarts 0 --node-rank 0"
    )
    assert first[:-1] == second[:-1] == [*command().arguments(node_rank=None, rendezvous="a:1"), "--node-rank"]


def test_the_words_are_those_that_the_command_line_reads() -> None:
    from typer.testing import CliRunner

    from trainfleet.cli.main import app

    words = command(resume="auto", recipe="no/such.yaml").arguments(node_rank=1, rendezvous="a:1")
    said = CliRunner().invoke(app, words[1:])
    assert "no/such.yaml" in str(said.exception), said.output  # no word was unknown: the recipe is looked for


def test_less_than_one_process_is_refused() -> None:
    with pytest.raises(LaunchError, match="nodes is 0; use 1 or more"):
        command(nodes=0)


def test_the_plan_and_the_batch_are_checked_also_where_the_code_is_not() -> None:
    with pytest.raises(PlanError, match="dp_replicate"):
        check_command(recipe(**{"plan.dp_replicate": 3}), command(), code_is_here=False)
    with pytest.raises(ConfigError, match="fewer samples than the 8 data ranks"):
        values = {"batch.global_batch": 4, "batch.micro_batch": None}
        check_command(recipe(**values), command(), code_is_here=False)


def test_what_may_not_be_meant_is_remarked() -> None:
    remarks = check_command(recipe(**{"checkpoint.every": None}), command(), code_is_here=False)
    assert [words.split()[0] for words in remarks] == ["checkpoint.every", "Checkpoints"]
    assert "runs/run" in remarks[1] and "all 2 hosts" in remarks[1]
    one = Command(recipe="r.yaml", nodes=1, nproc_per_node=1)
    assert check_command(recipe(**{"checkpoint.every": 10}), one, code_is_here=False) == []
