"""What the run of gpt_stdlib.yaml ends with: a sample of the model's own Python, and the figures it has to beat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stdlib_text import StdlibText

if TYPE_CHECKING:
    from gpt import GPT

    from trainfleet.mesh import Mesh

PROMPT = b"def "
SAMPLE_BYTES = 300


def finish(model: GPT, mesh: Mesh, folder: Path) -> dict[str, str | float]:
    """A sample, and nats per byte of two models that only count; all ranks call it together."""
    import torch

    generator = torch.Generator(mesh.device).manual_seed(0)  # equal on all ranks, as their forwards must be
    sample = PROMPT + model.generate(PROMPT, SAMPLE_BYTES, temperature=0.7, generator=generator)
    if not mesh.is_main:
        return {}
    baselines = {f"baseline/{name} (nats/byte)": round(nats, 3) for name, nats in StdlibText().baselines().items()}
    return {"sample": sample.decode(errors="replace"), **baselines}
