"""The table of optimizers is true, what is made right is right, and recipes get the optimizer they name."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from trainfleet.errors import ConfigError, PlanError
from trainfleet.parallel.joined_optimizer import JoinedOptimizer
from trainfleet.parallel.muon import GatheredMuon
from trainfleet.parallel.optimizers import SHORT_NAMES, TABLE, build_optimizer, check_optimizer, shard_safe
from trainfleet.plan import Plan

RIGHT = [cls for cls, standing in TABLE.items() if not standing.wrong_on_shards]
WRONG = [cls for cls, standing in TABLE.items() if standing.instead]
OPTIONS: dict[type[Optimizer], list[dict[str, Any]]] = {
    torch.optim.AdamW: [{"amsgrad": True}],
    torch.optim.SGD: [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    torch.optim.RMSprop: [{"momentum": 0.9, "centered": True}],
    torch.optim.Muon: [{"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}, {"weight_decay": 0.0}],
}


class Net(nn.Module):
    """Rows that do not divide, fewer rows than ranks, a scalar that FSDP2 leaves whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 5))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


def trained(make: Any, *, shard: bool, matrices_only: bool = False) -> dict[str, Tensor]:
    model = Net()
    if shard:
        fully_shard(model, ignored_params={model.scale})
    optimizer = make(model, [p for p in model.parameters() if p.ndim == 2 or not matrices_only])
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        # Every rank gets the same batch, so that only the optimizer can differ.
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in model.named_parameters()}


def difference(make: Any, *, matrices_only: bool = False) -> float:
    whole = trained(make, shard=False, matrices_only=matrices_only)
    shards = trained(make, shard=True, matrices_only=matrices_only)
    return max(float((whole[name] - shards[name]).detach().abs().max()) for name in whole)


def table_differences(classes: list[type[Optimizer]]) -> dict[str, float]:
    found = {}
    for cls in classes:
        for options in [{}, {"foreach": True}, *OPTIONS.get(cls, [])]:
            found[f"{cls.__name__} {options}"] = difference(lambda _, ps: cls(ps, lr=0.01, **options))  # noqa: B023
        if TABLE[cls].fused_on_shards:
            found[f"{cls.__name__} fused"] = difference(lambda _, ps: cls(ps, lr=0.01, fused=True))  # noqa: B023
    return found


@pytest.mark.parametrize(("size", "classes"), [(2, RIGHT), (4, [torch.optim.AdamW, torch.optim.SGD])])
def test_optimizers_called_right_equal_one_process_on_shards(ranks: Any, size: int, classes: list[Any]) -> None:
    for found in ranks(size, table_differences, classes):
        assert {name: value for name, value in found.items() if value > 1e-6} == {}


def failures() -> dict[str, bool]:
    """Which of the refused optimizers raise or differ on shards: if one no longer does, the table is out of date."""
    found = {}
    for cls in [*WRONG, torch.optim.Muon]:
        if cls is torch.optim.SparseAdam:
            continue
        step = cls.step

        def make(_: nn.Module, parameters: list[nn.Parameter], cls: Any = cls, step: Any = step) -> Any:
            optimizer = cls(parameters, lr=0.01)
            if cls is torch.optim.LBFGS:
                optimizer.step = lambda: step(optimizer, lambda: torch.tensor(1.0))
            return optimizer

        try:
            found[cls.__name__] = difference(make, matrices_only=cls is torch.optim.Muon) > 1e-6
        except (RuntimeError, NotImplementedError):
            found[cls.__name__] = True
    return found


def test_the_refused_ones_do_fail(ranks: Any) -> None:
    for found in ranks(2, failures):
        assert found == dict.fromkeys(found, True)


@pytest.mark.parametrize("cls", WRONG)
def test_what_is_wrong_on_shards_is_refused_with_what_to_use(cls: type[Optimizer]) -> None:
    optimizer = cls([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(PlanError, match=rf"{cls.__name__} does not work on shards .*Use {TABLE[cls].instead}, or set"):
        check_optimizer(optimizer, Plan(zero=2))
    check_optimizer(optimizer, Plan(zero=0))


def test_muon_is_refused_until_it_is_made_right() -> None:
    optimizer = torch.optim.Muon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(PlanError, match="shard_safe"):
        check_optimizer(optimizer, Plan(zero=1))
    assert shard_safe(optimizer) is optimizer
    check_optimizer(optimizer, Plan(zero=1))


def test_a_closure_is_refused_under_fp16() -> None:
    with pytest.raises(PlanError, match="several times in a step"):
        check_optimizer(torch.optim.LBFGS([nn.Parameter(torch.ones(2))]), Plan(precision="fp16"))


def fused_sgd_refusal() -> str:
    model = fully_shard(nn.Linear(4, 4))
    try:
        check_optimizer(torch.optim.SGD(model.parameters(), fused=True), Plan(zero=2))
    except PlanError as refusal:
        return str(refusal)
    return ""


def test_a_kernel_that_takes_no_shards_is_refused(ranks: Any) -> None:
    assert "SGD(fused=True) does not work on shards" in ranks(2, fused_sgd_refusal)[0]


class Stranger(torch.optim.SGD):
    pass


def test_a_stranger_on_shards_is_allowed_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_optimizer(Stranger([nn.Parameter(torch.ones(2))], lr=1.0), Plan(zero=0))
        assert not caplog.records
        check_optimizer(Stranger([nn.Parameter(torch.ones(2))], lr=1.0), Plan(zero=3))
    (record,) = caplog.records
    assert "Stranger" in record.getMessage() and "trainfleet verify" in record.getMessage()


def built_differences() -> dict[str, float]:
    names = [name for name, cls in SHORT_NAMES.items() if cls in RIGHT or cls is torch.optim.Muon]
    return {name: difference(lambda model, _: build_optimizer(name, model, 0.01)) for name in names}  # noqa: B023


def test_recipes_optimizers_equal_one_process_on_shards(ranks: Any) -> None:
    for found in ranks(2, built_differences):
        assert len(found) == 11
        assert {name: value for name, value in found.items() if value > 1e-6} == {}


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.norm = nn.LayerNorm((3, 4))
        self.inner = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5, bias=False)


def decays(optimizer: Optimizer, model: nn.Module) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_weight_decay_is_for_matrices_that_are_not_embeddings() -> None:
    model = Language()
    optimizer = build_optimizer("adamw", model, 1e-3, {"weight_decay": 0.1, "betas": [0.9, 0.95]})
    assert decays(optimizer, model) == {
        "tokens.weight": 0.0,
        "pos_embed": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "inner.bias": 0.0,
        "inner.weight": 0.1,
        "head.weight": 0.1,
    }
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_decay_all_decays_all() -> None:
    model = Language()
    optimizer = build_optimizer("adamw", model.named_parameters(), 1e-3, {"weight_decay": 0.1, "decay_all": True})
    assert set(decays(optimizer, model).values()) == {0.1} and len(optimizer.param_groups) == 1


def test_without_the_model_embeddings_are_known_by_name() -> None:
    model = Language()
    found = decays(build_optimizer("adamw", model.named_parameters(), 1e-3), model)
    assert (
        found["pos_embed"] == 0 and found["inner.bias"] == 0 and found["inner.weight"] == found["tokens.weight"] == 0.01
    )


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = Language()
    args = {"weight_decay": 0.2, "momentum": 0.9, "adamw": {"betas": [0.8, 0.9]}}
    optimizer = build_optimizer("muon", model, 1e-3, args)
    assert isinstance(optimizer, JoinedOptimizer)
    muon, adamw = optimizer.parts
    assert type(muon) is GatheredMuon and type(adamw) is torch.optim.AdamW
    assert {p.shape for p in muon.param_groups[0]["params"]} == {(4, 4), (5, 4)}
    assert muon.param_groups[0]["momentum"] == 0.9 and adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert set(decays(optimizer, model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    check_optimizer(optimizer, Plan(zero=2))


def test_a_kernel_is_fused_where_torch_has_one() -> None:
    model = nn.Linear(2, 2)
    assert all(group["fused"] for group in build_optimizer("adamw", model, 1.0).param_groups)
    assert all(group["fused"] for group in build_optimizer("sgd", model, 1.0).param_groups)
    assert not build_optimizer("adamw", model, 1.0, {"foreach": True}).param_groups[0]["fused"]
    assert not build_optimizer("adamw", model, 1.0, {"fused": False}).param_groups[0]["fused"]


def test_tied_parameters_come_once_and_import_paths_work() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = build_optimizer("torch.optim:SGD", model.named_parameters(remove_duplicate=False), 0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("adamww", {}, "Did you mean 'adamw'"),
        ("adamw", {"beta": [0.9, 0.99]}, "Did you mean 'betas'"),
        ("adamw", {"lr": 1}, "the rate is optimizer.lr"),
        ("adamw", {"betas": [2, 3]}, "refuses the arguments"),
        ("muon", {"adamw": {"momentum": 1}}, "which adamw does not take"),
        ("torch.nn:Identity", {}, "not an Optimizer"),
        ("torch.optim:AdamV", {}, "Did you mean"),
    ],
)
def test_bad_names_and_arguments_are_sentences(name: str, args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_optimizer(name, nn.Linear(2, 2), 1e-3, args)


def test_nothing_to_train_and_nothing_there_are_sentences() -> None:
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        build_optimizer("adamw", nn.Linear(2, 2).requires_grad_(False), 1e-3)
    with pytest.raises(ConfigError, match="weight is on the meta device"):
        build_optimizer("adamw", nn.Linear(2, 2, device="meta"), 1e-3)
