"""The exponential moving average of a model's weights (Polyak and Juditsky, 1992), each rank of its own pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainfleet.errors import ConfigError, PlanError
from trainfleet.parallel.layout import piece_of
from trainfleet.parallel.pieces import as_piece
from trainfleet.parallel.pipeline.states import absent_averages
from trainfleet.parallel.spread import spread_of


class Ema:
    """average <- decay * average + (1 - decay) * weights, after every step, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigError(f"train.ema_decay is {decay}; it lies between 0 and 1, often 0.999.")
        self.decay = decay
        self._model = model
        self._spread = spread_of(model)
        if self._spread.plan.engine == "deepspeed" and self._spread.plan.zero == 3:
            raise PlanError(
                f"train.ema_decay is {decay} with plan.engine = 'deepspeed' and plan.zero = 3, which hides the weights "
                "between steps. Set plan.engine to 'native', or plan.zero to 2."
            )
        self._averages = {name: piece_of(p).clone() for name, p in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        self._spread.rest()  # what a forward left gathered is no piece, and would not notice a change
        return [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self) -> None:
        """Call after each optimizer step."""
        averages = list(self._averages.values())
        torch._foreach_lerp_(averages, [piece_of(p) for _, p in self._trained()], 1.0 - self.decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averages; afterwards with its own weights again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._trained():
            weights = piece_of(parameter)
            kept = weights.clone()
            weights.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        mesh, pipeline = self._spread.mesh, self._spread.pipeline
        found = {
            name: as_piece(name, p, self._averages[name], mesh=mesh, copy=self._spread.copy_of(name))
            for name, p in self._trained()
        }
        return found if pipeline is None else {**found, **absent_averages(pipeline, found)}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        for name, average in self._averages.items():
            average.copy_(state[name].local)
