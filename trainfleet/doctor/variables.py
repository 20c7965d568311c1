"""Environment variables of this shell that slow a run down, or lead it astray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from trainfleet.doctor.finding import Finding

_LOCAL = {"localhost", "127.0.0.1", "*"}
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "each kernel is waited for",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "each tensor is allocated by the driver",
}
_PINS = {
    "OMP_PROC_BIND": ("true", "close", "master", "primary"),
    "KMP_AFFINITY": ("compact", "granularity=fine,compact"),
}
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def check_variables(variables: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Nothing where nothing hurts. Values of proxies are not told: they may hold passwords."""
    yield from _proxies(variables)
    for name, why in _SLOW.items():
        if variables.get(name, "0") not in ("", "0"):
            yield _finding(f"{name}={variables[name]}: {why}, which is for hunting errors, and slow", f"unset {name}")
    if variables.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        fact = "TORCH_DISTRIBUTED_DEBUG=DETAIL: each collective is checked on all ranks first, which is slow"
        yield _finding(fact, "unset TORCH_DISTRIBUTED_DEBUG")
    for name, pinning in _PINS.items():
        if variables.get(name, "").lower() in pinning:
            fact = f"{name}={variables[name]} pins threads: several ranks of one host are pinned to the same cores"
            yield _finding(fact, f"unset {name}, unless your launcher gives each rank cores of its own")
    left = [name for name in _OF_A_RANK if name in variables]
    if left:
        fact = f"{', '.join(f'{name}={variables[name]}' for name in left)} in this shell: a run that is started here "
        remedy = f"unset {' '.join(left)}, unless you start ranks by hand"
        yield _finding(fact + "takes itself for one rank of a larger one and waits for the others", remedy)


def _proxies(variables: Mapping[str, str]) -> Iterator[Finding]:
    proxies = [name for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy") if _either(variables, name)]
    spared = {entry.strip() for entry in _either(variables, "no_proxy").split(",")}
    if proxies and not spared & _LOCAL:
        fact = (
            f"{', '.join(proxies)} set, and no_proxy does not name localhost: Flight, Ray and webhooks would ask the "
        )
        fact += "proxy for what is on this host"
        yield _finding(fact, "export no_proxy=localhost,127.0.0.1, and the names of your hosts")


def _either(variables: Mapping[str, str], name: str) -> str:
    return variables.get(name) or variables.get(name.upper()) or ""


def _finding(fact: str, remedy: str) -> Finding:
    return Finding(subject="variables", fact=fact, verdict="note", remedy=remedy)
