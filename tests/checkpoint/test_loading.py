"""Pieces cut in one way are read in another; and no damage, wherever it is, gets past."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import numpy as np
import pytest
from held import Held
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.checkpoint.catalog import catalog, examine, read_step
from trainfleet.checkpoint.export import safetensors_of
from trainfleet.checkpoint.sealed import Damaged, digest_of, seal, unseal
from trainfleet.checkpoint.whole import whole_states
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.state import PerRank, ShardedArray
from trainfleet.store import FileStore, MemoryStore


def boxes(shape, cuts):
    """Every box of a grid: along each dim cut at the given places, which may leave empty boxes."""
    edges = [sorted({0, length, *(c % (length + 1) for c in cut)}) for length, cut in zip(shape, cuts)]
    spans = [[(a, b - a) for a, b in itertools.pairwise(e)] or [(0, 0)] for e in edges]
    return [(tuple(o for o, _ in box), tuple(n for _, n in box)) for box in itertools.product(*spans)]


def dealt(whole, cuts, *, blank=False):
    """A state for each box of `whole`."""
    states = []
    for offsets, shape in boxes(whole.shape, cuts):
        local = whole[tuple(slice(o, o + n) for o, n in zip(offsets, shape))].copy()
        local = np.zeros_like(local) if blank else local
        states.append(Held(w=ShardedArray(name="w", global_shape=whole.shape, offsets=offsets, local=local)))
    return states


shapes = st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple)
all_cuts = st.lists(st.lists(st.integers(0, 100), max_size=2), min_size=3, max_size=3)


@settings(max_examples=200)
@given(shapes, all_cuts, all_cuts, st.sampled_from(["float32", "int8", "float64", "bool", "complex128"]))
def test_any_cut_is_read_in_any_other(shape, cuts_then, cuts_now, dtype):
    whole = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    then = dealt(whole, cuts_then)
    store = MemoryStore()

    def save(group):
        with Checkpointer(store, group=group) as checkpointer:
            checkpointer.save(1, m=then[group.rank])

    run_ranks(len(then), save)
    # Each rank that reads is here alone in its group: what it gets does not depend on the others.
    for live in dealt(whole, cuts_now, blank=True):
        Checkpointer(store).restore(m=live)
        piece = live.value["w"]
        expected = whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape))]
        assert np.array_equal(piece.local, expected)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_tensors_of_four_ranks_are_read_by_fewer(size, dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    whole = torch.randn(10, 6).mul(100).to(getattr(torch, dtype))

    def pieces(rank, size, source):
        local = source.chunk(size)[rank].clone() if rank < len(source.chunk(size)) else source[:0]
        offset = sum(len(c) for c in source.chunk(size)[:rank])
        return Held(w=ShardedArray(name="w", global_shape=(10, 6), offsets=(offset, 0), local=local))

    store = MemoryStore()

    def save(group):
        with Checkpointer(store, group=group) as checkpointer:
            checkpointer.save(1, m=pieces(group.rank, 4, whole))

    def restore(group):
        live = pieces(group.rank, size, torch.zeros_like(whole))
        Checkpointer(store, group=group).restore(m=live)
        return live.value["w"].local

    run_ranks(4, save)
    assert torch.equal(torch.cat(run_ranks(size, restore)), whole)


# damage

WHOLE = np.random.default_rng(1).standard_normal((64, 33))


def parts(rank, size, step):
    cut = [len(WHOLE) * r // size for r in range(size + 1)]
    local = WHOLE[cut[rank] : cut[rank + 1]] + step
    return {
        "model": Held(
            w=ShardedArray(name="w", global_shape=WHOLE.shape, offsets=(cut[rank], 0), local=local), b=local[0].copy()
        ),
        "rng": Held(state=PerRank(np.arange(700) + step + rank), position=step),
    }


def as_text(state, step, path):
    path.with_suffix(".txt").write_text(str(state["model"]["w"]))


def make_two_checkpoints(folder):
    """Of three shards each, an export and a file that a save function wrote."""

    def save(group):
        with Checkpointer(
            FileStore(folder), group=group, retention=Retention(last=9), export="bf16", save_function=as_text
        ) as checkpointer:
            for step in (10, 20):
                checkpointer.save(step, metadata={"recipe": "x"}, **parts(group.rank, 3, step)).wait()

    run_ranks(3, save)


def restored(folder, size):
    """What every rank gets: the step, and the first element less what the step adds."""

    def restore(group):
        live = parts(group.rank, size, -1)
        checkpointer = Checkpointer(FileStore(folder), group=group)
        step = checkpointer.restore(**live)
        w = live["model"].value["w"]
        expected = WHOLE[w.offsets[0] : w.offsets[0] + len(w.local)] + step
        assert np.array_equal(w.local, expected)
        assert live["rng"].value["position"] == step
        if group.rank < 3:
            assert np.array_equal(live["rng"].value["state"].value, np.arange(700) + step + group.rank)
        return step, checkpointer.problems

    return run_ranks(size, restore)


def flip(path, random, others):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def truncate(path, random, others):
    data = path.read_bytes()
    path.write_bytes(data[: random.randrange(len(data))])


def lengthen(path, random, others):
    path.write_bytes(path.read_bytes() + bytes(random.randrange(1, 9)))


def zero_a_page(path, random, others):
    data = bytearray(path.read_bytes())
    begin = random.randrange(len(data)) & ~4095
    page = data[begin : begin + 4096]
    data[begin : begin + 4096] = bytes(len(page))
    path.write_bytes(data)


def remove(path, random, others):
    path.unlink()


def swap(path, random, others):
    other = random.choice([o for o in others if o != path])
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)
    return other


def take_that_of_the_older_checkpoint(path, random, others):
    """The file of the same rank and kind, from the step before."""
    older = path.parent.parent / "step-00000010"
    kind = path.name.partition("-")[2]
    (source,) = [p for p in older.iterdir() if p.name.partition("-")[2] == kind]
    path.write_bytes(source.read_bytes())


DAMAGES = [flip, truncate, lengthen, zero_a_page, remove, swap, take_that_of_the_older_checkpoint]


def inflict(folder, seed):
    """One damage to the newer checkpoint; the names of the files it struck."""
    chosen = random.Random(seed)
    files = sorted((folder / "step-00000020").iterdir())
    damage = DAMAGES[seed % len(DAMAGES)] if seed % 2 else flip
    struck = chosen.choice(files)
    other = damage(struck, chosen, files)
    return [struck.name, *([other.name] if other else [])]


def check_damage(folder, seed):
    make_two_checkpoints(folder)
    struck = inflict(folder, seed)
    assert any(name in problem for name in struck for problem in Checkpointer(FileStore(folder)).verify(20))
    for step, problems in restored(folder, size=1 + seed % 4):
        assert step == 10
        assert any(name in problem for name in struck for problem in problems)
    with pytest.raises(CheckpointError, match="step-00000020"):
        Checkpointer(FileStore(folder)).restore(20, **parts(0, 1, -1))


def test_undamaged_the_newer_one_is_loaded(tmp_path):
    make_two_checkpoints(tmp_path)
    assert Checkpointer(FileStore(tmp_path)).verify(20) == []
    for size in (1, 2, 3, 4):
        assert {step for step, _ in restored(tmp_path, size)} == {20}


@pytest.mark.parametrize("seed", range(40))
def test_every_damage_is_named_and_the_older_checkpoint_loaded(tmp_path, seed):
    check_damage(tmp_path, seed)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(40, 240))
def test_two_hundred_more_damages(tmp_path, seed):
    check_damage(tmp_path, seed)


def test_a_damaged_array_is_named(tmp_path):
    make_two_checkpoints(tmp_path)
    (data,) = (tmp_path / "step-00000020").glob("*-00001-of-*.safetensors")
    raw = bytearray(data.read_bytes())
    raw[-700 * 8 - 10] ^= 4  # before the 700 numbers of the generator, which come last
    data.write_bytes(raw)
    assert Checkpointer(FileStore(tmp_path)).verify(20) == [
        f"step-00000020/{data.name}: model/w does not match its digest"
    ]


def test_an_index_in_the_place_of_the_manifest_is_damage(tmp_path):
    make_two_checkpoints(tmp_path)
    (index,) = (tmp_path / "step-00000020").glob("*-00001-of-*.json")
    (tmp_path / "step-00000020" / "manifest.json").write_bytes(index.read_bytes())
    (step, problems), *_ = restored(tmp_path, 1)
    assert step == 10
    assert "step-00000020/manifest.json: holds the bytes of another file" in problems[0]


def test_a_changed_header_is_damage_though_restore_does_not_need_it(tmp_path):
    make_two_checkpoints(tmp_path)
    (data,) = (tmp_path / "step-00000020").glob("*-00001-of-*.safetensors")
    raw = bytearray(data.read_bytes())
    raw[20] ^= 1
    data.write_bytes(raw)
    (step, problems), *_ = restored(tmp_path, 2)
    assert step == 10
    assert f"{data.name}: its header does not match its digest" in problems[0]


def test_a_surplus_file_is_named_and_not_read(tmp_path):
    make_two_checkpoints(tmp_path)
    (tmp_path / "step-00000020" / "extra.safetensors").write_bytes(b"?")
    for step, _ in restored(tmp_path, 2):
        assert step == 20
    checkpointer = Checkpointer(FileStore(tmp_path))
    checkpointer.restore(**parts(0, 1, -1))
    assert checkpointer.problems == ["step-00000020/extra.safetensors: not part of the checkpoint, and not read"]
    assert "extra.safetensors" in checkpointer.verify(20)[0]


def test_a_checkpoint_under_another_step_is_not_loaded(tmp_path):
    make_two_checkpoints(tmp_path)
    (tmp_path / "step-00000020").rename(tmp_path / "step-00000030")
    (step, problems), *_ = restored(tmp_path, 1)
    assert step == 10
    assert "manifest of step 20" in problems[0]


def test_when_all_are_damaged_the_run_does_not_begin_anew(tmp_path):
    make_two_checkpoints(tmp_path)
    for data in tmp_path.glob("*/*-00000-of-*.safetensors"):
        data.unlink()
    live = parts(0, 1, -1)
    with pytest.raises(
        CheckpointError, match=r"none is whole: step-00000020/.*missing; step-00000010/.*missing"
    ) as caught:
        Checkpointer(FileStore(tmp_path)).restore(**live)
    assert "begin anew" in caught.value.hint
    for manifest in tmp_path.glob("*/manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(CheckpointError, match="none is whole"):
        Checkpointer(FileStore(tmp_path)).restore(**live)
    assert live["model"].loads == 0


# what was forged, or written by a program that errs: digests are right, contents are not

HOSTILE = [None, True, -1, 0, 1, 2**31, 2**62, 2**70, 1e308, "", "x", "../../x", "\x00", [], [[]], {}, {"$": "x"}]
HOSTILE += [
    {"$": "array"},
    {"$": "bytes", "base64": "*"},
    {"$": "dict", "items": [[[], 1]]},
    {"$": "float", "value": "x"},
]
HOSTILE += [
    {"$": "scalar", "dtype": "O", "base64": ""},
    {"$": "rank"},
    {"$": "tuple", "items": 3},
    [2**62] * 3,
    "float64",
]


def places_in(node, path=()):
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in items:
        yield from places_in(item, (*path, key))


def forged(body, chance):
    """The JSON with one or two of its parts replaced, removed or doubled."""
    for _ in range(chance.choice([1, 1, 2])):
        path = chance.choice([path for path in places_in(body) if path])
        inner = body
        for key in path[:-1]:
            inner = inner[key]
        match chance.randrange(4):
            case 0 if isinstance(inner, dict):
                del inner[path[-1]]
            case 1 if isinstance(inner, list):
                inner.append(inner[path[-1]])
            case 2 if type(inner[path[-1]]) is int:
                inner[path[-1]] += chance.choice([-1, 1, 8, -(2**40), 2**40])
            case _:
                inner[path[-1]] = chance.choice(HOSTILE)
    return body


def resealed(store, chance):
    """One file of the checkpoint forged, and all digests above it made right again."""
    manifest = unseal(store.get("step-00000001/manifest.json"), "", "manifest")
    if chance.random() < 0.3:
        store.put("step-00000001/manifest.json", seal("manifest", forged(manifest, chance)))
        return
    listed = chance.choice(manifest["indexes"])
    name = f"step-00000001/{listed['name']}"
    data = seal("index", forged(unseal(store.get(name), "", "index"), chance))
    store.put(name, data)
    listed["bytes"], listed["digest"] = len(data), digest_of(data)
    store.put("step-00000001/manifest.json", seal("manifest", manifest))


@pytest.mark.parametrize("seed", range(5))
def test_what_was_forged_is_refused_in_words_and_takes_no_memory(seed):
    chance = random.Random(seed)
    whole = MemoryStore()

    def save(group):
        with Checkpointer(whole, group=group) as checkpointer:
            checkpointer.save(1, metadata={"a": (1, b"x")}, metrics={"loss": 0.5}, **parts(group.rank, 2, 1))

    run_ranks(2, save)
    refused = 0
    for _ in range(60):
        store = MemoryStore()
        for name in whole.names():
            store.put(name, whole.get(name))
        resealed(store, chance)
        tracemalloc.start()
        uses = [
            lambda store=store: Checkpointer(store).restore(partial=True, **parts(0, 1, 0)),
            lambda store=store: Checkpointer(store).restore(partial=True, optimizer=Held()),
            lambda store=store: [examine(store, 1), catalog(store)],
            lambda store=store: list(safetensors_of(store, read_step(store, 1)[1])),
            lambda store=store: whole_states(store, read_step(store, 1)[1]),
        ]
        for use in uses:
            try:
                use()
            except (CheckpointError, StoreError, Damaged):
                refused += 1
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 20_000_000
    assert refused > 60
