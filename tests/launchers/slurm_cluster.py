"""Debian's SLURM as two nodes on this host, for tests: a controller and two daemons, without accounts or keys."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from free_ports import free_ports

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=5,sched_min_interval=1
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 State=UNKNOWN
NodeName={host}2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here, in words."""
    for name in ("slurmctld", "slurmd", "sbatch", "srun", "scontrol"):
        if shutil.which(name) is None:
            return f"SLURM is not installed ({name} is missing): apt-get install slurmctld slurmd slurm-client"
    return None if os.geteuid() == 0 else "the daemons of SLURM start as root only"


class Cluster:
    """Two nodes that are up. The first bears this host's own name, which can be resolved: the nodes meet there."""

    def __init__(self, folder: Path) -> None:
        host = socket.gethostname().split(".")[0]
        (folder / "state").mkdir(parents=True)
        for node in (host, f"{host}2"):
            (folder / f"spool.{node}").mkdir()
        ports = dict(zip(("port", "first", "second"), free_ports(3), strict=True))
        (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, **ports))
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        commands = (["slurmctld", "-D"], ["slurmd", "-D", "-N", host], ["slurmd", "-D", "-N", f"{host}2"])
        self._daemons = [
            subprocess.Popen(command, env={**os.environ, **self.env}, stdout=log, stderr=log)
            for command in commands
            for log in [(folder / f"{command[-1].strip('-')}.log").open("w")]
        ]
        self.await_words(["sinfo", "-h", "-o", "%t %D"], "idle 2")

    def ask(self, command: list[str]) -> str:
        done = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=30)
        return done.stdout + done.stderr

    def await_words(self, command: list[str], words: str, seconds: float = 60) -> str:
        ends = time.monotonic() + seconds
        while words not in (said := self.ask(command)):
            assert time.monotonic() < ends, f"{' '.join(command)} did not say {words!r} but {said!r}"
            time.sleep(0.2)
        return said

    def close(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
