from __future__ import annotations

import sys
from types import SimpleNamespace

from trainfleet.cli import rank
from trainfleet.training import job


def test_a_rank_reads_the_resolved_recipe_and_nothing_else(tmp_path, monkeypatch):
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text("model: {name: 'a:B'}\ndata: {source: csv}\ntrain: {steps: 4}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / ".env").write_text("TRAINFLEET_TRAIN__STEPS=5\n")
    monkeypatch.setenv("TRAINFLEET_TRAIN__STEPS", "6")
    seen = []
    monkeypatch.setattr(job, "run", lambda recipe: seen.append(recipe) or SimpleNamespace(reason="finished"))
    assert rank.main([str(resolved), str(tmp_path / "beside")]) == 0
    assert seen[0].train.steps == 4
    assert str(tmp_path / "beside") in sys.path[:2]
