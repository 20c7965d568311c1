"""Peak: how many floating-point operations a device could do in a second, by its data sheet or by measure.

The figures are those of matrix products without sparsity, accumulated in float32, from the vendors' data sheets:
NVIDIA's for each product (where a sheet gives the figure with sparsity alone, half of it) and its white papers on Ada
and Ampere for GeForce, AMD's for Instinct. A device under a power limit stays below its sheet.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["bf16", "fp16", "tf32", "fp32"]
"""The arithmetic of matrix products."""

_TERA = 1e12
_SHEETS: dict[str, dict[Kind, float]] = {
    # 16 bits, TF32, float32 outside the tensor cores; in teraflops
    "B200": {"bf16": 2250, "fp16": 2250, "tf32": 1100, "fp32": 75},
    "GH200": {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67},
    "H200": {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67},
    "H100": {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67},
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60},
    "H800": {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67},
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "A800": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "A30": {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3},
    "A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "L40": {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5},
    "L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    "RTX 6000 Ada": {"bf16": 364, "fp16": 364, "tf32": 182, "fp32": 91.1},
    "RTX A6000": {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "V100-SXM2": {"fp16": 125, "fp32": 15.7},
    "V100-PCIE": {"fp16": 112, "fp32": 14},
    "T4": {"fp16": 65, "fp32": 8.1},
    "MI300X": {"bf16": 1307, "fp16": 1307, "tf32": 653, "fp32": 163},
    "MI250X": {"bf16": 383, "fp16": 383, "fp32": 47.9},
    "MI210": {"bf16": 181, "fp16": 181, "fp32": 22.6},
}

_WIDTH = 1024
_MEASURED_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """What one device could do at best."""

    flops_per_second: float
    source: str
    """In words for a person: a data sheet, a measure, or the recipe."""


def peak_of(device: str, kind: Kind) -> Peak | None:
    """That of a rank's device for matrix products in `kind`; None for a GPU that the table does not have.

    A CPU is measured, which takes 0.1 s: the best of some products of square matrices on the threads of this process.
    """
    if torch.device(device).type == "cpu":
        return measured(kind)
    name = torch.cuda.get_device_name(device)
    found = from_sheet(name, kind)
    return None if found is None else Peak(flops_per_second=found, source=f"data sheet of {name}, {kind}, dense")


def from_sheet(name: str, kind: Kind) -> float | None:
    """Of the GPU that calls itself `name`, such as `NVIDIA H100 80GB HBM3`; None where no sheet is known."""
    words = name.replace("-", " ").split()
    fitting = [product for product in _SHEETS if _is_part(product.replace("-", " ").split(), words)]
    if not fitting:
        return None
    teraflops = _SHEETS[max(fitting, key=len)].get(kind)
    return None if teraflops is None else teraflops * _TERA


def _is_part(product: list[str], words: list[str]) -> bool:
    """Whether all words of the product are in the name, so that `H100 PCIe` is another one than `H100`."""
    return all(each in words for each in product)


def measured(kind: Kind) -> Peak:
    """The best rate of products of matrices here on the CPU, in `kind`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    with torch.no_grad():
        left, right = torch.ones(_WIDTH, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
        torch.mm(left[:64], right)  # what the first product sets up
        begun, best = time.perf_counter(), float("inf")
        while best == float("inf") or time.perf_counter() - begun < _MEASURED_SECONDS:
            before = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - before)
    rate = 2 * _WIDTH**3 / best
    return Peak(
        flops_per_second=rate,
        source=f"measured: a product of matrices, {kind}, {torch.get_num_threads()} threads of the processor",
    )


def kind_of(precision: str, device: str) -> Kind:
    """The arithmetic of matrix products under plan.precision: TF32 where torch was told that float32 may be that."""
    if precision == "bf16":
        return "bf16"
    if precision == "fp16":
        return "fp16"
    is_gpu = torch.device(device).type == "cuda"
    return "tf32" if is_gpu and torch.get_float32_matmul_precision() != "highest" else "fp32"
