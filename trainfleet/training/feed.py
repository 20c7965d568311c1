"""A recipe on both sides of the network: the service that has its data, and the recipe of a trainer that is fed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainfleet.comm.group import Group
from trainfleet.data import LocalBatches, SourceConfig
from trainfleet.data.config import REMOTE
from trainfleet.data.feed import DataService, RemoteBatches
from trainfleet.data.feed.config import NOT_KEPT, certificates_in
from trainfleet.errors import ConfigError, DataError
from trainfleet.net.credentials import Credentials
from trainfleet.net.token import is_token
from trainfleet.training.recipe import Recipe


def service_of(recipe: Recipe, **ways: Any) -> DataService:
    """The recipe's training and evaluation data as a service, not open yet; `ways`: as DataService takes them.

    Sizes and seed are those of one rank; trainers ask for their own. ConfigError where the recipe has no data that
    can be served.
    """
    if recipe.data.source == REMOTE:
        raise ConfigError(
            "data.source is remote: this recipe is for the side that trains.",
            hint="Feed the recipe that names the data itself, and train it with --feed.",
        )
    size, seed = _size(recipe), recipe.train.seed
    training = recipe.data.open_training(size=size, seed=seed)
    has_evaluation = recipe.data.evaluation is not None and recipe.data.evaluation.source != REMOTE
    evaluation = recipe.data.open_evaluation(size=size, seed=seed) if has_evaluation else None
    for name, stream in (("data.source", training), ("data.evaluation", evaluation)):
        if stream is not None and not isinstance(stream, LocalBatches):
            raise ConfigError(
                f"{name} is only iterated, and feeders make any part of an epoch when asked.",
                hint="Give it len() and [index]; files of records have them as parquet, csv, numpy or text.",
            )
    assert isinstance(training, LocalBatches) and (evaluation is None or isinstance(evaluation, LocalBatches))
    return DataService(training, evaluation=evaluation, **ways)


@contextmanager
def own_feeder(recipe: Recipe, workers: int, certificates: str | None = None) -> Iterator[str]:
    """The address of a service of `workers` processes on this host, which has the recipe's data too.

    A feeder among others: it is given a batch wherever that is back first, and its batches cross no network.
    """
    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    credentials = Credentials(certificates=certificates_in(Path(certificates))) if certificates is not None else None
    with service_of(recipe, address="127.0.0.1:0", credentials=credentials).open() as service:
        yield str(service.address)


def _size(recipe: Recipe) -> int:
    batch = recipe.batch
    return batch.micro_batch or max(1, (batch.global_batch or 1) // (batch.accumulation or 1))


def as_fed(recipe: Recipe, /, **ways: Any) -> Recipe:
    """`recipe` with its data, and its evaluation where it has one, from feeders; `ways`: as FeedConfig takes them."""
    data = recipe.data
    evaluation = SourceConfig(source=REMOTE) if data.evaluation is not None else None
    args = (data.args if data.source == REMOTE else {}) | ways
    return replace(recipe, data=replace(data, source=REMOTE, args=args, evaluation=evaluation))


def without_tokens(recipe: Recipe) -> Recipe:
    """`recipe` as a run may write it down: whoever reads a run folder cannot connect to its feeders or page."""
    data, evaluation = recipe.data, recipe.data.evaluation
    if data.source == REMOTE:
        data = replace(data, args=_masked(data.args))
    if evaluation is not None and evaluation.source == REMOTE:
        data = replace(data, evaluation=replace(evaluation, args=_masked(evaluation.args)))
    return replace(recipe, data=data, monitor=recipe.monitor.without_secrets())


def refuse_unlike_feeders(world: Group, *streams: Any) -> None:
    """DataError on all ranks where the feeders that theirs began with do not have the same samples.

    Each stream of a rank takes the first feeder that answers for the measure of the others.
    """
    ours = [stream.digests for stream in streams if isinstance(stream, RemoteBatches)]
    told = world.exchange(ours)
    first = next((digests for rank in told for digests in rank), None)
    for rank, theirs in enumerate(told):
        if any(digests != first for digests in theirs):
            raise DataError(
                f"The feeders of rank {rank} make other samples than those of rank 0, or than each other.",
                hint="Give all feeders the same recipe, data and code; their log names what differs.",
            )


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_masked(inner) for inner in value]
    return NOT_KEPT if isinstance(value, str) and is_token(value) else value
