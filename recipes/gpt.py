"""GPT over bytes: a small decoder in plain PyTorch that knows nothing of how it is spread.

Shapes: B samples, T bytes, C width, H heads, D = C / H width of a head, V = 256 values of a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainfleet.loss import LossSum

VOCABULARY = 256
IGNORED = -100


class GPT(nn.Module):
    """Predicts the next byte from all before it: int64 tokens [B, T] to logits [B, T, V].

    Each position starts from the embeddings of its own byte and of the `lookback - 1` before it, each from a table
    of its own. So the first block already sees short words, which otherwise costs it most of its training.
    """

    def __init__(
        self, width: int = 160, depth: int = 3, heads: int = 2, lookback: int = 4, rotary_base: float = 10_000.0
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width={width} must be a multiple of 2 x heads = {2 * heads}, for rotary positions.")
        self.rotary_base, self.head_width = rotary_base, width // heads
        self.embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, width) for _ in range(lookback))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        x = sum(embedding(_shifted(tokens, back)) for back, embedding in enumerate(self.embeddings))
        positions = self._rotary(tokens.shape[1], tokens.device)
        for block in self.blocks:
            x = block(x, *positions)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(
        self, prompt: bytes, n: int, temperature: float = 0.8, generator: torch.Generator | None = None
    ) -> bytes:
        """`n` bytes that continue `prompt`, at temperature 0 the likeliest ones; each costs a whole forward.

        Where the model is spread, all ranks call it together; equal generators give equal bytes.
        """
        if not prompt:
            raise ValueError("The prompt is empty; give at least one byte to continue.")
        device = self.head.weight.device
        tokens = torch.tensor([list(prompt)], device=device)
        for _ in range(n):
            logits = self(tokens)[0, -1].float()
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                chosen = logits.argmax(keepdim=True)
            tokens = torch.cat([tokens, chosen[None]], dim=1)
        return bytes(tokens[0, len(prompt) :].tolist())

    def _rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position x frequency, each [T, D / 2] in float32 (RoFormer, arXiv:2104.09864)."""
        frequencies = self.rotary_base ** (-torch.arange(0, self.head_width, 2, device=device) / self.head_width)
        angles = torch.outer(torch.arange(length, device=device), frequencies)
        return angles.cos(), angles.sin()

    def _initialise(self) -> None:
        """Matrices keep the size of what passes; those that add to the residual stream begin small."""
        for name, parameter in self.named_parameters():
            if name.startswith("embeddings"):
                nn.init.normal_(parameter, std=0.2)
            elif name == "head.weight":
                nn.init.normal_(parameter, std=0.02)  # the first prediction is all bytes alike
            elif parameter.ndim == 2:
                is_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = 0.5 / math.sqrt(2 * len(self.blocks)) if is_residual else 0.5
                nn.init.normal_(parameter, std=scale / math.sqrt(parameter.shape[1]))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to what came in and fed with its normalised form."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = self.qkv(x).unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHTD = _rotate(q_BHTD, cos, sin), _rotate(k_BHTD, cos, sin)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Four times as wide inside, with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def loss_fn(output: Tensor, batch: Mapping[str, Tensor]) -> LossSum:
    """Nats summed over the bytes of the batch, in float32; the weight is their number.

    Windows that only fill up the last batch of an evaluation come with a `weight` of 0, and count for nothing.
    """
    target = batch["target"]
    if "weight" in batch:
        target = target.where(batch["weight"][:, None] > 0, IGNORED)
    total = F.cross_entropy(output.float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    return LossSum(total, (target != IGNORED).sum())


def _shifted(tokens: Tensor, back: int) -> Tensor:
    """tokens[t - back] at position t, and zeros before the first."""
    return F.pad(tokens, (back, 0))[:, : tokens.shape[1]]


def _rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x_BHTD.dtype), sin.to(x_BHTD.dtype)
    left, right = x_BHTD.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
