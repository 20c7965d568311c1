"""NaN planted at known places, one at a time: which module and which sample are named, and how long the hunt takes.

A hunt is right where the kind, the module, the words that tell the place, the ranks and the index of the one sample
that it comes from are all those that were planted. Beside it, what torch.autograd.set_detect_anomaly says of the same
plants in a plain loop; Lightning's Trainer(detect_anomaly=True) switches the same on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring.table import RESULTS, Report, Table
from proof.plants import PLANTS, Plant, hunt, hunt_numbered, wrong_in
from proof.rows import MARKED, SAMPLES, Net, Points, squares

from trainfleet import launch
from trainfleet.mesh import Mesh
from trainfleet.parallel import make_engine, parallelize
from trainfleet.plan import Plan
from trainfleet.training.inspection import Finding, Inspector
from trainfleet.training.watchers.before import Before
from trainfleet.training.watchers.watcher import UnderWay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(name="nan_hunt", summary=str(__doc__))
    report.add(planted(PLANTS[:2] if options.quick else PLANTS))
    report.add(times(3 if options.quick else 9))
    report.add(clean(2 if options.quick else 20))
    report.write(options.results)


def planted(plants: list[Plant]) -> Table:
    rows: list[list[str | float | None]] = []
    right = 0
    for plant in plants:
        found = hunted(plant)
        wrong = wrong_in(plant, found)
        right += wrong is None
        assert found is not None or wrong is not None
        said = found.what if found is not None else "nothing"
        sample = f"{', '.join(map(str, found.indices))}" if found is not None and plant.of_sample else None
        plan = f"{plant.nproc} ranks, {_words(plant)}" if plant.nproc > 1 else "1 process"
        rows.append([plant.name, plan, said + (f" (WRONG: {wrong})" if wrong else ""), sample, detect_anomaly(plant)])
        print(rows[-1], flush=True)
    return Table(
        title="What is named first",
        columns=["planted", "on", "trainfleet says", "sample", "torch.autograd.set_detect_anomaly says"],
        rows=rows,
        notes=[
            f"{right} of {len(plants)} are named rightly: kind, module, words, ranks, and the sample, which is number "
            f"{MARKED} of {SAMPLES} where it comes from one. A dash in the fourth column: it comes from all samples. A "
            "dash in the last: not tried, for it takes several processes or steps. It looks at backward alone, so of "
            "what forward made it names the first operator that backward meets, mostly the loss; it says nothing of "
            "samples and ranks."
        ],
    )


def hunted(plant: Plant) -> Finding | None:
    if plant.nproc == 1:
        return hunt(plant)
    found: list[Finding | None] = launch(hunt_numbered, plant.nproc, (PLANTS.index(plant),))
    return found[0]


def _words(plant: Plant) -> str:
    return " ".join(f"{name}={value}" for name, value in plant.plan.items())


def detect_anomaly(plant: Plant) -> str | None:
    """What torch says of the same plant in a plain loop: its error, or what it lets pass."""
    if plant.nproc > 1 or plant.breaks is not None or plant.breaks_buffer:
        return None
    torch.manual_seed(0)
    model = plant.net()
    if plant.into is not None:
        plant.into(model)
    batch = _rows(plant.points())
    import warnings

    with warnings.catch_warnings(record=True) as told, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            loss = plant.loss(model(batch["input"]), batch)
            total: Any = loss.total
            total.backward()
        except RuntimeError as error:
            line = str(error).split(".")[0].strip()
            code = [text for each in told for text in str(each.message).splitlines() if text.startswith("    ")]
            return f"{line}; forward call: `{code[-1].strip()}`" if code else line
    return "nothing" + ("" if math.isfinite(float(total.detach())) else f", the loss is {float(total.detach())}")


def times(rounds: int) -> Table:
    """Steps, hunts, and steps with detect_anomaly, in turn, so that all meet the same load."""
    sizes: list[tuple[str, Callable[[], Any], Any]] = [
        ("the small net", Net, lambda: _rows(Points())),
        ("the recipe's GPT", _gpt, _tokens),
    ]
    rows: list[list[str | float | None]] = []
    for name, build, batch in sizes:
        with Mesh.from_env(Plan(), device="cpu") as mesh:
            rows.append([name, *_times_of(build, batch(), mesh, rounds)])
        print(rows[-1], flush=True)
    return Table(
        title="What it costs",
        columns=[
            "model",
            "a step, ms",
            "waiting, microseconds",
            "a hunt / step",
            "detect_anomaly / step",
            "step / itself",
        ],
        rows=rows,
        notes=[
            "Medians. Waiting: what an Inspector takes of a step that is finite. A hunt: the step that is not finite "
            "is run again with all modules watched, at most three times in a run. detect_anomaly has to be on in "
            "every step to see the one. Step / itself: the same loop timed twice."
        ],
    )


def _times_of(build: Callable[[], Any], batch: Any, mesh: Mesh, rounds: int) -> list[float]:
    torch.manual_seed(0)
    model = parallelize(build(), mesh, Plan())
    loss = squares if isinstance(model, Net) else _token_loss
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-4), loss)
    inspector = Inspector(Before(model), [], clip_norm=1.0)

    def step() -> None:
        engine.forward_backward([batch])
        engine.clip(1.0)
        engine.step()

    def waiting() -> None:
        inspector.before.begin(1, [batch])
        inspector.explain(_under_way(1.0, 1.0))

    def _under_way(loss: float, norm: float) -> UnderWay:
        return UnderWay(step=1, micro_batches=[batch], engine=engine, loss=loss, grad_norm=norm, loss_scale=None)

    def detected() -> None:
        with torch.autograd.set_detect_anomaly(True):
            step()

    def hunting() -> None:
        engine.forward_backward([batch])
        inspector.before.begin(1, [batch])
        inspector.inspect(_under_way(math.nan, math.nan))
        engine.step()

    for _ in range(3):
        waiting()
        step()
    kinds = [step, hunting, detected, step]
    taken: list[list[float]] = [[] for _ in kinds]
    for _ in range(rounds):
        for kind, seconds in zip(kinds, taken):
            begun = time.perf_counter()
            kind()
            seconds.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    for _ in range(500):
        waiting()
    waited = (time.perf_counter() - begun) / 500
    plain, *others = (statistics.median(each) for each in taken)
    return [plain * 1e3, waited * 1e6, *(each / plain for each in others)]


def _rows(points: Any) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(points[i][name]) for i in range(SAMPLES)]) for name in points[0]}


def _gpt() -> Any:
    from proof.models import gpt

    return gpt()


def _tokens() -> dict[str, torch.Tensor]:
    tokens = torch.randint(96, (16, 65), generator=torch.Generator().manual_seed(0))
    return {"input": tokens[:, :-1], "target": tokens[:, 1:]}


def _token_loss(output: Any, batch: Any) -> Any:
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), batch["target"].flatten())


def clean(seeds: int) -> Table:
    """Steps without a plant, looked at as if they had one."""
    plant = Plant(name="nothing", kind="", module=None)
    found = sum(hunt(plant, steps=10 + seed % 3) is not None for seed in range(seeds))
    return Table(
        title="Where nothing is planted",
        columns=["runs", "findings"],
        rows=[[str(seeds), str(found)]],
    )


if __name__ == "__main__":
    main()
