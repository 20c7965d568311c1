"""Small models whose layers tensor parallelism splits, each in another way that models are written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LENGTH = 16, 4, 6


class SeparateAttention(nn.Module):
    """q, k, v, o, a dropout inside, and a mask that is a buffer; scores written out."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().bool())
        with torch.no_grad():  # its gradient would be zero but for rounding
            self.k.bias = None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part(x).view(batch, length, HEADS, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).masked_fill(~self.mask, float("-inf"))
        mixed = self.dropout(scores.softmax(-1)) @ v
        return self.o(mixed.transpose(1, 2).contiguous().view(batch, length, WIDTH))


class GroupedAttention(nn.Module):
    """Two heads of keys for four of queries, norms of heads, rotary positions given from outside."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        width = WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, 2 * width, bias=False)
        self.v = nn.Linear(WIDTH, 2 * width, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * torch.tensor([1.0, 0.1])
        q, k = _rotated(self.q_norm(q), angles), _rotated(self.k_norm(k), angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """q, k and v from one matrix."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.dropout(F.gelu(self.up(x)))))


class GatedPerceptron(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Inline(nn.Module):
    """A block that has all of its linear layers itself, norms and a residual stream between them."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.fc, self.back = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.scale * self.back(F.gelu(self.fc(self.second(x))))


class Residual(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in parts)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, self.parts):
            x = x + part(norm(x))
        return x


class Model(nn.Module):
    """Tokens [B, T] to logits [B, T, 16]."""

    def __init__(self, parts: tuple[type[nn.Module], ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Residual([part(dropout) for part in parts]) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "separate": (SeparateAttention, Perceptron),
    "grouped": (GroupedAttention, GatedPerceptron),
    "fused": (FusedAttention, Perceptron),
    "inline": (Inline,),
    "perceptron": (Perceptron,),
}


def build(name: str, dropout: float = 0.0) -> Model:
    return Model(PARTS[name], dropout)


def tokens(number: int) -> dict[str, Tensor]:
    start, by = torch.randint(16, (2, 2, 1), generator=torch.Generator().manual_seed(number))
    sequence = (start + (1 + by % 3) * torch.arange(LENGTH + 1)) % 16
    return {"input": sequence[:, :-1], "target": sequence[:, 1:]}


def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["target"].flatten())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1, eps=1e-3)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
