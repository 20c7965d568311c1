"""What a figure was measured on: the machine, the day, and the version of everything that took part."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("trainfleet", "torch", "numpy", "lightning-fabric", "accelerate", "deepspeed")


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, str]:
    """Name and value of everything that a reader needs to judge or repeat a figure."""
    free, total = psutil.virtual_memory().available / 2**30, psutil.virtual_memory().total / 2**30
    described = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{total:.0f} GiB, {free:.0f} free",
        "load when begun": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    described |= {package: version_of(package) or "not installed" for package in PACKAGES}
    if commit := _commit():
        described["trainfleet"] += f" ({commit})"
    return described


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    instructions = [name for name in ("avx2", "avx512f", "amx_bf16") if name in values.get("flags", "").split()]
    number = f"family {values.get('cpu family', '?')} model {values.get('model', '?')}"
    return f"{values.get('model name', platform.machine())}, {number}, {' '.join(instructions)}"


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # not a checkout
