"""What a rank keeps for backward under plan.tp, with the positions between split layers in pieces and without.

    python benchmarks/activation_memory.py [--quick]

Counted is the memory that a forward has made and that lives when it ends, parameters and the batch left out: every
storage that an operator gave, once, with its whole size. The model is GPT-2's of Hugging Face, in float32, with a
dropout of 0.1 outside of attention.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from measuring.table import RESULTS, Report, Table
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trainfleet import Plan, launch
from trainfleet.loss import LossSum

SAMPLES, LENGTH, WIDTH, DEPTH = 4, 256, 256, 4
PLANS = {
    "tp=2": Plan(tp=2),
    "tp=2 tp_sequence": Plan(tp=2, tp_sequence=True),
    "tp=2 recompute=blocks": Plan(tp=2, recompute="blocks"),
    "tp=2 recompute=blocks activations=partition": Plan(tp=2, recompute="blocks", activations="partition"),
    "tp=2 recompute=blocks tp_sequence": Plan(tp=2, recompute="blocks", tp_sequence=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short sequences")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args()
    length = 32 if options.quick else LENGTH
    found = launch(on_rank, 2, (PLANS, length))[0]
    rows: list[list[str | float | None]] = []
    for name in PLANS:
        kept, loss = found[name]
        share = kept / found["tp=2"][0]
        rows.append([name, f"{kept / 1024:,.0f}", f"{share:.2f}", f"{loss:.5f}"])
    report = Report(name="activation_memory", summary=__doc__.split("\n\n", 2)[2].rstrip())
    report.add(
        Table(
            title=f"KiB of rank 0: {SAMPLES} sequences of {length} tokens, width {WIDTH}, {DEPTH} blocks",
            columns=["plan", "kept for backward", "of tp alone", "loss"],
            rows=rows,
            notes=[
                "Attention keeps its heads, perceptrons their columns, under each plan; the rest is what can shrink."
            ],
        )
    )
    report.write(options.results)


def model_of(length: int) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=8,
        n_positions=length,
        vocab_size=512,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


class Made(TorchDispatchMode):
    """Every storage that operators made while it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                storage = _storage_of(each)
                self._made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def living_bytes(self, apart_from: set[int]) -> int:
        gc.collect()
        return sum(
            size
            for address, (storage, size) in self._made.items()
            if address not in apart_from and not storage.expired()
        )


def on_rank(plans: dict[str, Plan], length: int) -> dict[str, tuple[int, float]]:
    return {name: kept_for_backward(plan, length) for name, plan in plans.items()}


def kept_for_backward(plan: Plan, length: int) -> tuple[int, float]:
    """Bytes on this rank in the second step, and its loss."""
    from trainfleet import Mesh, parallelize
    from trainfleet.parallel import make_engine

    torch.set_num_threads(1)
    tokens = torch.randint(512, (SAMPLES, length + 1), generator=torch.Generator().manual_seed(0))
    batch = {"input": tokens[:, :-1].contiguous(), "target": tokens[:, 1:].contiguous()}
    with Mesh.from_env(plan, device="cpu") as mesh:
        model = parallelize(model_of(length), mesh, plan)
        engine = make_engine(model, torch.optim.AdamW(model.parameters()), loss_of)
        engine.forward_backward([batch])
        engine.step()
        made, found = Made(), []
        apart = {_storage_of(each).data_ptr() for each in (*model.parameters(), *model.buffers(), *batch.values())}

        plain = engine._loss  # type: ignore[attr-defined]

        def watched(given: Any) -> Any:
            with made:
                loss = plain(given)
            found.append(made.living_bytes(apart))
            return loss

        engine._loss = watched  # type: ignore[attr-defined]
        total = engine.forward_backward([batch])
        return found[0], total.mean


def _storage_of(tensor: Tensor) -> Any:
    with torch.no_grad():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # What comes from an exchange may be wrapped until somebody reads it.
    return (local.elem if isinstance(local, AsyncCollectiveTensor) else local).untyped_storage()


def loss_of(output: Any, batch: Any) -> LossSum:
    total = nn.functional.cross_entropy(output["logits"].flatten(0, 1), batch["target"].flatten(), reduction="sum")
    return LossSum(total, batch["target"].numel())


if __name__ == "__main__":
    main()
