"""On a GPU: what is offloaded rests in pinned CPU memory, and the numbers are those without offload."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from models import MODELS  # noqa: E402

from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import NativeEngine, parallelize  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="offload to the CPU needs a GPU to come from"),
]
CASE = MODELS["transformer"]


def run(plan: Plan) -> tuple[list[Any], Any, Any]:
    with Mesh.from_env(plan, device="cuda") as mesh:
        model = parallelize(CASE.build(0), mesh, plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = NativeEngine(model, optimizer, CASE.loss_fn)
        for step in range(5):
            engine.forward_backward([CASE.micro_batch(0, step)])
            engine.clip(1.0)
            engine.step()
        parameter = model.get_parameter("head.weight")
        memory = optimizer.state[parameter]["exp_avg"].to_local()
        numbers = [p.full_tensor().detach().cpu() for p in model.parameters()]
        saved = {name: state.state_dict() for name, state in engine.state().items()}
        assert saved["optimizer"]["memory"]["head.weight"]["exp_avg"].local.device == memory.device
        return numbers, parameter.to_local(), memory


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_optimizer_state_rests_in_pinned_memory() -> None:
    plain, _, on_gpu = run(Plan(zero=2))
    numbers, parameter, memory = run(Plan(zero=2, offload="optimizer"))
    assert on_gpu.is_cuda and parameter.is_cuda
    assert not memory.is_cuda and memory.is_pinned()
    assert all(map(torch.equal, plain, numbers))


def test_parameters_rest_in_pinned_memory() -> None:
    plain, _, _ = run(Plan(zero=3))
    numbers, parameter, memory = run(Plan(zero=3, offload="parameters"))
    assert not parameter.is_cuda and parameter.is_pinned() and not memory.is_cuda
    for a, b in zip(plain, numbers):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
