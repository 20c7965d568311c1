"""Peaks come from the sheet of the very product, or from a measure that says so."""

from __future__ import annotations

import pytest
import torch

from trainfleet.parallel.peak import from_sheet, kind_of, peak_of


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A40", 149.7),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_a_gpu_is_found_by_its_own_name(name: str, teraflops: float) -> None:
    assert from_sheet(name, "bf16") == teraflops * 1e12


def test_what_no_sheet_tells_is_not_guessed() -> None:
    assert from_sheet("NVIDIA A4000", "bf16") is None
    assert from_sheet("Tesla V100-SXM2-16GB", "bf16") is None
    assert from_sheet("Tesla V100-SXM2-16GB", "fp16") == 125e12


def test_a_processor_is_measured_and_the_peak_says_so() -> None:
    peak = peak_of("cpu", "fp32")
    assert peak is not None and peak.source.startswith("measured") and "threads" in peak.source
    left = torch.ones(256, 256)
    assert 1e8 < peak.flops_per_second < 1e14 and bool((left @ left == 256).all())


def test_float32_is_tf32_only_where_torch_may() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert [kind_of(each, "cuda:0") for each in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]
        torch.set_float32_matmul_precision("high")
        assert (kind_of("fp32", "cuda:0"), kind_of("fp32", "cpu")) == ("tf32", "fp32")
    finally:
        torch.set_float32_matmul_precision(before)
