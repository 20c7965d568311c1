"""Three small models that plans are held against one process with: of ours, with tied weights, with experts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.loss import LossSum
from trainfleet.training.proof.case import Case

sys.path.append(str(Path(__file__).parents[2] / "recipes"))

SAMPLES, LENGTH, VOCABULARY = 2, 16, 96


def gpt() -> nn.Module:
    """The recipe's model: rotary positions, one fused layer for q, k and v."""
    from gpt import GPT

    return GPT(width=64, depth=4, heads=4)


def gpt2() -> nn.Module:
    """Of Hugging Face: the embedding is the head's weight too, layers keep W as [in, out], dropout of 0.1."""
    import transformers

    config = transformers.GPT2Config(
        n_embd=64, n_layer=4, n_head=4, n_positions=LENGTH, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    """Of Hugging Face: grouped-query attention, four experts of which each token takes two."""
    import transformers

    config = transformers.MixtralConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    return transformers.MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt": gpt, "gpt2": gpt2, "mixtral": mixtral}


def case_of(name: str, *, steps: int = 2, accumulation: int = 4) -> Case:
    return Case(
        build=functools.partial(_build, name),
        loss_fn=loss,
        micro_batch=_micro_batch,
        optimizer=_adamw,
        steps=steps,
        accumulation=accumulation,
        clip_norm=0.5,
        keep_activations=True,
    )


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def _micro_batch(number: int) -> Batch:
    """Micro-batches of unequal weight: in every third, half of the targets do not count."""
    draw = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=draw)
    targets = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=draw)
    if number % 3 == 2:
        targets[0] = -100
    return {"input": tokens, "target": targets}


def loss(output: Any, batch: Batch) -> LossSum:
    logits: Tensor = output if isinstance(output, Tensor) else output["logits"]
    targets: Tensor = batch["target"]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return LossSum(total, (targets != -100).sum())


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
