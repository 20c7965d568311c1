"""Anomalies: what watches a run for them, joined as the recipe's `monitor.anomalies` says."""

from __future__ import annotations

from pathlib import Path

from trainfleet.mesh import Mesh
from trainfleet.monitor.anomalies import AnomalyConfig, Disk, Growth, Pace, SlowRank, Starvation
from trainfleet.training.watchers.dead_units import DeadUnits
from trainfleet.training.watchers.findings import Findings, OfReports, OfSteps
from trainfleet.training.watchers.not_finite import Explain, NotFinite
from trainfleet.training.watchers.outlier import GradientExplosion, LossSpike
from trainfleet.training.watchers.stall import Stalls
from trainfleet.training.watchers.watcher import Watcher


def anomaly_watchers(
    config: AnomalyConfig,
    mesh: Mesh,
    *,
    rolls_back: bool,
    folder: Path | None = None,
    saves: Path | None = None,
    explain: Explain | None = None,
) -> list[Watcher]:
    """Those that `config` asks for on this rank; ConfigError where a policy cannot be kept.

    `folder` is the run's, for the report of a rank that hangs; `saves` the folder of this host that fills up;
    `explain` says where a number that is none came from.
    """
    config = config.resolved(rolls_back=rolls_back)
    findings = _findings(config, mesh, saves)
    watchers: list[Watcher] = [findings]
    if config.loss_not_finite is not None or config.gradient_not_finite is not None:
        watchers.append(NotFinite(config, explain))
    if config.loss_spike is not None:
        watchers.append(LossSpike(config, config.loss_spike))
    if config.gradient_explosion is not None:
        watchers.append(GradientExplosion(config, config.gradient_explosion))
    if config.dead_units is not None:
        watchers.append(DeadUnits(findings.add, share=config.dead_share, every=config.dead_every))
    if config.stalled_step is not None:
        watchers.append(Stalls(findings.add, config, rank=mesh.rank, folder=folder))
    return watchers


def _findings(config: AnomalyConfig, mesh: Mesh, saves: Path | None) -> Findings:
    """All ranks take their steps together, so one of them measures the pace."""
    of_steps: list[OfSteps] = []
    of_reports: list[OfReports] = []
    if config.throughput_drop is not None and mesh.is_main:
        of_steps.append(Pace(factor=config.drop_factor, lasting_seconds=config.lasting_seconds))
    if config.data_starvation is not None:
        of_steps.append(Starvation(share=config.starved_share, lasting_seconds=config.lasting_seconds))
    if config.slow_rank is not None:
        of_reports.append(SlowRank(factor=config.slow_factor, lasting_seconds=config.lasting_seconds))
    if config.memory_growth is not None:
        of_reports.append(Growth(share=config.growth_share))
    watches_disk = config.disk_filling is not None and mesh.is_main and saves is not None
    disk = Disk(saves, minutes=config.disk_minutes) if watches_disk and saves is not None else None
    return Findings(config, of_steps=of_steps, of_reports=of_reports, disk=disk)
