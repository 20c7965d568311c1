"""Small networks of other kinds than decoders, written out: images, boxes, sound, forces, operators on functions.

Shapes: B samples, C channels, T times, N atoms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainfleet.batch import Batch
from trainfleet.loss import LossSum

SAMPLES = 4


def _convolution(ins: int, outs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al., arXiv:1512.03385)."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(ins, outs, stride), nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        )
        self.shortcut = nn.Conv2d(ins, outs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 8)
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1), Residual(16, 32, 2))
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class VGG(nn.Module):
    """Convolutions one after the other, then three linear layers with dropout (arXiv:1409.1556)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 16, 16]
        layers = [[nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)] for a, b in itertools.pairwise(widths)]
        self.features = nn.Sequential(*(layer for each in layers for layer in each))
        self.classifier = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class Dense(nn.Module):
    """Each layer sees the outputs of all before it (arXiv:1608.06993)."""

    def __init__(self, ins: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_convolution(ins + i * growth, growth) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Dense(8, 4), nn.AvgPool2d(2), Dense(16, 4))
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


class Detector(nn.Module):
    """For each cell of a 4 x 4 grid a box, and how sure it is that one is there."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(2, 16)
        )
        self.boxes, self.sure = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 1, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        seen = self.backbone(images).relu()
        return {"boxes": self.boxes(seen).flatten(2).mT, "sure": self.sure(seen).flatten(1)}


class Listener(nn.Module):
    """Convolutions over a waveform, a recurrent layer over what they find."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv1d(1, 8, 8, 4), nn.GELU(), nn.Conv1d(8, 16, 8, 4), nn.GELU())
        self.over_time = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5))

    def forward(self, waves: Tensor) -> Tensor:
        found, _ = self.over_time(self.convolutions(waves[:, None]).mT)
        return self.head(found.mean(1))


class Forces(nn.Module):
    """The energy of atoms from their distances, and the forces: minus its gradient, taken inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU())
        self.atom = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, positions: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_()
            between = positions[:, :, None] - positions[:, None]
            squares = between.square().sum(-1, keepdim=True)
            energy = self.atom(self.pair(squares).sum(2)).sum((1, 2))
            (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return {"energy": energy, "forces": -gradient}


class Spectral(nn.Module):
    """A product with complex weights in Fourier space (Fourier neural operator, arXiv:2010.08895)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.complex64) / width)
        self.beside = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        kept = torch.einsum("bit,iot->bot", spectrum[..., : self.modes], self.weight)
        back = torch.fft.irfft(functional.pad(kept, (0, spectrum.shape[-1] - self.modes)), x.shape[-1])
        return functional.gelu(back + self.beside(x))


class FourierOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv1d(1, 8, 1)
        self.blocks = nn.Sequential(*(Spectral(8, 5) for _ in range(3)))
        self.down = nn.Conv1d(8, 1, 1)

    def forward(self, values: Tensor) -> Tensor:
        return self.down(self.blocks(self.lift(values[:, None])))[:, 0]


def _images(draw: torch.Generator) -> Batch:
    return torch.randn(SAMPLES, 3, 16, 16, generator=draw), torch.randint(5, (SAMPLES,), generator=draw)


def _classes(output: Tensor, batch: Batch) -> LossSum:
    return LossSum(functional.cross_entropy(output, batch[1], reduction="sum"), len(batch[1]))


def _boxes(draw: torch.Generator) -> Batch:
    counts = [int(torch.randint(4, (), generator=draw)) for _ in range(SAMPLES)]
    return {
        "input": torch.randn(SAMPLES, 3, 16, 16, generator=draw),
        "boxes": [torch.rand(count, 4, generator=draw) for count in counts],
        "cells": [torch.randperm(16, generator=draw)[:count] for count in counts],
    }


def _detection(output: dict[str, Tensor], batch: Batch) -> LossSum:
    """Of lists of boxes, of which each image has its own number: weighed by boxes, and at least one an image."""
    wanted = torch.zeros_like(output["sure"])
    total = output["sure"].new_zeros(())
    for i, (boxes, cells) in enumerate(zip(batch["boxes"], batch["cells"])):
        wanted[i, cells] = 1
        total = total + (output["boxes"][i, cells] - boxes).abs().sum()
    total = total + functional.binary_cross_entropy_with_logits(output["sure"], wanted, reduction="sum")
    return LossSum(total, sum(max(1, len(boxes)) for boxes in batch["boxes"]))


def _waves(draw: torch.Generator) -> Batch:
    return torch.randn(SAMPLES, 256, generator=draw), torch.randint(5, (SAMPLES,), generator=draw)


def _atoms(draw: torch.Generator) -> Batch:
    return {
        "input": torch.randn(SAMPLES, 6, 3, generator=draw),
        "energy": torch.randn(SAMPLES, generator=draw),
        "forces": torch.randn(SAMPLES, 6, 3, generator=draw),
    }


def _energy_and_forces(output: dict[str, Tensor], batch: Batch) -> LossSum:
    energy = (output["energy"] - batch["energy"]).square().sum()
    return LossSum(energy + (output["forces"] - batch["forces"]).square().mean((1, 2)).sum(), len(batch["energy"]))


def _functions(draw: torch.Generator) -> Batch:
    values = torch.randn(SAMPLES, 32, generator=draw)
    return values, values.cumsum(1) / 8


def _squares(output: Tensor, batch: Batch) -> LossSum:
    return LossSum((output - batch[1]).square().mean(1).sum(), len(batch[1]))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Batch], LossSum], Callable[[torch.Generator], Batch]]] = {
    "resnet": (ResNet, _classes, _images),
    "vgg": (VGG, _classes, _images),
    "densenet": (DenseNet, _classes, _images),
    "detector": (Detector, _detection, _boxes),
    "audio": (Listener, _classes, _waves),
    "forces": (Forces, _energy_and_forces, _atoms),
    "fourier": (FourierOperator, _squares, _functions),
}
