"""What a person would write for torchrun: a GPT, text, and two steps; notes when the first is done.

torchrun --standalone --nproc-per-node=2 plain_script.py FILE
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT
from torch import nn
from torch.distributed.fsdp import fully_shard

LENGTH, SAMPLES, CLIP_NORM = 256, 4, 1.0


def main() -> None:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = GPT()
    if size > 1:
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=False)
        fully_shard(model, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(2):
        for _ in range(4 // size):
            starts = torch.randint(len(text) - LENGTH - 1, (SAMPLES,)).tolist()
            rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
            F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 and int(os.environ.get("RANK", "0")) == 0:
            Path(sys.argv[1]).write_text(str(time.time()))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
