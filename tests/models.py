"""Five small models that between them hold what spreading a model gets wrong, each with its loss and its data.

`MODELS[name].build(seed)` gives equal models for equal seeds, `micro_batch(seed, index)` equal data. All five
have repeated blocks, so that each can be recomputed and sharded block by block, and every task can be learned.
No parameter's gradient is zero but for rounding (a bias of keys, or before batch normalisation): Adam would make
steps of full size out of the rounding, and no two runs would agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainfleet.loss import LossSum

IGNORED = -100  # target of a token that does not count


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, its loss and its data."""

    model: Callable[..., nn.Module]
    """Called with nothing, or with `dropout` where it has some."""
    loss_fn: Callable[[Any, Any], LossSum | Tensor]
    make_batch: Callable[[torch.Generator], Any]

    def build(self, seed: int, **options: Any) -> nn.Module:
        """The model with the parameters of `seed`; torch's generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model(**options)

    def micro_batch(self, seed: int, index: int) -> Any:
        """The micro-batch number `index` of an endless stream."""
        return self.make_batch(torch.Generator().manual_seed(seed * 1_000_003 + index))


# ── transformer: repeated blocks, optional dropout, micro-batches of unequal weight ──────────────────────────────


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.mlp(x))


class Transformer(nn.Module):
    """Tokens [B, T] to logits [B, T, V]."""

    def __init__(self, dropout: float = 0.0, vocabulary: int = 16, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(8, width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, 2, dropout) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def counted_tokens(generator: torch.Generator) -> dict[str, Tensor]:
    """Two sequences that count by 1, 2 or 3, of which between one and seven tokens have a target."""
    start, by = torch.randint(16, (2, 1), generator=generator), torch.randint(1, 4, (2, 1), generator=generator)
    sequence = (start + by * torch.arange(9)) % 16
    num_targets = torch.randint(1, 8, (2, 1), generator=generator)
    return {"input": sequence[:, :8], "target": sequence[:, 1:].where(torch.arange(8) < num_targets, IGNORED)}


def token_loss(output: Tensor, batch: dict[str, Tensor]) -> LossSum:
    target = batch["target"]
    total = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    return LossSum(total, (target != IGNORED).sum())


# ── convolutional: batch statistics, buffers, a plain mean as loss ────────────────────────────────────────────────


class ConvolutionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.convolution(x)))


class Convolutional(nn.Module):
    """Images [B, 1, 6, 6] to logits [B, 4]."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(ConvolutionBlock(channels) for _ in range(2)))
        self.norm = nn.BatchNorm1d(channels)
        self.head = nn.Linear(channels, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(images)).mean((2, 3))))


def striped_images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(images, labels): noise around a bright row, column or diagonal, or nothing."""
    label = torch.randint(4, (6,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    patterns = torch.stack([rows == 2, columns == 3, rows == columns, rows < 0]).float()
    images = 2 * patterns[label] + 0.5 * torch.randn(6, 6, 6, generator=generator)
    return images[:, None], label


def label_loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


# ── recurrent: the embedding is the output matrix, micro-batches of unequal length ────────────────────────────────


class RecurrentBlock(nn.Module):
    def __init__(self, width: int, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.recurrence = kind(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.recurrence(self.norm(x))[0]


class Recurrent(nn.Module):
    """Tokens [B, T] to logits [B, T, V], a GRU and an LSTM in a row."""

    def __init__(self, vocabulary: int = 16, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.blocks = nn.ModuleList(RecurrentBlock(width, kind) for kind in (nn.GRU, nn.LSTM))
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tokens_of_some_length(generator: torch.Generator) -> dict[str, Tensor]:
    """Two sequences of three to six tokens that count by 1 or 5."""
    length = int(torch.randint(3, 7, (1,), generator=generator))
    start, by = torch.randint(16, (2, 1), generator=generator), torch.randint(2, (2, 1), generator=generator)
    sequence = (start + (1 + 4 * by) * torch.arange(length + 1)) % 16
    return {"input": sequence[:, :-1], "target": sequence[:, 1:]}


# ── scalars: 0-dim, frozen and unused parameters ──────────────────────────────────────────────────────────────────


class ScaledBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.low_rank = nn.ModuleList([nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)])
        self.linear.weight.requires_grad_(False)  # frozen beside trained ones, as under LoRA
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.low_rank
        return x + self.scale * torch.tanh(self.linear(x) + up(down(x)))


class Scalars(nn.Module):
    """Vectors [B, 5] to predictions [B]."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList(ScaledBlock(width) for _ in range(3))
        self.head = nn.Linear(width, 1, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.offset = nn.Parameter(torch.zeros(()))
        self.frozen_offset = nn.Parameter(torch.tensor(0.1), requires_grad=False)
        self.unused = nn.Linear(width, 3)
        self.unused_scalar = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).squeeze(-1) / self.temperature + self.offset + self.frozen_offset


def vectors(generator: torch.Generator) -> dict[str, Tensor]:
    """Eight vectors and a smooth function of each."""
    x = torch.randn(8, 5, generator=generator)
    return {"input": x, "target": x[:, 0] * x[:, 1].sign() + x[:, 2]}


def squared_loss(output: Tensor, batch: dict[str, Tensor]) -> LossSum:
    return LossSum((output - batch["target"]).square().sum(), len(output))


# ── own loss: a dataclass goes in, a dataclass with the loss comes out; weights tied across blocks, a block twice ─


@dataclass(frozen=True, slots=True)
class Pairs:
    """Vectors [B, 6] that belong together, row by row."""

    left: Tensor
    right: Tensor


@dataclass(slots=True)
class Matching:
    """What Matcher returns: scores [B, B] and their loss."""

    scores: Tensor
    loss: Tensor


class MatchingBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.shared = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shared(F.silu(self.inner(self.norm(x))))


class Matcher(nn.Module):
    """Finds the partner of each vector; both sides pass through the same blocks, the last of them twice."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(MatchingBlock(width) for _ in range(2))
        self.blocks[1].shared = self.blocks[0].shared
        self.register_buffer("sharpness", torch.tensor(4.0))

    def embed(self, x: Tensor) -> Tensor:
        first, last = self.blocks
        return F.normalize(last(last(first(self.stem(x)))), dim=-1)

    def forward(self, pairs: Pairs) -> Matching:
        scores = self.sharpness * self.embed(pairs.left) @ self.embed(pairs.right).mT
        return Matching(scores, F.cross_entropy(scores.float(), torch.arange(len(scores), device=scores.device)))


def pairs(generator: torch.Generator) -> Pairs:
    """Four vectors, and each of them turned round with noise."""
    left = torch.randn(4, 6, generator=generator)
    return Pairs(left, left.flip(1) + 0.1 * torch.randn(4, 6, generator=generator))


def own_loss(output: Matching, batch: Pairs) -> Tensor:
    return output.loss


MODELS = {
    "transformer": Case(model=Transformer, loss_fn=token_loss, make_batch=counted_tokens),
    "convolutional": Case(model=Convolutional, loss_fn=label_loss, make_batch=striped_images),
    "recurrent": Case(model=Recurrent, loss_fn=token_loss, make_batch=tokens_of_some_length),
    "scalars": Case(model=Scalars, loss_fn=squared_loss, make_batch=vectors),
    "own_loss": Case(model=Matcher, loss_fn=own_loss, make_batch=pairs),
}
