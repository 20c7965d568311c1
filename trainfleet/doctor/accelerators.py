"""What torch can do here: its version, the GPUs it sees, and one real collective on each backend."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainfleet.deps import installed
from trainfleet.doctor.finding import Finding
from trainfleet.doctor.probe import try_programs

TESTED = ("2.13",)
OLDEST = (2, 11)
DEADLINE = timedelta(seconds=90)  # two cold imports of torch on a busy host take half of it

_ABOUT_TORCH = """
import json, torch
about = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "nccl": None, "gloo": False}
if torch.distributed.is_available():
    about["gloo"] = torch.distributed.is_gloo_available()
    if torch.distributed.is_nccl_available():
        about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        about["gpus"].append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB")
print(json.dumps(about))
"""

_COLLECTIVE = """
import datetime, time, torch, torch.distributed as dist
backend, rank, size = {backend!r}, {rank}, {size}
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(
    backend, init_method={meeting!r}, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=45)
)
numbers = torch.full((1000,), float(rank + 1), device=device)
dist.all_reduce(numbers)
if not bool((numbers == size * (size + 1) / 2).all()):
    raise SystemExit("the sum over the ranks is wrong")
start = time.perf_counter()
dist.all_reduce(numbers)
print(numbers[0].item() and f"{{(time.perf_counter() - start) * 1000:.2f}} ms for 1,000 numbers")
dist.destroy_process_group()
"""


def check_torch() -> Iterator[Finding]:
    """Torch, GPUs, NCCL, gloo, and a collective that was really made."""
    if installed("torch") is None:
        yield Finding(
            subject="torch",
            fact="is not installed: configuration, stores and this command work, training does not",
            verdict="no",
            remedy='pip install "trainfleet[torch]"',
        )
        return
    (tried,) = try_programs([_ABOUT_TORCH], deadline=DEADLINE)
    if tried.returncode != 0:
        why = tried.error or ("it took too long" if tried.returncode is None else f"exit code {tried.returncode}")
        remedy = "Install torch again; a mixture of CUDA libraries of several builds is the usual cause."
        yield Finding(subject="torch", fact=f"does not load: {why}", verdict="no", remedy=remedy)
        return
    about = json.loads(tried.output.splitlines()[-1])
    yield _version(about["version"])
    yield from _gpus(about)
    if about["gloo"]:
        yield _collective("gloo", 2)
    else:
        remedy = "This build of torch has no gloo: CPU ranks cannot meet. Take the build of PyPI or pytorch.org."
        yield Finding(subject="gloo", fact="is missing", verdict="no", remedy=remedy)
    if about["gpus"] and about["nccl"]:
        yield _collective("nccl", min(2, len(about["gpus"])))


def _version(version: str) -> Finding:
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        remedy = 'trainfleet needs torch 2.11 or newer: pip install -U "trainfleet[torch]"'
        return Finding(subject="torch", fact=version, verdict="no", remedy=remedy)
    if any(version.startswith(tested + ".") for tested in TESTED):
        return Finding(subject="torch", fact=f"{version}, tested with this release")
    remedy = f"If a run behaves oddly, try torch {TESTED[-1]}; `make test` tells whether this one works."
    return Finding(subject="torch", fact=f"{version}, not tested with this release", verdict="note", remedy=remedy)


def _gpus(about: dict[str, Any]) -> Iterator[Finding]:
    driver = nvidia_driver()
    if about["gpus"]:
        for number, gpu in enumerate(about["gpus"]):
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
    elif driver:
        remedy = "Look at `nvidia-smi`, at CUDA_VISIBLE_DEVICES, and whether the driver is new enough for this CUDA."
        fact = f"driver {driver} is there, but torch (CUDA {about['cuda']}) sees no GPU"
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


def _collective(backend: str, size: int) -> Finding:
    subject = f"{backend} x {size}"
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        programs = [_COLLECTIVE.format(backend=backend, rank=rank, size=size, meeting=meeting) for rank in range(size)]
        tried = try_programs(programs, deadline=DEADLINE)
    if all(one.returncode == 0 for one in tried):
        return Finding(subject=subject, fact=f"all_reduce works, {tried[0].output.strip()}")
    why = next((one.error for one in tried if one.returncode), "") or f"no answer in {DEADLINE.seconds} s"
    variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME (and NCCL_DEBUG=INFO to see why)"
    remedy = f"Set {variable} to an interface that works, such as lo or eth0; see docs/troubleshooting.md."
    return Finding(subject=subject, fact=f"all_reduce fails: {why}", verdict="no", remedy=remedy)
