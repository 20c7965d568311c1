"""Every storage is counted once, under the one who holds it first."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from trainfleet.monitor.profiling.holders import all_held, held_by, storages_of  # noqa: E402


def test_parameters_gradients_buffers_and_states_are_named_and_views_count_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5))
    model.register_parameter("tied", model[0].weight)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    sizes: dict[tuple[str, str], int] = {}
    for each, _ in held_by(model, optimizer):
        for module, size in each.parts:
            sizes[each.kind, module] = sizes.get((each.kind, module), 0) + size
    whole = 4 * (4 * 5 + 5)
    # The tied weight has the name under which it is found first: that of the model itself.
    assert sum(size for (kind, _), size in sizes.items() if kind == "parameters") == whole + 4 * 10
    assert sizes["gradients", "0"] + sizes["gradients", ""] == whole
    assert sizes["buffers", "1"] == 4 * 10 + 8
    assert sum(size for (kind, _), size in sizes.items() if kind == "optimizer") == 2 * (whole + 4 * 10) + 4 * 4


def test_a_bucket_is_dealt_out_to_those_whose_gradients_lie_in_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 6, bias=False))
    bucket = torch.zeros(17)  # one more than is used
    model[0].weight.grad, model[1].weight.grad = bucket[:4].view(2, 2), bucket[4:16].view(6, 2)
    (gradients,) = [each for each, _ in held_by(model, None) if each.kind == "gradients"]
    assert dict(gradients.parts) == {"0": 4 * 17 * 4 // 16, "1": 4 * 17 - 4 * 17 * 4 // 16}
    assert sum(size for _, size in gradients.parts) == gradients.size_bytes == 4 * 17


def test_other_tensors_and_the_batch_are_found_too() -> None:
    loose, batch = torch.ones(1234), {"input": [torch.ones(777)]}
    found = {each.size_bytes: each.kind for each, _ in all_held(None, None, batch)}
    assert (found[4 * loose.numel()], found[4 * 777]) == ("other", "batch")


def test_tensors_without_storage_are_passed_over() -> None:
    assert not list(storages_of(torch.ones(3, device="meta")))
    assert not list(storages_of(torch.ones(3).to_sparse()))
    assert not list(storages_of(torch.empty(0)))
