"""The verbs of `trainfleet checkpoint` say what stands, find damage, and bring weights in and out."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from held import Held
from safetensors.numpy import load_file, save_file

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.cli.main import main
from trainfleet.comm.threads import run_ranks
from trainfleet.plan import Plan
from trainfleet.state import ShardedArray
from trainfleet.store import FileStore

WEIGHT = np.arange(12, dtype=np.float32).reshape(6, 2)


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of two ranks at steps 10 and 20."""

    def save(group):
        store = FileStore(tmp_path / "run" / "checkpoints")
        with Checkpointer(store, group=group, retention=Retention(last=9)) as checkpointer:
            for step in (10, 20):
                local = WEIGHT[3 * group.rank : 3 * group.rank + 3] + step
                piece = ShardedArray(name="w", global_shape=(6, 2), offsets=(3 * group.rank, 0), local=local)
                metadata = {"recipe": {"plan": asdict(Plan(zero=3, precision="bf16"))}}
                model = Held(**{"layer.w": piece, "layer.b": np.zeros(3, np.float32)})
                checkpointer.save(step, metadata=metadata, metrics={"loss": 1 / step}, model=model).wait()

    run_ranks(2, save)
    return tmp_path / "run"


@pytest.fixture
def say(capsys):
    """Exit code, output and errors of a command."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def damage(run, step):
    file = next((run / "checkpoints" / f"step-{step:08d}").glob("*-00001-of-00002.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file.name


def test_list_shows_steps_sizes_ranks_and_metrics(run, say):
    code, out, _ = say("list", run)
    head, *rows = out.splitlines()
    assert code == 0 and head.split() == ["step", "saved", "size", "ranks", "plan", "metrics"]
    assert [row.split()[0] for row in rows] == ["10", "20"] and "zero=3 precision=bf16  loss 0.05" in rows[1]
    found = json.loads(say("list", run, "--json")[1])
    assert [entry["step"] for entry in found] == [10, 20] and found[1]["metrics"] == {"loss": 0.05}


def test_inspect_shows_what_one_holds(run, say):
    code, out, _ = say("inspect", run)
    assert code == 0 and out.startswith("step 20, saved 20") and "by 2 ranks" in out
    assert "plan    zero=3 precision=bf16" in out and "state   model: 2 arrays" in out
    assert "layer.w" in out and "float32   [6, 2]" in out
    found = json.loads(say("inspect", run, "--step", 10, "--json")[1])
    assert found["step"] == 10 and found["states"]["model"][0]["path"] == "model/layer.w"


def test_verify_finds_damage_and_says_so_by_its_exit_code(run, say):
    assert say("verify", run)[:2] == (0, "step-00000010  whole\nstep-00000020  whole\n")
    name = damage(run, 20)
    code, out, err = say("verify", run)
    assert code == 14 and "step-00000010  whole" in out and "step-00000020  damaged" in out and name in out
    assert "Of 2 checkpoints 1 cannot be used" in err
    assert say("verify", run / "checkpoints" / "step-00000010")[0] == 0
    code, out, _ = say("verify", run, "--json")
    assert code == 14 and [verdict["state"] for verdict in json.loads(out)] == ["whole", "damaged"]
    assert say("verify", run, "--step", 15)[0] == 7


def test_what_a_killed_save_left_is_no_damage(run, say):
    (run / "checkpoints" / "step-00000020" / "manifest.json").unlink()
    code, out, _ = say("verify", run)
    assert code == 0 and "step-00000020  unfinished" in out
    assert "not usable" in say("list", run)[1] and say("inspect", run)[1].startswith("step 10,")


def test_export_writes_whole_arrays_once(run, say, tmp_path):
    code, out, _ = say("export", run, tmp_path / "x.safetensors")
    assert code == 0 and "2 arrays" in out
    found = load_file(tmp_path / "x.safetensors")
    assert (found["layer.w"] == WEIGHT + 20).all() and found["layer.b"].shape == (3,)
    code, _, err = say("export", run, tmp_path / "x.safetensors")
    assert code == 7 and "exists already" in err and "--force" in err
    assert say("export", run, tmp_path / "x.safetensors", "--force", "--dtype", "fp16", "--step", 10)[0] == 0
    assert load_file(tmp_path / "x.safetensors")["layer.w"].dtype == np.float16


def test_export_in_shards_has_the_index_that_loaders_read(run, say, tmp_path):
    assert say("export", run, tmp_path / "x", "--shard-size", "40B")[0] == 0
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 60
    assert index["weight_map"] == {
        "layer.w": "model-00001-of-00002.safetensors",
        "layer.b": "model-00002-of-00002.safetensors",
    }
    for name, file in index["weight_map"].items():
        assert list(load_file(tmp_path / "x" / file)) == [name]
    assert say("import", tmp_path / "x", tmp_path / "y")[0] == 0
    assert say("diff", run, tmp_path / "y", "--state", "model")[:2] == (0, "They are equal to the bit.\n")


def test_a_damaged_one_is_not_exported_and_leaves_no_file(run, say, tmp_path):
    name = damage(run, 20)
    code, _, err = say("export", run, tmp_path / "x.safetensors")
    assert code == 14 and name in err and not (tmp_path / "x.safetensors").exists()


def test_a_damaged_one_leaves_the_export_before_as_it_was(run, say, tmp_path):
    assert say("export", run, tmp_path / "x", "--shard-size", "40B")[0] == 0
    (tmp_path / "x" / "config.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()}
    damage(run, 20)
    code, _, err = say("export", run, tmp_path / "x", "--shard-size", "10B")
    assert code == 7 and "exists already" in err
    assert say("export", run, tmp_path / "x", "--shard-size", "10B", "--force")[0] == 14
    assert {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()} == before
    assert say("export", run, tmp_path / "x", "--shard-size", "1GB", "--force", "--step", 10)[0] == 0
    assert {file.name for file in (tmp_path / "x").iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }


@pytest.mark.parametrize("name", ["a b?.safetensors", ".hidden", "mödel%2F"])
def test_an_output_is_called_as_was_said(run, say, tmp_path, name):
    assert say("export", run, tmp_path / "new" / name)[0] == 0
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]


def test_values_that_json_has_not_are_text(run, say):
    with Checkpointer(FileStore(run / "checkpoints"), retention=Retention(last=9)) as checkpointer:
        checkpointer.save(30, metadata={"raw": b"x", "pair": (1, 2)}, metrics={"loss": float("nan")}, m=Held(n=1))
    (found,) = json.loads(say("list", run / "checkpoints" / "step-00000030", "--json")[1])
    assert found["metadata"] == {"raw": "b'x'", "pair": [1, 2]} and found["metrics"] == {"loss": "nan"}


def test_import_makes_a_checkpoint_of_foreign_weights(run, say, tmp_path):
    save_file({"module.layer.w": WEIGHT, "module.layer.b": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    code, out, _ = say("import", tmp_path / "x.safetensors", tmp_path / "y", "--step", 5)
    assert code == 0 and "names without 'module.'" in out
    live = Held(
        **{"layer.w": ShardedArray(name="w", global_shape=(6, 2), offsets=(0, 0), local=np.zeros((6, 2), "f4"))}
    )
    live.value["layer.b"] = ShardedArray(name="b", global_shape=(3,), offsets=(0,), local=np.zeros(3, "f4"))
    assert Checkpointer(FileStore(tmp_path / "y")).restore(model=live, partial=True) == 5
    assert (live.value["layer.w"].local == WEIGHT).all()
    code, _, err = say("import", tmp_path / "x.safetensors", tmp_path / "y", "--step", 5)
    assert code == 7 and "exists already" in err


def test_diff_tells_by_its_exit_code(run, say):
    code, out, _ = say("diff", run, run, "--first-step", 10)
    assert code == 1 and out.splitlines() == [
        "model/layer.w  12 of 12 elements differ, by 10 at most",
        "metrics/loss  0.1 in the first and 0.05 in the second",
    ]
    found = json.loads(say("diff", run, run, "--first-step", 10, "--json")[1])
    assert found["states"][0]["elements"] == 12 and found["beside"][0]["path"] == "metrics/loss"
    assert say("diff", run, run)[:2] == (0, "They are equal to the bit.\n")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["list", "nowhere"], 7, "nowhere does not exist"),
        (["verify", "."], 7, "There are no checkpoints in ."),
        (["inspect", "."], 7, "There are no checkpoints in ."),
        (["export", ".", "x", "--dtype", "int4"], 2, "--dtype is 'int4'"),
        (["export", ".", "x", "--shard-size", "much"], 2, "--shard-size is 'much'"),
        (["import", "no.pt", "out"], 7, "no file or folder no.pt"),
    ],
)
def test_what_is_wrong_is_a_sentence(arguments, code, said, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, err = say(*arguments)
    assert found == code and err.startswith("trainfleet: ") and said in err


def test_model_and_optimizer_go_to_deepspeed_and_come_back(say, tmp_path):
    torch = pytest.importorskip("torch")
    memory = {"w": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.full((2, 2), 0.5)}}
    groups = [{"lr": 0.1, "betas": [0.9, 0.99]}]
    states = {
        "model": Held(w=torch.arange(4.0).view(2, 2)),
        "optimizer": Held(memory=memory, started=["w"], groups=groups),
    }
    with Checkpointer(FileStore(tmp_path / "run" / "checkpoints")) as checkpointer:
        checkpointer.save(7, **states).wait()
    code, out, _ = say("export", tmp_path / "run", tmp_path / "theirs", "--universal")
    assert code == 0 and "global_step7" in out
    assert say("export", tmp_path / "run", tmp_path / "theirs", "--universal")[0] == 7
    code, out, _ = say("import", tmp_path / "theirs", tmp_path / "back", "--step", 7)
    assert code == 0 and "1 parameters and their optimizer" in out
    assert say("diff", tmp_path / "run", tmp_path / "back", "--state", "model")[0] == 0
    assert say("diff", tmp_path / "run", tmp_path / "back", "--state", "optimizer")[0] == 0
