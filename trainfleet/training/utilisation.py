"""MFU: the share of the devices' arithmetic that the model itself makes use of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch
from trainfleet.mesh import Mesh
from trainfleet.monitor import MonitorConfig
from trainfleet.plan import Plan
from trainfleet.stopwatch import timed
from trainfleet.tracks import Tracks
from trainfleet.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from trainfleet.parallel.flops import ModelFlops

logger = logging.getLogger(__name__)


class Utilisation:
    """The model FLOPs utilisation of steps (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B):

        MFU = FLOPs of forward and backward of the step's samples / (seconds of the step x ranks x peak FLOP/s of one)

    The FLOPs are those of the whole plain model, so what recompute, padding or a pipeline's bubble cost lowers the MFU
    (`parallel/flops.py` says what is counted), and those of all ranks are taken to be this one's, times the ranks that
    see different data. They are counted, and a processor's peak is measured, at the first step that is asked for from
    `first` on, which takes a few tenths of a second; steps before have none.
    """

    def __init__(
        self, config: MonitorConfig, plan: Plan, mesh: Mesh, flops: ModelFlops | None, *, first: int | None = None
    ) -> None:
        """`flops` may be None where `config.flops_per_token` is given; `first` is a step: config.log_interval."""
        self._config, self._plan, self._mesh, self._flops = config, plan, mesh, flops
        self._first = config.log_interval if first is None else first
        self._peak: float | None = None
        """Of all ranks."""
        self._is_known = True

    def of(self, step: int, micro_batches: Sequence[Batch], tokens: int, seconds: float) -> float | None:
        """That of a step: `micro_batches` are this rank's, `tokens` those of all; None where it is not known."""
        if step < self._first or not self._is_known or seconds <= 0:
            return None
        with timed("observers"):
            return self._find(micro_batches, tokens, seconds)

    def _find(self, micro_batches: Sequence[Batch], tokens: int, seconds: float) -> float | None:
        try:
            peak = self._peak = self._peak or self._find_peak()
            with _unnoticed():
                flops = self._flops_of(micro_batches, tokens)
        except Exception as exc:  # the model runs on tensors without numbers there, which it may refuse in any way
            logger.info("The MFU is not shown: %s", exc)
            flops, peak = None, None
        if not flops or peak is None:
            self._is_known, self._flops = False, None
            return None
        return flops / (seconds * peak)

    def _find_peak(self) -> float | None:
        from trainfleet.parallel.peak import Peak, kind_of, peak_of

        device = self._mesh.device
        if self._config.peak_flops is not None:
            peak: Peak | None = Peak(flops_per_second=self._config.peak_flops, source="monitor.peak_flops")
        else:
            peak = peak_of(device, kind_of(self._plan.precision, device))
        if peak is None:
            logger.info("The MFU is not shown: no data sheet of %s is known. Give monitor.peak_flops.", device)
            return None
        logger.info("MFU: the peak of one rank is %.4g FLOP/s (%s).", peak.flops_per_second, peak.source)
        return peak.flops_per_second * self._mesh.world_size

    def _flops_of(self, micro_batches: Sequence[Batch], tokens: int) -> float:
        if self._config.flops_per_token is not None:
            return self._config.flops_per_token * tokens
        assert self._flops is not None, "a run without flops_per_token counts them"
        return sum(self._flops.of(batch) for batch in micro_batches) * self._mesh.data_axes.size


@contextmanager
def _unnoticed() -> Iterator[None]:
    """For a model that runs once more: what it draws is drawn again, and what it tracks is not told."""
    from trainfleet.parallel.randomness import Generators

    generators = Generators()
    before = generators.state_dict()
    try:
        with Tracks(counts=False):
            yield
    finally:
        generators.load_state_dict(before)


def open_utilisation(
    recipe: Recipe,
    mesh: Mesh,
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Any],
    prepare: Callable[..., Batch] | None = None,
) -> Utilisation | None:
    """For the rank that speaks for all, of a model that is not spread yet; None where nobody wants it, or has to."""
    from trainfleet.errors import PlanError
    from trainfleet.parallel.flops import ModelFlops

    if not (recipe.monitor.mfu and mesh.is_main):
        return None
    if recipe.monitor.flops_per_token is not None:
        return Utilisation(recipe.monitor, recipe.plan, mesh, None)
    try:
        return Utilisation(recipe.monitor, recipe.plan, mesh, ModelFlops(model, loss_fn, prepare))
    except PlanError as exc:
        logger.info("The MFU is not shown: %s", exc)
        return None
