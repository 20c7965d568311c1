"""`trainfleet checkpoint`: what stands in a folder of checkpoints, whether it is whole, and ways in and out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trainfleet.cli.table import print_json, print_table
from trainfleet.errors import CheckpointError, ConfigError, DamageFound
from trainfleet.plan import Plan

if TYPE_CHECKING:
    from trainfleet.checkpoint.catalog import Entry
    from trainfleet.checkpoint.whole import Whole

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
FORCE = typer.Option(False, "--force", help="Replace what is there.")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@app.command("list")
def list_(place: str = PLACE, as_json: bool = AS_JSON) -> None:
    """The checkpoints that stand, newest commit last. Only manifests and indexes are read; see `verify`."""
    from trainfleet.checkpoint.catalog import catalog, open_place

    store, named = open_place(place)
    entries = [entry for entry in catalog(store) if named in (None, entry.step)]
    entries.sort(key=lambda entry: (entry.order or 0, entry.step))
    if as_json:
        print_json([_plain(entry) for entry in entries])
        return
    if not entries:
        print(f"There are no checkpoints in {place}.")
        return
    head = ("step", "saved", "size", "ranks", "plan", "metrics", "")
    print_table(head, [_row(entry) for entry in entries], right={"step", "size", "ranks"})


@app.command()
def inspect(place: str = PLACE, step: int | None = STEP, as_json: bool = AS_JSON) -> None:
    """What one checkpoint holds: states, arrays, metrics, the plan it was saved by."""
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
        print_json({**_plain(entry), "states": listed, "files": [asdict(file) for file in manifest.files]})
        return
    ranks = f"{entry.world_size} rank{'s' * (entry.world_size != 1)}"
    print(f"step {entry.step}, saved {_when(entry)} by {ranks}, {readable_bytes(entry.num_bytes or 0)}")
    if entry.problem:
        print(f"not usable: {entry.problem}")
    for name, value in (entry.metrics or {}).items():
        print(f"metric  {name} {value:g}")
    if plan := _plan(entry):
        print(f"plan    {plan}")
    for name, value in (entry.metadata or {}).items():
        if name != "recipe":
            print(f"note    {name} {value}")
    for file in manifest.files:
        print(f"file    {file.name}  {readable_bytes(file.num_bytes)}")
    for name, found in arrays.items():
        print(f"state   {name}: {len(found)} array{'s' * (len(found) != 1)}")
        width = max((len(array.path) for array in found), default=0) - len(name)
        for array in found:
            print(f"        {array.path[len(name) + 1 :]:<{width}} {array.dtype:<9} {list(array.shape)}")


@app.command()
def verify(place: str = PLACE, step: int | None = STEP, as_json: bool = AS_JSON) -> None:
    """Read every byte of all checkpoints, or of one, and compare digests. Exit code 14 if bytes are wrong."""
    from trainfleet.checkpoint.catalog import examine, open_place, steps_in
    from trainfleet.checkpoint.names import folder_of
    from trainfleet.cli.progress import Progress

    store, named = open_place(place)
    verdicts = []
    for each in steps_in(store, step if step is not None else named):
        with Progress(folder_of(each)) as progress:
            verdict = examine(store, each, progress.add)
        verdicts.append(verdict)
        if not as_json:
            print(f"{folder_of(each)}  {verdict.state}")
            for problem in verdict.problems:
                print(f"    {problem}")
            for name in verdict.surplus:
                print(f"    {name}: not part of the checkpoint")
    if as_json:
        print_json([asdict(verdict) for verdict in verdicts])
    if damaged := sum(verdict.state == "damaged" for verdict in verdicts):
        raise DamageFound(
            f"Of {len(verdicts)} checkpoint{'s' * (len(verdicts) > 1)} {damaged} cannot be used.",
            hint="A run passes over them and goes on from the newest whole one; remove them when you have looked.",
        )
    if unreadable := [verdict for verdict in verdicts if verdict.state == "unreadable"]:
        raise CheckpointError(unreadable[0].problems[0])


@app.command()
def export(
    place: str = PLACE,
    output: Path = typer.Argument(..., help="A .safetensors file; a folder with --shard-size.", metavar="OUTPUT"),
    step: int | None = STEP,
    state: str = STATE,
    dtype: str | None = typer.Option(None, "--dtype", help="Round floats to it.", metavar="fp32|bf16|fp16"),
    shard_size: str | None = typer.Option(None, "--shard-size", help="Files of at most so much, such as 5GB."),
    universal: bool = typer.Option(False, "--universal", help="With the optimizer, as DeepSpeed's universal folder."),
    force: bool = FORCE,
) -> None:
    """Weights as safetensors, which load without trainfleet. Whole arrays, also from ZeRO-3; nothing unverified."""
    from trainfleet.checkpoint.catalog import open_place, read_step
    from trainfleet.checkpoint.export import PRECISIONS, SHARDS, arrays_of, export_file, export_folder, groups_of
    from trainfleet.checkpoint.sealed import Damaged
    from trainfleet.checkpoint.whole import Whole
    from trainfleet.cli.progress import Progress
    from trainfleet.monitor.units import readable_bytes

    if universal:
        _export_universal(place, step, output, force)
        return
    if dtype is not None and dtype not in PRECISIONS:
        raise ConfigError(f"--dtype is {dtype!r}; allowed: one of {', '.join(PRECISIONS)}.")
    most = _size(shard_size) if shard_size else None
    if most is None and output.is_dir():
        raise CheckpointError(f"{output} is a folder.", hint="Name a file in it, or write several with --shard-size.")
    there = output.exists() if most is None else any(output.glob(SHARDS)) or output.is_file()
    if there and not force:
        raise CheckpointError(f"{output} exists already.", hint="Name another output, or replace it with --force.")
    store, named = open_place(place)
    manifest, indexes = read_step(store, step if step is not None else named)
    want = PRECISIONS[dtype] if dtype else None
    try:
        with Whole(store, indexes) as whole, Progress(str(output)) as progress:
            arrays = arrays_of(whole, state)
            if most is None:
                total = export_file(whole, arrays, output, want, progress.watch)
            else:
                total = export_folder(whole, groups_of(arrays, want, most), output, want, progress.watch)
    except Damaged as error:
        raise DamageFound(f"Step {manifest.step} was not exported: {error}") from error
    print(f"step {manifest.step}: {len(arrays)} arrays, {readable_bytes(total)}, in {output}")


def _export_universal(place: str, step: int | None, output: Path, force: bool) -> None:
    from trainfleet.checkpoint.catalog import open_place, read_step
    from trainfleet.checkpoint.foreign.deepspeed import is_universal, write_universal
    from trainfleet.checkpoint.sealed import Damaged
    from trainfleet.checkpoint.whole import Whole
    from trainfleet.cli.progress import Progress

    if is_universal(output) and not force:
        raise CheckpointError(f"{output} exists already.", hint="Name another output, or replace it with --force.")
    store, named = open_place(place)
    manifest, indexes = read_step(store, step if step is not None else named)
    try:
        with Whole(store, indexes) as whole, Progress(str(output)) as progress:
            made = write_universal(whole, output, manifest.step, progress.add)
    except Damaged as error:
        raise DamageFound(f"Step {manifest.step} was not exported: {error}") from error
    print(f"step {manifest.step}: model and optimizer for DeepSpeed (checkpoint.load_universal), in {made}")


@app.command("import")
def import_(
    source: Path = typer.Argument(
        ..., help="A .safetensors or .pt file; a folder of safetensors, of DCP, or DeepSpeed's universal."
    ),
    output: str = typer.Argument(..., help="The folder of checkpoints to save into, or its URL.", metavar="OUTPUT"),
    step: int = typer.Option(0, "--step", help="As the checkpoint of this step.", min=0),
    state: str = typer.Option("model", "--state", help="As this state."),
    strip_prefix: str | None = typer.Option(
        None, "--strip-prefix", help="Take this off all names.  [default: what DDP, FSDP and torch.compile put there]"
    ),
    only: str | None = typer.Option(None, "--only", help="Take only the arrays whose names begin so."),
    force: bool = FORCE,
) -> None:
    """Weights of others as a checkpoint, for `model.init_from` and `Checkpointer.restore`. Nothing in them is run."""
    from trainfleet.checkpoint.foreign import import_arrays, import_states, open_foreign
    from trainfleet.checkpoint.foreign.deepspeed import arrays_of, is_universal, open_universal
    from trainfleet.checkpoint.names import folder_of
    from trainfleet.cli.progress import Progress
    from trainfleet.monitor.units import readable_bytes
    from trainfleet.store import open_store

    metadata = {"imported_from": str(source)}
    if is_universal(source):
        states = open_universal(source)
        with Progress(str(source), sum(array.num_bytes for array in arrays_of(states))) as progress:
            import_states(open_store(output), states, step=step, metadata=metadata, replace=force, tell=progress.add)
        print(f"{len(states['model'])} parameters and their optimizer, as {folder_of(step)} in {output}")
        return
    found = open_foreign(source, strip=strip_prefix, only=only)
    with Progress(str(source), found.num_bytes) as progress:
        import_arrays(
            open_store(output),
            found.arrays,
            step=step,
            state=state,
            metadata=metadata,
            replace=force,
            tell=progress.add,
        )
    for remark in found.remarks:
        print(remark)
    size = readable_bytes(found.num_bytes)
    print(f"{len(found.arrays)} arrays, {size}, as state {state!r} of {folder_of(step)} in {output}")


@app.command()
def diff(
    first: str = typer.Argument(..., help="A checkpoint, named as for the other commands.", metavar="FIRST"),
    second: str = typer.Argument(..., help="Another.", metavar="SECOND"),
    first_step: int | None = typer.Option(None, "--first-step", help="Of the first.  [default: the newest]"),
    second_step: int | None = typer.Option(None, "--second-step", help="Of the second.  [default: the newest]"),
    state: str | None = typer.Option(None, "--state", help="Only this state.  [default: all, and what goes with them]"),
    as_json: bool = AS_JSON,
) -> None:
    """How two checkpoints differ, however they were cut. Exit code 0 if all states are equal to the bit, 1 if not."""
    from trainfleet.checkpoint.catalog import describe, open_place, read_step
    from trainfleet.checkpoint.diff import differences, value_differences
    from trainfleet.checkpoint.sealed import Damaged
    from trainfleet.checkpoint.whole import Whole
    from trainfleet.cli.progress import Progress

    def opened(place: str, step: int | None) -> tuple[Entry, Whole]:
        store, named = open_place(place)
        manifest, indexes = read_step(store, step if step is not None else named)
        return describe(store, manifest.step), Whole(store, indexes, progress.add)

    found, beside = [], []
    try:
        with Progress("comparing") as progress:
            one, first_whole = opened(first, first_step)
            other, second_whole = opened(second, second_step)
            with first_whole, second_whole:
                found = list(differences(first_whole, second_whole, state))
    except Damaged as error:
        raise DamageFound(f"They cannot be compared: {error}") from error
    if state is None:
        for name in ("metadata", "metrics"):
            beside += value_differences(getattr(one, name) or {}, getattr(other, name) or {}, name)
    if as_json:
        print_json({"states": [asdict(each) for each in found], "beside": [asdict(each) for each in beside]})
    else:
        for each in [*found, *beside]:
            print(f"{each.path}{'' if each.rank is None else f' of rank {each.rank}'}  {each.what}")
        if not found:
            print("The states are equal to the bit." if beside else "They are equal to the bit.")
        if state is None and one.world_size != other.world_size:
            ranks = f"{one.world_size} and {other.world_size} ranks"
            print(f"Saved by {ranks}: what each rank has of its own was compared as far as both have that rank.")
    raise typer.Exit(1 if found else 0)


def _plain(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if value is not None}


def _when(entry: Entry) -> str:
    return (
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.saved_at)) if entry.saved_at else "at an unknown time"
    )


def _plan(entry: Entry) -> str:
    """What of the plan is not usual, and always its stage and precision."""
    recipe = (entry.metadata or {}).get("recipe")
    plan = recipe.get("plan") if isinstance(recipe, Mapping) else None
    if not isinstance(plan, Mapping):
        return ""
    usual = {each.name: each.default for each in fields(Plan) if each.name not in ("zero", "precision")}
    words = {key: value for key, value in plan.items() if isinstance(value, str | int)}
    return " ".join(f"{key}={value}" for key, value in words.items() if value != usual.get(key))


def _row(entry: Entry) -> tuple[str, ...]:
    from trainfleet.monitor.units import readable_bytes

    problem = f"not usable: {entry.problem}" if entry.problem else ""
    if entry.order is None:
        return (str(entry.step), "", "", "", "", "", problem)
    metrics = " ".join(f"{name} {value:.4g}" for name, value in (entry.metrics or {}).items())
    size = readable_bytes(entry.num_bytes or 0)
    return (str(entry.step), _when(entry), size, str(entry.world_size), _plan(entry), metrics, problem)


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
