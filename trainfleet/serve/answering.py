"""The model that is meant: one that answers already, a module on this host, or services on other hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from trainfleet.errors import ConfigError
from trainfleet.imports import imported
from trainfleet.serve.terms import Answering

if TYPE_CHECKING:
    from torch import nn

    from trainfleet.net.address import Address
    from trainfleet.net.token import Token

Meant: TypeAlias = "Answering | nn.Module | str | Address | Token | Sequence[str | Address | Token]"
"""A Predictor or RemoteModel, a module, or addresses and tokens of services."""


@contextmanager
def answering(model: Meant) -> Iterator[Answering]:
    """What answers for `model`; connections that are opened here are closed at the end.

    A module answers where its parameters lie, and has its modes of training back afterwards.
    """
    if hasattr(type(model), "answers"):  # not isinstance: that would take the digest of all weights
        yield model  # type: ignore[misc]
        return
    torch = imported("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        from trainfleet.serve.predictor import Predictor

        training = [module for module in model.modules() if module.training]
        try:
            yield Predictor(model)
        finally:
            for module in training:
                module.training = True
        return
    from trainfleet.net.address import Address
    from trainfleet.net.token import Token

    places: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
    if not places or not all(isinstance(place, str | Address | Token) for place in places):
        raise ConfigError(
            f"A {type(model).__name__} cannot answer for batches.",
            hint="Give a Predictor, an nn.Module, or addresses of `trainfleet gpu-service`.",
        )
    from trainfleet.serve.remote import RemoteModel

    remote = RemoteModel(places)
    try:
        yield remote
    finally:
        remote.close()
