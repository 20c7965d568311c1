"""A recipe without its training: the model it made, ready to answer, and its data in order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch
from trainfleet.checkpoint import Checkpointer
from trainfleet.checkpoint.catalog import open_place
from trainfleet.checkpoint.foreign import is_foreign
from trainfleet.checkpoint.foreign.hub import is_of_hub
from trainfleet.checkpoint.weights import load_weights
from trainfleet.data import IterableBatches, LocalBatches, SourceConfig
from trainfleet.errors import CheckpointError, ConfigError
from trainfleet.serve.predictor import Predictor
from trainfleet.training.deepspeed_file import with_deepspeed_file
from trainfleet.training.job import Given, build_model
from trainfleet.training.losses import loss_by_name
from trainfleet.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from trainfleet.data.feed import RemoteBatches

STREAMS = ("evaluation", "training")


def predictor_of(recipe: Recipe, weights: str | None = None, device: str | None = None) -> Predictor:
    """The recipe's model, whole and in its evaluation mode, with its loss and `data.on_device`.

    weights   what `load_weights` takes; None: the newest checkpoint of the recipe's run. From checkpoints of a run with
              train.ema_decay the averages, which are what it was evaluated with
    device    None: a GPU where there is one

    Of `plan` only what casts: precision, float32_modules, entry_points. CheckpointError where there are no weights, or
    they do not fit.
    """
    import torch

    from trainfleet.parallel.precision import cast_compute

    recipe = with_deepspeed_file(recipe)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(replace(recipe, model=replace(recipe.model, deferred=False)), Given())
    _load(recipe, weights or recipe.checkpoint.folder or recipe.folder, model, is_given=weights is not None)
    model = cast_compute(model.to(device), recipe.plan, device.split(":")[0])
    return Predictor(
        model,
        loss_fn=loss_by_name(recipe.loss),
        prepare=_for_evaluation(recipe.data.open_on_device()),
        device=device,
        classes=0 if recipe.loss == "mse" else None,
    )


def batches_of(recipe: Recipe, stream: str = "evaluation") -> LocalBatches | IterableBatches | RemoteBatches:
    """One pass of the recipe's `evaluation` or `training` data: in order, to the last sample, by data.workers."""
    size, _, _ = recipe.batch.resolve(1)
    data, seed = recipe.data, recipe.train.seed
    if stream not in STREAMS:
        raise ConfigError(f"The stream is {stream!r}; use one of {', '.join(STREAMS)}.")
    if stream == "training":
        data = replace(data, shuffle=False, short="keep")
        batches = data.open_training(size=size, seed=seed)
        if isinstance(batches, IterableBatches):  # it would begin again at its end
            assert data.source is not None
            data = replace(data, evaluation=SourceConfig(source=data.source, args=data.args))
            batches = data.open_evaluation(size=size, seed=seed) or batches
    else:
        held_out = data.open_evaluation(size=size, seed=seed)
        if held_out is None:
            raise ConfigError(
                "data.evaluation is not set, so there is nothing held out.",
                hint="Name a source there, or use the training data: --stream training.",
            )
        batches = held_out
    if isinstance(batches, LocalBatches):
        batches.epochs = 1
        batches.crew.workers = data.workers  # type: ignore[attr-defined]
    return batches


def class_names(batches: Any) -> tuple[str, ...] | None:
    """Those that a source has as `classes`, such as a folder of images; None where it has none."""
    found = getattr(getattr(getattr(batches, "maker", None), "source", None), "classes", None)
    return tuple(map(str, found)) if isinstance(found, list | tuple) and found else None


def _load(recipe: Recipe, place: str, model: nn.Module, *, is_given: bool) -> None:
    if "://" not in place and not is_of_hub(place) and not is_given and not Path(place).expanduser().exists():
        raise CheckpointError(
            f"There are no weights in {place}, where this recipe's run would have its checkpoints.",
            hint="Train it first, or name others: --weights PLACE.",
        )
    is_ours = "://" in place or not (is_of_hub(place) or is_foreign(Path(place).expanduser()))
    load_weights(place, _Whole(model), cast=recipe.checkpoint.cast)
    if is_ours and recipe.train.ema_decay is not None:
        store, step = open_place(place)
        Checkpointer(store).restore(step, partial=True, cast=recipe.checkpoint.cast, ema=_Whole(model, trained=True))


class _Whole:
    """Stateful: a plain model's parameters and buffers, by name; tied ones once, or only those that are trained."""

    def __init__(self, model: nn.Module, *, trained: bool = False) -> None:
        self._model, self._trained = model, trained

    def _entries(self) -> dict[str, Any]:
        if self._trained:
            return {name: value for name, value in self._model.named_parameters() if value.requires_grad}
        found: dict[str, Any] = {}
        for name, value in self._model.state_dict(keep_vars=True).items():
            if not any(value is other for other in found.values()):
                found[name] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        from torch import Tensor

        from trainfleet.parallel.pieces import as_piece

        return {n: as_piece(n, v) if isinstance(v, Tensor) else v for n, v in self._entries().items()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        import torch

        with torch.no_grad():
            for name, value in self._entries().items():
                if isinstance(value, torch.Tensor):
                    value.copy_(state[name].local)
                else:
                    self._model.get_submodule(name.rpartition(".")[0]).set_extra_state(state[name])


def _for_evaluation(prepare: Callable[..., Batch] | None) -> Callable[[Batch], Batch] | None:
    """`prepare`, told that nothing is trained where it asks."""
    try:
        asks = prepare is not None and "training" in inspect.signature(prepare).parameters
    except (TypeError, ValueError):
        asks = False
    return functools.partial(prepare, training=False) if asks and prepare is not None else prepare
