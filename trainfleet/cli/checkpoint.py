"""`trainfleet checkpoint`: what stands in a folder of checkpoints, whether it is whole, and ways in and out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trainfleet.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from trainfleet.checkpoint.catalog import Entry
    from trainfleet.store import Buffer

app = typer.Typer(
    help="List, inspect, verify, export, import and compare checkpoints.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

PLACE = typer.Argument(
    ..., help="A run folder, a folder of checkpoints, the folder of one step, or a URL.", metavar="PLACE"
)
STEP = typer.Option(None, "--step", help="Of this step.  [default: the newest whole one]")
AS_JSON = typer.Option(False, "--json", help="As JSON, for programs.")
STATE = typer.Option("model", "--state", help="Which of the saved states.")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@app.command("list")
def list_(place: str = PLACE, as_json: bool = AS_JSON) -> None:
    """The checkpoints that stand, newest commit last. Only manifests and indexes are read; see `verify`."""
    from trainfleet.checkpoint.catalog import catalog, open_place

    store, _ = open_place(place)
    entries = sorted(catalog(store), key=lambda entry: (entry.order or 0, entry.step))
    if as_json:
        print(json.dumps([_plain(entry) for entry in entries], indent=2))
        return
    if not entries:
        print(f"There are no checkpoints in {place}.")
    rows = [("step", "saved", "size", "ranks", "metrics", "")] * bool(entries) + [_row(entry) for entry in entries]
    widths = [max(len(row[column]) for row in rows) for column in range(5)] if rows else []
    for row in rows:
        cells = [
            f"{cell:>{width}}" if i in (0, 2, 3) else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        print("  ".join([*cells, row[5]]).rstrip())


@app.command()
def inspect(place: str = PLACE, step: int | None = STEP, as_json: bool = AS_JSON) -> None:
    """What one checkpoint holds: states, arrays, metrics, the recipe it was saved by."""
    from trainfleet.checkpoint.catalog import describe, open_place, read_step
    from trainfleet.checkpoint.whole import Whole
    from trainfleet.monitor.units import readable_bytes

    store, named = open_place(place)
    manifest, indexes = read_step(store, step if step is not None else named)
    entry = describe(store, manifest.step)
    with Whole(store, indexes) as whole:
        arrays = {name: list(whole.arrays(name)) for name in whole.states}
    if as_json:
        listed = {
            n: [{"path": a.path, "dtype": a.dtype, "shape": a.shape} for a in found] for n, found in arrays.items()
        }
        print(json.dumps({**_plain(entry), "states": listed}, indent=2))
        return
    print(
        f"step {entry.step}, saved {_when(entry)} by {entry.world_size} ranks, {readable_bytes(entry.num_bytes or 0)}"
    )
    for name, value in (entry.metrics or {}).items():
        print(f"metric  {name} {value:g}")
    plan = dict((entry.metadata or {}).get("recipe", {}).get("plan", {}))
    if plan:
        print("plan    " + " ".join(f"{key}={value}" for key, value in plan.items() if value not in (None, [], "none")))
    for file in manifest.files:
        print(f"file    {file.name}  {readable_bytes(file.num_bytes)}")
    for name, found in arrays.items():
        print(f"state   {name}: {len(found)} array{'s' * (len(found) != 1)}")
        for array in found:
            print(f"        {array.path.partition('/')[2]:<44} {array.dtype:<9} {list(array.shape)}")


@app.command()
def verify(place: str = PLACE, step: int | None = STEP) -> None:
    """Read every byte of all checkpoints, or of one, and compare digests. Exit code 7 if anything is wrong."""
    from trainfleet.checkpoint.catalog import open_place
    from trainfleet.checkpoint.names import folder_of, steps_and_files
    from trainfleet.checkpoint.restore import verify as problems_of

    store, named = open_place(place)
    chosen = step if step is not None else named
    steps = sorted(steps_and_files(store.names())) if chosen is None else [chosen]
    if not steps:
        raise CheckpointError(f"There are no checkpoints in {place}.")
    damaged = 0
    for each in steps:
        problems = problems_of(store, each)
        wrong = [problem for problem in problems if not problem.endswith("not part of the checkpoint")]
        print(f"{folder_of(each)}  {'damaged' if wrong else 'whole'}")
        for problem in problems:
            print(f"    {problem}")
        damaged += bool(wrong)
    if damaged:
        raise CheckpointError(
            f"Of {len(steps)} checkpoints {damaged} cannot be used.",
            hint="A run passes over them and goes on from the newest whole one; remove them when you have looked.",
        )


@app.command()
def export(
    place: str = PLACE,
    output: Path = typer.Argument(..., help="A .safetensors file; a folder with --shard-size.", metavar="OUTPUT"),
    step: int | None = STEP,
    state: str = STATE,
    dtype: str | None = typer.Option(None, "--dtype", help="Round floats to it.", metavar="fp32|bf16|fp16"),
    shard_size: str | None = typer.Option(None, "--shard-size", help="Files of at most so much, such as 5GB."),
    force: bool = typer.Option(False, "--force", help="Replace what is there."),
) -> None:
    """Weights as safetensors, which load without trainfleet. Whole arrays, also from ZeRO-3; nothing unverified."""
    from trainfleet.checkpoint.catalog import open_place, read_step
    from trainfleet.checkpoint.export import PRECISIONS, arrays_of, file_of, groups_of, index_of
    from trainfleet.checkpoint.sealed import Damaged
    from trainfleet.checkpoint.whole import Whole
    from trainfleet.monitor.units import readable_bytes
    from trainfleet.store import FileStore

    if dtype is not None and dtype not in PRECISIONS:
        raise ConfigError(f"--dtype is {dtype!r}; allowed: one of {', '.join(PRECISIONS)}.")
    most = _size(shard_size) if shard_size else None
    if (output.exists() if most is None else output.is_dir() and any(output.iterdir())) and not force:
        raise CheckpointError(f"{output} exists already.", hint="Name another output, or replace it with --force.")
    store, named = open_place(place)
    manifest, indexes = read_step(store, step if step is not None else named)
    want = PRECISIONS[dtype] if dtype else None
    try:
        with Whole(store, indexes) as whole:
            arrays = arrays_of(whole, state)
            groups = [arrays] if most is None else groups_of(arrays, want, most)
            names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
            folder = FileStore(output.parent if most is None else output)
            total = 0
            for name, group in zip([output.name] if most is None else names, groups):
                total += folder.put(name, _shown(file_of(whole, group, want), name))
            if most is not None:
                folder.put("model.safetensors.index.json", index_of(names, groups, want))
    except Damaged as error:
        raise CheckpointError(f"Step {manifest.step} was not exported: {error}") from error
    print(f"step {manifest.step}: {len(arrays)} arrays, {readable_bytes(total)}, in {output}")


@app.command("import")
def import_(
    source: Path = typer.Argument(..., help="A safetensors or .pt file, a folder of either kind, or a DCP."),
    output: Path = typer.Argument(..., help="The folder of checkpoints to save into."),
    step: int = typer.Option(0, "--step", help="As the checkpoint of this step.", min=0),
    state: str = STATE,
    strip_prefix: str | None = typer.Option(
        None, "--strip-prefix", help="Take this from all names.  [default: module. and _orig_mod. where all have it]"
    ),
    force: bool = typer.Option(False, "--force", help="Replace a checkpoint of that step."),
) -> None:
    """Weights of others as a checkpoint, for `model.init_from` and `Checkpointer.restore`. Nothing is unpickled."""
    from trainfleet.checkpoint import Checkpointer, Retention
    from trainfleet.checkpoint.foreign import read_foreign, renamed
    from trainfleet.store import FileStore

    checkpointer = Checkpointer(FileStore(output), retention=Retention(last=1_000_000))
    with checkpointer:
        if step in checkpointer.steps() and not force:
            raise CheckpointError(
                f"{checkpointer.place(step)} exists already.", hint="Name another --step, or replace it with --force."
            )
        tensors, prefix = renamed(read_foreign(source), strip_prefix)
        states: dict[str, Any] = {state: _Imported(tensors)}
        checkpointer.save(step, metadata={"imported_from": str(source)}, **states).wait()
    if prefix:
        print(f"names without {prefix!r}")
    print(f"{len(tensors)} tensors as state {state!r} in {checkpointer.place(step)}")


@app.command()
def diff(
    first: str = typer.Argument(..., help="A checkpoint, named as for the other commands.", metavar="FIRST"),
    second: str = typer.Argument(..., help="Another.", metavar="SECOND"),
    first_step: int | None = typer.Option(None, "--first-step", help="Of the first.  [default: the newest]"),
    second_step: int | None = typer.Option(None, "--second-step", help="Of the second.  [default: the newest]"),
    state: str | None = typer.Option(None, "--state", help="Only this state.  [default: all]"),
    as_json: bool = AS_JSON,
) -> None:
    """How two checkpoints differ, however they were cut. Exit code 0 if they are equal to the bit, 1 if not."""
    from trainfleet.checkpoint.catalog import open_place, read_step
    from trainfleet.checkpoint.diff import differences
    from trainfleet.checkpoint.sealed import Damaged
    from trainfleet.checkpoint.whole import Whole

    def opened(place: str, step: int | None) -> Whole:
        store, named = open_place(place)
        return Whole(store, read_step(store, step if step is not None else named)[1])

    found: list[Any] = []
    try:
        with opened(first, first_step) as one, opened(second, second_step) as other:
            for each in differences(one, other, state):
                found.append(each)
                if not as_json:
                    print(f"{each.path}  {each.what}")
    except Damaged as error:
        raise CheckpointError(f"They cannot be compared: {error}") from error
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    elif not found:
        print("They are equal to the bit.")
    raise typer.Exit(1 if found else 0)


class _Imported:
    """Stateful: tensors by name, to be saved."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        from trainfleet.state import ShardedArray

        return {
            name: ShardedArray(name=name, global_shape=tuple(t.shape), offsets=(0,) * t.ndim, local=t.contiguous())
            for name, t in self._tensors.items()
        }

    def load_state_dict(self, state: Any, /) -> None:
        self._tensors = dict(state)


def _plain(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if value is not None}


def _when(entry: Entry) -> str:
    return (
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.saved_at)) if entry.saved_at else "at an unknown time"
    )


def _row(entry: Entry) -> tuple[str, ...]:
    from trainfleet.monitor.units import readable_bytes

    if entry.order is None:
        return (str(entry.step), "", "", "", "", f"not usable: {entry.problem}")
    metrics = " ".join(f"{name} {value:.4g}" for name, value in (entry.metrics or {}).items())
    size = readable_bytes(entry.num_bytes or 0)
    problem = f"not usable: {entry.problem}" if entry.problem else ""
    return (str(entry.step), _when(entry), size, str(entry.world_size), metrics, problem)


def _size(text: str) -> int:
    """Bytes of `5GB`, `500M`, `1000`."""
    digits = text.upper().removesuffix("B")
    unit = digits[-1] if digits[-1:] in UNITS and not digits[-1:].isdigit() else ""
    try:
        size = int(float(digits.removesuffix(unit) if unit else digits) * UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"--shard-size is {text!r}; write a size such as 5GB or 500MB.")
    return size


def _shown(chunks: Iterable[Buffer], name: str) -> Iterator[Buffer]:
    """The same chunks; in a terminal, with how far they have come."""
    import sys

    from trainfleet.monitor.units import readable_bytes

    done, told = 0, time.monotonic()
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if sys.stderr.isatty() and time.monotonic() - told > 0.5:
            told = time.monotonic()
            print(f"\r{name}  {readable_bytes(done)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
