"""What torch can do here: its version, the GPUs it sees, and one real collective on each backend."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainfleet.deps import installed
from trainfleet.doctor.finding import Finding
from trainfleet.doctor.probe import Tried, trying
from trainfleet.doctor.torch_trial import PROGRAM

TESTED = ("2.13",)
OLDEST = (2, 11)
DEADLINE = timedelta(seconds=90)
"""For all that torch tries: its import alone takes half of that on a busy host with a cold disk."""


def torch_tried(*, quick: bool = False) -> AbstractContextManager[Callable[[], list[Tried]]]:
    """Begin to try torch, in a process of its own: its import takes seconds, in which other things are looked at.

    Nothing is begun where it is not installed, or if `quick`.
    """
    return trying([] if quick or installed("torch") is None else [PROGRAM], deadline=DEADLINE)


def check_torch(tried: list[Tried], variables: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Torch, GPUs, NCCL, gloo, and a collective that was really made."""
    if not tried:
        yield Finding(
            subject="torch",
            fact="is not installed: configuration, stores and this command work, training does not",
            verdict="no",
            remedy='pip install "trainfleet[torch]"',
        )
        return
    facts = _facts(tried[0].output)
    if not facts:
        remedy = 'Install it again: pip install --force-reinstall "trainfleet[torch]". A mixture of CUDA libraries of '
        remedy += "several builds is the usual cause, a file named torch.py where you stand the second."
        fact = f"does not load: {_ending(tried[0])}"
        yield Finding(subject="torch", fact=fact, verdict="no", remedy=remedy)
        return
    about, collectives = facts[0], [fact for fact in facts if "backend" in fact]
    yield _version(about["version"])
    yield from _gpus(about, next((fact["gpus"] for fact in facts if "gpus" in fact), []), variables)
    if not about["gloo"]:
        remedy = "This build of torch has no gloo: CPU ranks cannot meet. Take the build of PyPI or pytorch.org."
        yield Finding(subject="gloo", fact="is missing", verdict="no", remedy=remedy)
    for each in collectives:
        yield _collective(each)
    if tried[0].returncode != 0:
        remedy = "Run it alone to see more: python -X faulthandler -m trainfleet.doctor.torch_trial"
        yield Finding(subject="torch's trial", fact=f"ended early: {_ending(tried[0])}", verdict="no", remedy=remedy)


def _facts(output: str) -> list[dict[str, Any]]:
    """The lines that torch_trial printed; other lines, which libraries print, are left out."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]


def _ending(tried: Tried) -> str:
    if tried.returncode is None:
        return f"no answer in {DEADLINE.seconds} s"
    code = tried.returncode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{tried.error} ({how})" if tried.error else how


def _version(version: str) -> Finding:
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        remedy = 'trainfleet needs torch 2.11 or newer: pip install -U "trainfleet[torch]"'
        return Finding(subject="torch", fact=version, verdict="no", remedy=remedy)
    if any(version.startswith(tested + ".") for tested in TESTED):
        return Finding(subject="torch", fact=f"{version}, tested with this release")
    remedy = f"If a run behaves oddly, try torch {TESTED[-1]}; `make test` tells whether this one works."
    return Finding(subject="torch", fact=f"{version}, not tested with this release", verdict="note", remedy=remedy)


def _gpus(about: dict[str, Any], gpus: list[str], variables: Mapping[str, str]) -> Iterator[Finding]:
    driver = nvidia_driver()
    chosen = variables.get("CUDA_VISIBLE_DEVICES")
    if gpus:
        for number, gpu in enumerate(gpus):
            yield Finding(subject=f"GPU {number}", fact=gpu)
        yield Finding(subject="CUDA", fact=f"{about['cuda']}, driver {driver or 'of unknown version'}")
        if about["nccl"]:
            yield Finding(subject="NCCL", fact=about["nccl"])
        else:
            remedy = "Several GPUs cannot work together without it; take the build of PyPI or pytorch.org."
            yield Finding(subject="NCCL", fact="is missing", verdict="no", remedy=remedy)
    elif driver and about["cuda"] is None:
        remedy = "Install the CUDA build of torch: see pytorch.org/get-started."
        yield Finding(
            subject="GPU", fact=f"driver {driver} is there, but torch is a CPU build", verdict="no", remedy=remedy
        )
    elif driver and chosen is not None and not about["count"]:
        fact = f"driver {driver} is there, but CUDA_VISIBLE_DEVICES={chosen!r} names none of its GPUs"
        remedy = "unset CUDA_VISIBLE_DEVICES, or name some: CUDA_VISIBLE_DEVICES=0,1. `nvidia-smi -L` lists them."
        yield Finding(subject="GPU", fact=fact, verdict="no", remedy=remedy)
    elif driver:
        remedy = "Look at `nvidia-smi`, and whether the driver is new enough for this CUDA."
        fact = f"driver {driver} is there, but torch (CUDA {about['cuda']}) can use no GPU"
        yield Finding(subject="GPU", fact=fact, verdict="no", remedy=remedy)
    else:
        yield Finding(subject="GPU", fact="none: ranks run on the CPU and meet by gloo")


def nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the kernel's NVIDIA driver, or None."""
    try:
        match = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", path.read_text())
    except OSError:
        return None
    return match[1] if match else "unknown"


def _collective(fact: dict[str, Any]) -> Finding:
    backend = fact["backend"]
    subject = f"{backend} x {fact['size']}"
    if "error" not in fact:
        rate = fact["bytes"] / fact["seconds"]
        took = f"{fact['bytes'] / 1e6:.1f} MB in {fact['seconds'] * 1000:.1f} ms, {rate / 1e9:.2g} GB/s"
        return Finding(subject=subject, fact=f"all_reduce works: {took}")
    if not fact.get("tried", True):
        return Finding(subject=subject, fact=fact["error"], verdict="note", remedy="trainfleet is tested on Linux.")
    variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME (and NCCL_DEBUG=INFO to see why)"
    remedy = f"Set {variable} to an interface that works, such as lo or eth0, or unset it; see docs/doctor.md."
    return Finding(subject=subject, fact=f"all_reduce fails: {fact['error']}", verdict="no", remedy=remedy)
