"""The table of precision holds: where float32 stays, where it does not, and that a model which breaks it is named."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from oracle import whole
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.precision import (
    FLOAT32_OPERATORS,
    cast_compute,
    float32_modules,
    raise_to_float32,
    refuse_narrow_parameters,
    refuse_narrow_state,
    watch_dtypes,
)
from trainfleet.plan import Plan

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 1)
        self.batch_norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(6, 6)
        self.layer_norm = nn.LayerNorm(6)
        self.recurrence = nn.GRU(6, 6, batch_first=True)
        self.router = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.linear(self.batch_norm(self.convolution(x)))
        attention = torch.softmax(x @ x.mT, -1)
        return {"y": self.router(self.recurrence(self.layer_norm(attention @ x))[0]), "attention": attention}


def dtypes(model: nn.Module, x: Tensor) -> dict[str, torch.dtype]:
    """The dtype that each module returned, and the model."""
    found: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = output["y"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output
            found[name] = output.dtype

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    output = model(x)
    for handle in handles:
        handle.remove()
    found["attention"] = output["attention"].dtype
    return found


@pytest.mark.parametrize("precision", LOW)
def test_products_are_low_and_norms_recurrences_and_outputs_float32(precision: str) -> None:
    plan = Plan(precision=precision, float32_modules=("router",))
    model = cast_compute(Everything(), plan, "cpu")
    found = dtypes(model, torch.randn(2, 4, 6))
    low = {name for name, dtype in found.items() if dtype == LOW[precision]}
    assert low == {"convolution", "linear"}
    assert {found[name] for name in set(found) - low} == {torch.float32}
    assert {name for name, _ in float32_modules(model, plan, "cpu")} == {
        *("batch_norm", "layer_norm", "recurrence", "router")
    }
    with watch_dtypes(model, plan, "cpu") as problems:
        model(torch.randn(2, 4, 6))
    assert problems == []


def test_gradients_are_float32_and_hooks_do_not_stay() -> None:
    plan = Plan(precision="bf16")
    model = cast_compute(Everything(), plan, "cpu")
    with watch_dtypes(model, plan, "cpu"):
        model(torch.randn(2, 4, 6))["y"].sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(module._forward_hooks for module in model.modules())


OPERATORS = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2])),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    "layer_norm": lambda x: F.layer_norm(x, (3,)),
    "rms_norm": lambda x: F.rms_norm(x, (3,)),
    "group_norm": lambda x: F.group_norm(x, 1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norm": lambda x: x.norm(dim=-1),
    "cosine": lambda x: F.cosine_similarity(x, x),
    "sum": lambda x: x.sum(),
    "sum of rows": lambda x: x.sum(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "prod": lambda x: x.prod(),
    "square by power": lambda x: x**2,
    "powers of two": lambda x: 2**x,
    "exp": torch.exp,
    "log": torch.log,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "softplus": F.softplus,
    "mse": lambda x: F.mse_loss(x, torch.zeros_like(x)),
    "upsample": lambda x: F.interpolate(x[None], scale_factor=2),
}


@pytest.mark.parametrize("precision", LOW)
def test_the_cpu_keeps_these_operators_in_float32(precision: str) -> None:
    cast_compute(nn.Linear(1, 1), Plan(precision=precision), "cpu")
    x = torch.rand(3, 3, dtype=LOW[precision])
    with torch.autocast("cpu", dtype=LOW[precision]):
        found = {name: operator(x).dtype for name, operator in OPERATORS.items()}
        assert {name for name, dtype in found.items() if dtype != torch.float32} == set()
        assert (x @ x).dtype == F.gelu(x).dtype == x.mean(-1).dtype == LOW[precision]
        assert torch.arange(3).sum().dtype == torch.int64
        assert x.double().exp().dtype == torch.float64
    assert torch.exp(x).dtype == LOW[precision], "outside of autocast nothing changes"


def test_the_list_is_that_of_cuda() -> None:
    """Of what CUDA's autocast knows and the CPU's does not, all but these is in our list."""
    # Low precision: products. And inputs of two dtypes, which are raised to the wider.
    low = {"_convolution", "convolution", "cudnn_convolution", "cudnn_convolution_transpose", "addmv", "addr", "mv"}
    low |= {"einsum", "chain_matmul", "linalg_multi_dot", "_scaled_dot_product_flash_attention"}
    low |= {"gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell"}
    promoted = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "index_put", "scatter_add"}
    promoted |= {"tensordot"}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    cuda = {name.removeprefix("aten::") for name in names if has_kernel(name, "AutocastCUDA")}
    cpu = {name.removeprefix("aten::") for name in names if has_kernel(name, "AutocastCPU")}
    assert cuda - cpu - low - promoted - set(FLOAT32_OPERATORS) == set()


def test_nothing_is_said_on_the_way() -> None:
    program = (
        "import torch; from torch import nn; from trainfleet.plan import Plan; "
        "from trainfleet.parallel.precision import cast_compute; "
        "m = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Softmax(-1)); "
        "cast_compute(m, Plan(precision='fp16'), 'cpu')(torch.ones(2, 3)).square().sum().backward()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Stubborn(nn.Module):
    """Computes in float32 behind the plan's back, or narrows what should stay wide."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = NarrowNorm() if how == "norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        if self.how == "switched off":
            with torch.autocast("cpu", enabled=False):
                return self.second(x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.how == "its own"):
            return self.second(x.float()).float()


class NarrowNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / x.norm()).bfloat16()


def engine_step(how: str, plan: Plan, rank: int | None = None) -> None:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(Stubborn(how if rank in (None, mesh.rank) else "obedient"), mesh, plan)
        engine = NativeEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda y, batch: y.sum())
        for _ in range(2):
            engine.forward_backward([torch.ones(2, 4)])
            engine.step()


@pytest.mark.parametrize(
    ("how", "precision", "message"),
    [
        ("switched off", "bf16", r"second \(Linear\) computed float32 where the plan says bfloat16.*float32_modules"),
        ("its own", "fp32", r"second \(Linear\) computed bfloat16 where the plan says float32. Take out its own casts"),
        ("norm", "bf16", r"norm \(NarrowNorm\) computed bfloat16 where the plan says float32"),
    ],
)
def test_the_module_that_breaks_the_table_is_named(ranks: RankPools, how: str, precision: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ranks(1, engine_step, how, Plan(precision=precision))


def all_hear() -> str:
    with pytest.raises(PlanError) as caught:
        engine_step("its own", Plan(), rank=1)
    return str(caught.value)


def test_all_ranks_stop_where_one_breaks_the_table(ranks: RankPools) -> None:
    first, second = ranks(2, all_hear)
    assert first == second and "second (Linear)" in first


def test_what_the_plan_names_may_be_float32(ranks: RankPools) -> None:
    ranks(1, engine_step, "switched off", Plan(precision="bf16", float32_modules=("second",)))


def one_layer(precision: str) -> bool:
    with Mesh.from_env(Plan(precision=precision)) as mesh:
        model = parallelize(nn.Linear(4, 2), mesh, Plan(precision=precision))
        engine = NativeEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda y, batch: y.mean() / 100)
        engine.forward_backward([torch.ones(2, 4)])
        return engine.step()


def test_a_model_that_is_one_layer_returns_float32(ranks: RankPools) -> None:
    assert [ranks(1, one_layer, precision) for precision in LOW] == [[True], [True]]


class NarrowMomentum(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = parameter.grad.bfloat16()


def narrow_optimizer() -> None:
    with Mesh.from_env(Plan()) as mesh:
        model = parallelize(nn.Linear(2, 2), mesh, Plan())
        engine = NativeEngine(model, NarrowMomentum(model.parameters(), lr=0.1), lambda y, batch: y.sum())
        engine.forward_backward([torch.ones(2, 2)])
        engine.step()


def test_narrow_optimizer_state_is_refused(ranks: RankPools) -> None:
    with pytest.raises(PlanError, match=r"momentum of weight is bfloat16.*Make NarrowMomentum keep float32"):
        ranks(1, narrow_optimizer)
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    refuse_narrow_state([("x", parameter)], torch.optim.SGD([parameter], lr=1.0))


def test_trained_parameters_are_wide_and_frozen_ones_as_they_like() -> None:
    model = nn.Linear(2, 2).bfloat16()
    with pytest.raises(PlanError, match="Parameter weight is bfloat16"):
        refuse_narrow_parameters(model)
    refuse_narrow_parameters(model.requires_grad_(False))


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.caches = torch.is_autocast_cache_enabled()
        return x


def test_autocast_keeps_no_copy_of_every_weight_until_forward_ends() -> None:
    model = cast_compute(nn.Sequential(nn.Linear(2, 2), Asks()), Plan(precision="bf16"), "cpu")
    model(torch.ones(1, 2))
    assert model[1].caches is False


def test_only_narrow_floats_are_raised() -> None:
    given = {"x": torch.ones(1).half(), "n": [torch.ones(1, dtype=torch.int8), "text"], "d": torch.ones(1).double()}
    found = raise_to_float32(given)
    assert found["x"].dtype == torch.float32 and found["n"][0].dtype == torch.int8 and found["n"][1] == "text"
    assert found["d"].dtype == torch.float64


def low_steps(plan: Plan) -> list[Tensor]:
    case = MODELS["transformer"]
    with Mesh.from_env(plan) as mesh:
        model = parallelize(case.build(0), mesh, plan)
        engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), case.loss_fn)
        for step in range(4):
            engine.forward_backward([case.micro_batch(0, 2 * step + i) for i in range(2)])
            engine.step()
        return [whole(parameter) for parameter in model.parameters()]


def test_every_stage_goes_through_the_same_arithmetic(ranks: RankPools) -> None:
    for precision in LOW:
        replicated, *others = (ranks(1, low_steps, Plan(zero=zero, precision=precision))[0] for zero in (0, 1, 3))
        for sharded in others:
            assert all(map(torch.equal, replicated, sharded))
