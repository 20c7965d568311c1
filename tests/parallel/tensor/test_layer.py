"""Linear layers are known by their class, whichever way round it keeps the weight."""

from __future__ import annotations

import torch
from torch import nn

from trainfleet.parallel.tensor.layer import Layer, called_by, is_in_list, layer_of


class Conv1D(nn.Module):
    """As in transformers: y = x W + b with W [in, out]."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.ones(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))


def test_a_linear_layer_is_known_however_it_keeps_its_weight():
    assert layer_of(nn.Linear(4, 6)) == Layer(4, 6, 0)
    assert layer_of(Conv1D(6, 4)) == Layer(4, 6, 1)
    assert layer_of(nn.Embedding(4, 6)) is None and layer_of(nn.LayerNorm(4)) is None
    changed = nn.Linear(4, 6)
    changed.forward = changed.forward  # somebody computes it in a way of their own
    assert layer_of(changed) is None


def test_a_convolution_is_cut_by_channels_or_by_groups():
    plain, by_groups = layer_of(nn.Conv1d(4, 6, 3)), layer_of(nn.Conv2d(4, 6, 3, groups=2))
    back = layer_of(nn.ConvTranspose1d(4, 6, 3))
    assert plain == Layer(4, 6, 0, 1, True) and by_groups == Layer(4, 6, 0, 2, True) and back.out_dim == 1
    cuts = [(each.split_dim(is_column=True), each.split_dim(is_column=False)) for each in (plain, back, by_groups)]
    assert cuts == [(0, 1), (1, 0), (0, 0)]
    assert layer_of(nn.LazyConv1d(6, 3)) is None
    assert layer_of(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))) is None


def test_members_of_lists_are_called_by_the_module_that_has_the_list():
    model = nn.Module()
    model.first, model.layers = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.ReLU()])])
    called = dict(called_by(model, "model"))
    assert list(called) == ["model.first", "model.layers.0", "model.layers.1.0"]
    assert is_in_list(model, called["model.layers.0"]) and not is_in_list(model, model.first)
