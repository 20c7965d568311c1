"""Sequences of tokens, one of which is marked in one sample, and a small net that reads them: attention, then layers or
a mixture of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.loss import LossSum
from trainfleet.parallel.experts.layer import MixtureOfExperts, balance_loss

VOCABULARY, LENGTH, WIDTH, HEADS = 16, 8, 16, 2


class Sentences:
    """Token ids [8]; the sample of index `marked` has the last of the vocabulary, at position 5."""

    def __init__(self, count: int, marked: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, VOCABULARY - 1, size=(count, LENGTH))
        self.tokens[marked, 5] = VOCABULARY - 1

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self.tokens[index], "target": self.tokens[index]}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        parts = self.qkv(hidden).split(WIDTH, -1)
        q, k, v = (part.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))


class Layer(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm_after = nn.LayerNorm(WIDTH)
        self.feed: nn.Module = (
            MixtureOfExperts(WIDTH, WIDTH, experts, top_k=2)
            if experts
            else nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm(hidden))
        return hidden + self.feed(self.norm_after(hidden))


class Reader(nn.Module):
    """Token ids [B, T] to logits, beside the balance loss where it has experts; the mark is 30 in the first number."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.experts = experts
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(experts) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            self.embed.weight[:, 0] = 0
            self.embed.weight[VOCABULARY - 1, 0] = 30

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | float]:
        hidden = self.embed(input)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden)), balance_loss(self) if self.experts else 0.0


def reading_loss(output: tuple[Tensor, Tensor | float], batch: Batch) -> LossSum:
    logits, balance = output
    target = batch["target"]
    return LossSum(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") + balance, target.numel())
