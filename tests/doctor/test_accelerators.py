from __future__ import annotations

import json

import pytest

from trainfleet.doctor import accelerators
from trainfleet.doctor.probe import Tried

NEW = "2.13.0+cpu"


def findings(monkeypatch, about: dict[str, object], *, driver: str | None = None, code=0, variables=None, **collective):
    """What is found where torch says `about` itself, and a collective went as told."""
    gpus = about.pop("gpus", [])
    facts = [{"version": NEW, "cuda": None, "nccl": None, "gloo": True, "count": len(gpus), **about}]
    went = collective or {"seconds": 0.004, "bytes": 4_000_000}
    facts.append({"backend": "gloo", "size": 2, **went})
    if gpus:
        facts += [{"backend": "nccl", "size": 2, **went}, {"gpus": gpus}]
    output = "a word of a library\n" + "".join(json.dumps(fact) + "\n" for fact in facts)
    monkeypatch.setattr(accelerators, "nvidia_driver", lambda: driver)
    tried = Tried(returncode=code, output=output, error="")
    return {finding.subject: finding for finding in accelerators.check_torch([tried], variables or {})}


def test_without_torch_one_finding_says_what_still_works():
    (finding,) = accelerators.check_torch([])
    assert finding.verdict == "no" and "configuration, stores" in finding.fact
    assert finding.remedy == 'pip install "trainfleet[torch]"'


@pytest.mark.parametrize(
    ("code", "said"), [(1, "OSError: libcudart.so (exit code 1)"), (-11, "(killed by SIGSEGV)"), (None, "in 90 s")]
)
def test_a_torch_that_does_not_load_is_told_with_its_error_and_ends_the_check(code, said):
    tried = Tried(returncode=code, output="", error="OSError: libcudart.so")
    (finding,) = accelerators.check_torch([tried])
    assert finding.verdict == "no" and said in finding.fact and "--force-reinstall" in finding.remedy


@pytest.mark.parametrize(
    ("version", "verdict"), [(NEW, "ok"), ("2.13.1", "ok"), ("2.12.1", "note"), ("2.14.0a0", "note"), ("2.9.1", "no")]
)
def test_versions_are_tested_or_not(monkeypatch, version, verdict):
    assert findings(monkeypatch, {"version": version})["torch"].verdict == verdict


def test_a_driver_without_a_cuda_build_is_told(monkeypatch):
    assert "CPU build" in findings(monkeypatch, {}, driver="550.1")["GPU"].fact
    assert "can use no GPU" in findings(monkeypatch, {"cuda": "13.0"}, driver="550.1")["GPU"].fact
    assert findings(monkeypatch, {})["GPU"].verdict == "ok"


@pytest.mark.parametrize("value", ["", "-1", "7"])
def test_a_variable_that_names_no_gpu_is_told(monkeypatch, value):
    found = findings(monkeypatch, {"cuda": "13.0"}, driver="550.1", variables={"CUDA_VISIBLE_DEVICES": value})["GPU"]
    assert found.verdict == "no" and f"CUDA_VISIBLE_DEVICES={value!r} names none" in found.fact


def test_gpus_are_listed_and_nccl_is_tried_on_two_of_them(monkeypatch):
    about = {"cuda": "13.0", "gpus": ["H200, 139 GiB"] * 3, "nccl": "2.28.9"}
    found = findings(monkeypatch, dict(about), driver="580.1")
    assert [s for s in found if s.startswith("GPU")] == ["GPU 0", "GPU 1", "GPU 2"]
    assert found["nccl x 2"].verdict == "ok" and found["gloo x 2"].fact.endswith("4.0 MB in 4.0 ms, 1 GB/s")
    assert findings(monkeypatch, {**about, "nccl": None})["NCCL"].verdict == "no"


def test_a_collective_that_fails_is_told_with_a_remedy(monkeypatch):
    finding = findings(monkeypatch, {}, error="rank 1 gave no answer in 15 s")["gloo x 2"]
    assert finding.verdict == "no" and finding.fact == "all_reduce fails: rank 1 gave no answer in 15 s"
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


def test_a_trial_that_crashes_late_keeps_what_it_found_before(monkeypatch):
    found = findings(monkeypatch, {}, code=-11)
    assert found["gloo x 2"].verdict == "ok" and "killed by SIGSEGV" in found["torch's trial"].fact


def test_the_version_of_the_driver_is_read(tmp_path):
    path = tmp_path / "version"
    assert accelerators.nvidia_driver(path) is None
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert accelerators.nvidia_driver(path) == "580.95.05"
