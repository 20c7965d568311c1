"""Memory that predictions take, beside what was estimated before: top-1, top-5, all probabilities, streamed.

    python benchmarks/predict_memory.py [--quick]

100,000 samples, 1,000 classes, a linear model, batches of 250. Each row is a process of its own, which first predicts
5,000 samples, so that libraries have what they keep. Then: `arrays`, the bytes of the arrays that came back; `kept`, by
how much the resident memory of the process is larger afterwards; `peak`, by how much it was while it predicted
(VmHWM, which the kernel counts). The estimate is what `predict` logs after its first batch. The last rows are what one
would write by hand: all logits, or probabilities, collected in a list and joined at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring.ranks import environment
from measuring.table import RESULTS, Report, Table
from torch import nn

from trainfleet import LocalBatches, predict
from trainfleet.serve import Predictor, WrittenPredictions

CLASSES, WIDTH, SIZE, WARM = 1000, 64, 250, 5000
TOLERANCE = 0.10
SMALL = 16e6
"""Below it, what a process gains besides the arrays, such as buffers of torch, is more than a tenth."""
CASES: dict[str, dict[str, Any]] = {
    "top-1": {"top_k": 1},
    "top-1, confidence 0.01": {"top_k": 1, "confidence": 0.01},
    "top-5": {"top_k": 5},
    "top-5 and all probabilities": {"top_k": 5, "probabilities": True},
    "the same, streamed to Parquet": {"top_k": 5, "probabilities": True},
}
BY_HAND = "by hand: probabilities, joined at the end"


class Samples:
    """As many as you like, made of few numbers."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._table = np.random.default_rng(0).normal(size=(4096, WIDTH)).astype(np.float32)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self._table[index % 4096] + np.float32(index * 1e-6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 samples")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(options.case, options.samples)))
        return
    samples = 20_000 if options.quick else 100_000
    report = Report(name="predict_memory", summary=__doc__.split("\n\n", 2)[2].rstrip())
    report.add(table_of({case: in_own_process(case, samples) for case in (*CASES, BY_HAND)}, samples))
    report.write(options.results)


def in_own_process(case: str, samples: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", case, "--samples", str(samples)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(case: str, samples: int) -> dict[str, float]:
    """Bytes that one way of predicting takes in this process."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES)
    with tempfile.TemporaryDirectory(prefix="trainfleet-bench-") as folder:
        predicted(case, model, WARM, f"{folder}/warm")
        settle()
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        found = predicted(case, model, samples, f"{folder}/all")
        peak = resident("VmHWM")
        settle()
        kept = resident()
        answer = {"peak": peak - before, "kept": kept - before}
        if isinstance(found, np.ndarray):
            return answer | {"rows": len(found), "arrays": found.nbytes}
        if isinstance(found, WrittenPredictions):
            return answer | {"rows": len(found), "arrays": 0, "disk": found.num_bytes}
        return answer | {"rows": len(found), "arrays": found.measured_bytes, "estimate": found.estimated_bytes}


def predicted(case: str, model: nn.Module, samples: int, folder: str) -> Any:
    batches = LocalBatches(Samples(samples), size=SIZE, shuffle=False, short="keep", epochs=1)
    if case == BY_HAND:
        with torch.no_grad():
            return torch.cat([model(batch["input"]).softmax(-1) for batch in batches]).numpy()
    streamed = {"to": folder} if "Parquet" in case else {}
    return predict(Predictor(model), batches, **CASES[case], **streamed)


def settle() -> None:
    """Give back what is free, so that resident is what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident(name: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def table_of(found: dict[str, dict[str, float]], samples: int) -> Table:
    rows: list[list[str | float | None]] = []
    arrays_off = memory_off = 0.0
    for case, of in found.items():
        estimate = of.get("estimate")
        off = None if estimate is None else of["arrays"] / estimate - 1
        if estimate is not None and off is not None and "confidence" not in case:
            arrays_off = max(arrays_off, abs(off))
            if estimate > SMALL:
                memory_off = max(memory_off, abs(of["kept"] / estimate - 1), abs(of["peak"] / estimate - 1))
        rows.append([
            case, f"{int(of['rows']):,}", _mb(estimate), _mb(of["arrays"]) if of["arrays"] else None,
            None if off is None else f"{off:+.1%}", _mb(of["kept"]), _mb(of["peak"]), _mb(of.get("disk")),
        ])  # fmt: skip
    arrays = f"{'within' if arrays_off <= TOLERANCE else 'NOT within'} {TOLERANCE:.0%}"
    memory = f"{'within' if memory_off <= TOLERANCE else 'NOT within'} {TOLERANCE:.0%}"
    return Table(
        title=f"MB for {samples:,} samples of {CLASSES:,} classes",
        columns=["what", "rows", "estimate", "arrays", "off by", "kept", "peak", "on disk"],
        rows=rows,
        notes=[
            f"The arrays are {arrays} of the estimate (furthest off: {arrays_off:.1%}). The process itself, kept and "
            f"peak, is {memory} of it where the estimate is more than {SMALL / 1e6:.0f} MB ({memory_off:.1%}).",
            "With a confidence the estimate is an upper bound, of which pages are taken only for rows that are kept.",
        ],
    )


def _mb(size: float | None) -> str | None:
    return None if size is None else f"{size / 1e6:,.1f}"


if __name__ == "__main__":
    main()
