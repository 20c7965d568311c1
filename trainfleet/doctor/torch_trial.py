"""What torch says of itself, and collectives that ranks really make: a program of its own, for it may hang or crash.

It prints a line of JSON for each thing it learnt, as soon as it is known: what came before a crash is not lost.

    {"version": "2.13.0+cpu", "cuda": null, "gloo": true, "nccl": null, "count": 0}
    {"backend": "gloo", "size": 2, "seconds": 0.0031, "bytes": 4194304}
    {"gpus": ["NVIDIA H200, 139 GiB"]}

Ranks are forked from it: torch, whose import takes seconds, is imported once.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

PROGRAM = "from trainfleet.doctor.torch_trial import main; main()"
NUM_BYTES = 4 << 20
"""Of what is summed: a few buckets of gradients."""
PATIENCE_SECONDS = 15.0
"""For one collective of ranks that have torch already: half a second usually."""
_REPEATS = 3


def main() -> None:
    """Learn everything, in an order in which nothing spoils what follows: CUDA does not survive a fork."""
    # The number of GPUs by NVML leaves CUDA untouched: pytorch.org/docs/stable/cuda_environment_variables.html
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for fact in _facts():
        sys.stdout.write(json.dumps(fact) + "\n")
        sys.stdout.flush()


def _facts() -> Iterator[dict[str, Any]]:
    import torch
    import torch.distributed as dist

    about: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "gloo": False, "nccl": None}
    if dist.is_available():
        about["gloo"] = dist.is_gloo_available()
        if dist.is_nccl_available():
            about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    about["count"] = torch.cuda.device_count() if torch.version.cuda else 0
    yield about
    if about["gloo"]:
        yield try_collective("gloo", 2)
    if about["count"]:
        if about["nccl"]:
            yield try_collective("nccl", min(2, about["count"]))
        found = map(torch.cuda.get_device_properties, range(about["count"]))
        yield {"gpus": [f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in found]}


def try_collective(backend: str, size: int, *, patience: float = PATIENCE_SECONDS) -> dict[str, Any]:
    """Have `size` forked ranks sum numbers; `seconds` of one all_reduce of `bytes`, or `error`. No rank is left."""
    said = {"backend": backend, "size": size}
    if not hasattr(os, "fork"):
        return {**said, "error": "this system cannot fork, so it was not tried", "tried": False}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_fork(backend, rank, size, f"file://{folder}/meeting", patience) for rank in range(size)]
        try:
            answers = _answers({pipe: rank for rank, (_, pipe) in enumerate(ranks)}, time.monotonic() + patience + 2)
        finally:
            for pid, pipe in ranks:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                os.close(pipe)
    errors = [answer["error"] for answer in answers.values() if "error" in answer]
    if errors:
        return {**said, "error": errors[0]}
    if len(answers) < size:
        missing = ", ".join(str(rank) for rank in range(size) if rank not in answers)
        return {**said, "error": f"rank {missing} gave no answer in {patience:g} s"}
    return {**said, "seconds": max(answer["seconds"] for answer in answers.values()), "bytes": NUM_BYTES}


def _answers(pipes: dict[int, int], until: float) -> dict[int, dict[str, Any]]:
    """By rank, until all have answered, one has failed, or time is up."""
    answers: dict[int, dict[str, Any]] = {}
    waiting = dict(pipes)
    while waiting and (left := until - time.monotonic()) > 0:
        for pipe in select.select(list(waiting), [], [], left)[0]:
            rank = waiting.pop(pipe)
            text = os.read(pipe, 1 << 16)
            answers[rank] = json.loads(text) if text else {"error": f"rank {rank} died without a word"}
            if "error" in answers[rank]:
                return answers
    return answers


def _fork(backend: str, rank: int, size: int, meeting: str, patience: float) -> tuple[int, int]:
    """The id of a rank, and the pipe by which it answers."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return pid, reading
    try:
        signal.alarm(int(patience) + 3)  # should the parent be killed; an alarm is not inherited
        answer: dict[str, Any] = {"seconds": _sum(backend, rank, size, meeting, patience)}
    except BaseException as exc:  # the parent's stack, above here, is none of this rank's business
        answer = {"error": _sentence(exc)}
    os.write(writing, json.dumps(answer).encode())
    sys.stdout.flush()
    os._exit(0)


def _sentence(exc: BaseException) -> str:
    """The first line, short enough for a pipe, without where in gloo's source an expectation failed."""
    first = (str(exc).strip().splitlines() or [""])[0]
    told = re.sub(r".enforce fail at [^ ]*. (\S+ != \S+\. )?", "", first)
    return f"{type(exc).__name__}: {told[:500]}"


def _sum(backend: str, rank: int, size: int, meeting: str, patience: float) -> float:
    """Seconds of the fastest of some all_reduces, each checked."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=patience)
    )
    fastest = float("inf")
    for _ in range(_REPEATS):
        numbers = torch.full((NUM_BYTES // 4,), float(rank + 1), device=device)
        begun = time.perf_counter()
        dist.all_reduce(numbers)
        if not bool((numbers == size * (size + 1) / 2).all()):
            raise ValueError(f"the sum over the ranks is {numbers[0].item()}, not {size * (size + 1) / 2}")
        fastest = min(fastest, time.perf_counter() - begun)
    dist.barrier()  # nobody leaves while another still talks to it
    return fastest


if __name__ == "__main__":
    main()
