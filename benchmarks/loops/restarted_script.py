"""What a person would write for torchrun to survive a kill: DDP, and a checkpoint renamed into place after every step.

torchrun --standalone --nproc-per-node=2 --max-restarts=1 restarted_script.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LENGTH, SAMPLES, CLIP_NORM, STEPS = 256, 4, 1.0, 1_000_000


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size, start = dist.get_rank(), dist.get_world_size(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    begun = 0
    if saved := sorted(folder.glob("step-*.pt")):
        state = torch.load(saved[-1])
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["step"]
    draw = torch.Generator().manual_seed(begun * size + rank)
    for step in range(begun + 1, STEPS):
        for i in range(4 // size):
            starts = torch.randint(len(text) - LENGTH - 1, (SAMPLES,), generator=draw).tolist()
            rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
            model.require_backward_grad_sync = i == 4 // size - 1
            F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            unfinished = folder / "unfinished"
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, unfinished)
            unfinished.rename(folder / f"step-{step:08d}.{start}.pt")
            for old in sorted(folder.glob("step-*.pt"))[:-2]:
                old.unlink()


if __name__ == "__main__":
    main()
