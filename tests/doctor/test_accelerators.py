from __future__ import annotations

import json

import pytest

from trainfleet.deps import installed
from trainfleet.doctor import accelerators
from trainfleet.doctor.probe import Tried

NEW = "2.13.0+cpu"


def findings(monkeypatch, about: dict[str, object] | None, *, driver: str | None = None, collective: int | None = 0):
    """What is found where torch says `about` itself (None: it does not load)."""

    def tried(programs, deadline):
        if "print(json" in programs[0]:
            text = json.dumps({"version": NEW, "cuda": None, "gpus": [], "nccl": None, "gloo": True, **(about or {})})
            return [Tried(returncode=1 if about is None else 0, output=text, error="OSError: libcudart.so")]
        return [Tried(returncode=collective, output="0.10 ms\n", error="RuntimeError: refused") for _ in programs]

    monkeypatch.setattr(accelerators, "installed", lambda module: "2")
    monkeypatch.setattr(accelerators, "try_programs", tried)
    monkeypatch.setattr(accelerators, "nvidia_driver", lambda: driver)
    return {finding.subject: finding for finding in accelerators.check_torch()}


def test_without_torch_one_finding_says_what_still_works(monkeypatch):
    monkeypatch.setattr(accelerators, "installed", lambda module: None)
    (finding,) = accelerators.check_torch()
    assert finding.verdict == "no" and "configuration, stores" in finding.fact
    assert finding.remedy == 'pip install "trainfleet[torch]"'


def test_a_torch_that_does_not_load_is_told_and_ends_the_check(monkeypatch):
    found = findings(monkeypatch, None)
    assert list(found) == ["torch"] and "libcudart" in found["torch"].fact


@pytest.mark.parametrize(
    ("version", "verdict"), [(NEW, "ok"), ("2.13.1", "ok"), ("2.12.1", "note"), ("2.14.0a0", "note"), ("2.9.1", "no")]
)
def test_versions_are_tested_or_not(monkeypatch, version, verdict):
    assert findings(monkeypatch, {"version": version})["torch"].verdict == verdict


def test_a_driver_without_a_cuda_build_is_told(monkeypatch):
    assert "CPU build" in findings(monkeypatch, {}, driver="550.1")["GPU"].fact
    assert "sees no GPU" in findings(monkeypatch, {"cuda": "13.0"}, driver="550.1")["GPU"].fact
    assert findings(monkeypatch, {})["GPU"].verdict == "ok"


def test_gpus_are_listed_and_nccl_is_tried_on_two_of_them(monkeypatch):
    about = {"cuda": "13.0", "gpus": ["H200, 139 GiB"] * 3, "nccl": "2.28.9"}
    found = findings(monkeypatch, about, driver="580.1")
    assert [s for s in found if s.startswith("GPU")] == ["GPU 0", "GPU 1", "GPU 2"]
    assert found["nccl x 2"].verdict == "ok" and found["gloo x 2"].verdict == "ok"
    assert findings(monkeypatch, {**about, "nccl": None})["NCCL"].verdict == "no"


@pytest.mark.parametrize(("code", "why"), [(1, "RuntimeError: refused"), (None, "no answer in 90 s")])
def test_a_collective_that_fails_or_hangs_is_told_with_a_remedy(monkeypatch, code, why):
    finding = findings(monkeypatch, {}, collective=code)["gloo x 2"]
    assert finding.verdict == "no" and finding.fact == f"all_reduce fails: {why}"
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


def test_the_version_of_the_driver_is_read(tmp_path):
    path = tmp_path / "version"
    assert accelerators.nvidia_driver(path) is None
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert accelerators.nvidia_driver(path) == "580.95.05"


@pytest.mark.cluster
@pytest.mark.skipif(installed("torch") is None, reason="a collective needs torch")
def test_two_processes_really_sum_their_numbers():
    finding = accelerators._collective("gloo", 2)
    assert finding.verdict == "ok" and "all_reduce works" in finding.fact


@pytest.mark.cluster
@pytest.mark.skipif(installed("torch") is None, reason="a collective needs torch")
def test_a_backend_that_cannot_start_gives_its_own_sentence():
    finding = accelerators._collective("nonsense", 2)
    assert finding.verdict == "no" and "nonsense" in finding.fact.lower()
