"""On GPUs: blocks dealt out to two devices, and activations that leave one, give the numbers of one device."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402

from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import NativeEngine, parallelize  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402

pytestmark = pytest.mark.device
CASE = MODELS["transformer"]


def run(plan: Plan) -> tuple[list[Any], list[Any]]:
    """Parameters after three steps, and their devices."""
    with Mesh.from_env(plan, device="cuda") as mesh:
        model = parallelize(CASE.build(0, width=256, depth=6), mesh, plan)
        engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), CASE.loss_fn)
        for step in range(3):
            engine.forward_backward([CASE.micro_batch(0, step)])
            engine.clip(1.0)
            engine.step()
        numbers = [parameter.detach().cpu() for parameter in model.parameters()]
        return numbers, [parameter.device for parameter in model.parameters()]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="dealing blocks out to two GPUs needs two")
def test_two_gpus_compute_what_one_does() -> None:
    plain, _ = run(Plan())
    numbers, devices = run(Plan(devices=("cuda:0", "cuda:1")))
    assert {device.index for device in devices} == {0, 1}
    assert all(map(torch.equal, plain, numbers))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU and the CPU are two devices; there is no GPU")
def test_a_gpu_and_the_cpu_compute_what_the_gpu_does() -> None:
    plain, _ = run(Plan())
    numbers, devices = run(Plan(devices=("cpu", "cuda:0")))
    assert {device.type for device in devices} == {"cpu", "cuda"}
    for a, b in zip(plain, numbers):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offload to the CPU needs a GPU to come from")
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_activations_leave_the_gpu_and_come_back_as_they_were(recompute: Any) -> None:
    plain, _ = run(Plan(recompute=recompute))
    numbers, _ = run(Plan(recompute=recompute, activations="offload"))
    assert all(map(torch.equal, plain, numbers))
