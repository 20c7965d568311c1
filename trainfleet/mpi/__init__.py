"""Data, tensor and pipeline parallelism and ZeRO for NumPy arrays, over any Group: each method on a page."""

from __future__ import annotations

from trainfleet.mpi.attention import SelfAttention, transformer_block
from trainfleet.mpi.average import GradientAverage, average_gradients, collect
from trainfleet.mpi.cross_entropy import cross_entropy, vocabulary_parallel_cross_entropy
from trainfleet.mpi.layers import (
    GELU,
    Embedding,
    Function,
    Layer,
    LayerNorm,
    Linear,
    ReLU,
    Residual,
    Sequential,
    Tanh,
    mlp,
)
from trainfleet.mpi.linear import ColumnLinear, LinearPair, RowLinear, VocabularyEmbedding, split_linear
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import SGD, Adam, AdamW, Momentum
from trainfleet.mpi.parallelize import parallelize, split_layers
from trainfleet.mpi.pipeline import run_pipeline
from trainfleet.mpi.placement import place_layers
from trainfleet.mpi.recompute import Recompute
from trainfleet.mpi.timers import Timers
from trainfleet.mpi.trainer import Trainer
from trainfleet.mpi.world import world
from trainfleet.mpi.zero import Sharded, Zero

__all__ = [
    "GELU",
    "SGD",
    "Adam",
    "AdamW",
    "ColumnLinear",
    "Embedding",
    "Function",
    "GradientAverage",
    "Layer",
    "LayerNorm",
    "Linear",
    "LinearPair",
    "Mesh",
    "Momentum",
    "ReLU",
    "Recompute",
    "Residual",
    "RowLinear",
    "SelfAttention",
    "Sequential",
    "Sharded",
    "Tanh",
    "Timers",
    "Trainer",
    "VocabularyEmbedding",
    "Zero",
    "average_gradients",
    "collect",
    "cross_entropy",
    "mlp",
    "parallelize",
    "place_layers",
    "run_pipeline",
    "split_layers",
    "split_linear",
    "transformer_block",
    "vocabulary_parallel_cross_entropy",
    "world",
]
