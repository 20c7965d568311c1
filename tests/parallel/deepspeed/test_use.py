"""Uses of parameters are counted, and optimizers that flat partitions mislead are refused."""

from __future__ import annotations

import pytest
import torch

from trainfleet.errors import PlanError
from trainfleet.parallel.deepspeed.use import Use, refuse_for_deepspeed, said_of_stage_3
from trainfleet.plan import Plan


def test_a_parameter_that_some_micro_batch_did_not_use_is_named() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 1, bias=False), "b": torch.nn.Linear(2, 1, bias=False)})
    use = Use(model)
    use.start()
    (model["a"](torch.ones(2)) + model["b"](torch.ones(2))).backward()
    model["a"](torch.ones(2)).backward()
    counts = use.counts("cpu").tolist()
    assert counts == [2.0, 1.0]
    with pytest.raises(PlanError, match=r"b.weight got a gradient in 1 of the 2 micro-batches"):
        use.refuse_uneven(counts, 2)
    use.refuse_uneven([2.0, 2.0], 2)
    use.drop_unused([2.0, 0.0])
    assert model["b"].weight.grad is None and model["a"].weight.grad is not None


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Muon, torch.optim.Adafactor])
def test_optimizers_that_look_at_whole_tensors_are_refused_on_partitions(kind: type[torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(3, 3, bias=False)
    with pytest.raises(PlanError, match=f"{kind.__name__} does not work on DeepSpeed's partitions"):
        refuse_for_deepspeed(model, kind(model.parameters()), Plan(engine="deepspeed", zero=1), 2)
    refuse_for_deepspeed(model, kind(model.parameters()), Plan(engine="deepspeed"), 2)


def test_only_the_one_error_of_stage_3_is_put_in_words() -> None:
    with pytest.raises(PlanError, match="stage 3"), said_of_stage_3(Plan(engine="deepspeed", zero=3)):
        vars(1)
    with pytest.raises(TypeError), said_of_stage_3(Plan(engine="deepspeed", zero=2)):
        vars(1)
    with pytest.raises(TypeError, match="other"), said_of_stage_3(Plan(engine="deepspeed", zero=3)):
        raise TypeError("other")
