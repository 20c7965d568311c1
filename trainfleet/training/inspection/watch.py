"""Watch: looks at every module's inputs and outputs in forward, at the loss, and at the gradients in backward.

Forward: what is not finite is known by its tensor, so a module that only hands on what it was given is not blamed, and
code between modules is where neither what went in nor any output of a child was. Backward: each module is given its
inputs through an identity of its own, so that the gradient of a residual branch is seen apart from that of the trunk.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainfleet.batch import Batch, arrays
from trainfleet.loss import LossSum
from trainfleet.parallel.torch_private import Leaving, in_backward, without_torch_functions
from trainfleet.training.inspection.births import Birth, Frame, Place, worst
from trainfleet.training.inspection.fields import fields_of
from trainfleet.training.inspection.gradients import BadGradient, Claim, Gradients
from trainfleet.training.inspection.values import Lines, Tally, is_number, is_sound, lines_of, values_of

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tallies:
    """Of one module: what it gave, and the gradients of that."""

    outputs: Tally = field(default_factory=Tally)
    gradients: Tally = field(default_factory=Tally)


class Watch:
    """While entered, looks at the steps of `model`; what is computed again in backward is not looked at again.

    With `tallies` it also keeps what every module gave, in numbers. An error of its own is logged once and ends the
    looking, never the step: the other ranks would wait.
    """

    def __init__(self, model: nn.Module, *, tallies: bool = False) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._handles: list[RemovableHandle] = []
        self._frame: Frame | None = None
        self._top = Frame("", None, 0, 0, "")  # where no module that is watched calls the others: stages
        self._known: dict[int, tuple[weakref.ref[Tensor], Birth]] = {}
        self._gradients = Gradients(model, self._tally_gradient if tallies else None)
        self._time = 0  # counted in calls and returns, which ranks that compute the same have alike
        self._gives_up = False
        self._counts = tallies
        self.calls: dict[str, int] = {}
        """By module, how often it was called in forward."""
        self.births: list[Birth] = []
        self.losses: list[Birth] = []
        """Losses that were not finite."""
        self.tallies: dict[str, Tallies] = {}
        """In the order of the first calls."""

    def __enter__(self) -> Watch:
        for module, name in self._names.items():
            self._handles.append(
                module.register_forward_pre_hook(functools.partial(self._enter, name), with_kwargs=True)
            )
            self._handles.append(module.register_forward_hook(functools.partial(self._leave, name)))
        self._gradients.open()
        return self

    @property
    def gradient(self) -> BadGradient | None:
        """The first that was not finite."""
        return self._gradients.first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._known.clear()
        self._gradients.close()

    def micro_batch_of(self, call: Birth | Frame | BadGradient | None, count: int) -> int | None:
        """Which of this rank's `count` micro-batches of the step it belongs to, from 0."""
        caller = "" if call is None or isinstance(call, BadGradient) else call.caller
        if call is None or not call.call or not self.calls.get(caller):
            return None
        each = max(1, self.calls[caller] // count)
        return min((call.call - 1) // each, count - 1)

    # forward

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._gives_up or in_backward():
            return None
        try:
            with without_torch_functions():
                return self._entered(name, module, args, kwargs)
        except Exception:
            self._give_up()
            return None

    def _entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._time += 1
        parent = self._frame
        self.calls[name] = self.calls.get(name, 0) + 1
        if parent is None:
            frame = Frame(name, None, len(self._top.children), self.calls[name], name)
        else:
            frame = Frame(name, parent, len(parent.children), parent.call, parent.caller)
        for label, tensor in fields_of((*args, *([kwargs] if kwargs else []))):
            if not self._is_clean(tensor) and (
                birth := self._known_as(tensor) or self._made_before(frame, label, tensor)
            ):
                frame.inputs.append(birth)
        frame.visible.extend(frame.inputs)
        (parent or self._top).children.append(name)
        self._gradients.enter(name, module)
        self._frame = frame
        if not torch.is_grad_enabled():
            return None
        return _map((args, kwargs), functools.partial(self._identity, Claim("input", name, "", frame)))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._gives_up or in_backward():
            return
        try:
            with without_torch_functions():
                frame = self._frame
                while frame is not None and frame.module != name:  # an error came out of a child and was caught
                    frame = frame.parent
                if frame is not None:
                    self._left(frame, [] if isinstance(output, Leaving) else list(fields_of(output)))
        except Exception:
            self._give_up()

    def _left(self, frame: Frame, outputs: list[tuple[str, Tensor]]) -> None:
        self._time += 1
        self._frame = frame.parent
        above = (frame.parent or self._top).visible
        is_sound_now = True
        for label, tensor in outputs:
            if self._is_clean(tensor):
                continue
            is_sound_now = False
            birth = self._known_as(tensor)
            if birth is None:
                place: Place = "code" if frame.children else "output"
                after = frame.children[-1] if frame.children else None
                tensor_name = f"its output {label}".rstrip()
                birth = self._born(
                    place, frame.module, tensor_name, tensor, frame, after=after, cause=worst(frame.visible)
                )
            above.append(birth)
        if is_sound_now and outputs:
            for each in frame.inputs:
                each.is_healed = True
        for label, tensor in outputs:
            self._gradients.claim(tensor, Claim("output", frame.module, label, frame))
        if self._counts:
            tally = self.tallies.setdefault(frame.module, Tallies())
            for _, tensor in outputs:
                tally.outputs.add(tensor)

    def _made_before(self, frame: Frame, label: str, tensor: Tensor) -> Birth | None:
        """What `frame` was given and nobody gave: made by the code of its parent, or what the model is called with."""
        parent = frame.parent
        if parent is None and frame.module == "":
            return self._born("given", "", f"its input {label}".rstrip(), tensor, frame)
        around = parent or self._top
        visible = around.visible if parent else [each for each in around.visible if each.call == frame.call]
        after = around.children[-1] if parent and around.children else self._last_of_stage(frame.call)
        words = f"what {frame.module} was given {label}".rstrip()
        birth = self._born(
            "code", around.module, words, tensor, frame, after=after, before=frame.module, cause=worst(visible)
        )
        around.visible.append(birth)
        return birth

    def _last_of_stage(self, call: int) -> str | None:
        """Of modules that nobody who is watched calls, the last before this one that was called as often."""
        return next((each for each in reversed(self._top.children) if self.calls[each] >= call), None)

    def _born(
        self,
        place: Place,
        module: str,
        words: str,
        tensor: Tensor,
        frame: Frame | None,
        *,
        after: str | None = None,
        before: str | None = None,
        cause: Birth | None = None,
    ) -> Birth:
        birth = Birth(
            place=place,
            module=module,
            tensor=words,
            values=values_of(tensor),
            lines=lines_of(tensor),
            at=self._time,
            call=frame.call if frame else self.calls.get("", 0),
            caller=frame.caller if frame else "",
            after=after,
            before=before,
            cause=cause,
        )
        self.births.append(birth)
        self._know(tensor, birth)
        return birth

    def _is_clean(self, tensor: Tensor) -> bool:
        """Finite, or a mask: -inf alone, in what nothing is learned through."""
        return is_sound(tensor) or (not tensor.requires_grad and values_of(tensor).is_minus_inf_alone)

    def _know(self, tensor: Tensor, birth: Birth) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), birth)

    def _known_as(self, tensor: Tensor) -> Birth | None:
        reference, birth = self._known.get(id(tensor), (None, None))
        return birth if reference is not None and reference() is tensor else None

    # the loss

    def loss_function(self, loss_fn: Callable[[Any, Batch], Any], one_by_one: bool) -> Callable[[Any, Batch], Any]:
        """`loss_fn`, watched. With `one_by_one`, a loss that is not finite of an output that is, is asked by sample."""

        @functools.wraps(loss_fn)
        def watched(output: Any, batch: Batch) -> Any:
            if self._gives_up or in_backward() or not torch.is_grad_enabled():
                return loss_fn(output, batch)
            claim = Claim("loss", "", "the loss function's input", None)
            given = output
            try:
                with without_torch_functions():
                    given = _map(output, functools.partial(self._identity, claim))
            except Exception:
                self._give_up()
            value = loss_fn(given, batch)
            try:
                with without_torch_functions():
                    self._look_at_loss(LossSum.of(value), output, batch)
                    if one_by_one and self.losses and self.losses[-1].root.place == "loss":
                        self.losses[-1].lines = _asked_by_sample(loss_fn, output, batch)
            except Exception:
                self._give_up()
            return value

        return watched

    def _look_at_loss(self, loss: LossSum, output: Any, batch: Batch) -> None:
        numbers = {"total": loss.total, "weight": loss.weight}
        for name, value in numbers.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
            if is_sound(tensor):
                continue
            bad = [each for each in arrays(output) if is_number(each) and not self._is_clean(each)]
            known = [self._known_as(each) for each in bad]
            cause = worst(each for each in known if each) or worst(
                each for each in self.births if bad and each.call == self.calls.get("", each.call)
            )
            if cause is None:
                cause = self._bad_field(batch)
            self.losses.append(
                self._born("loss", "", f"its {name}", tensor, None, cause=cause or self._bad_output(bad))
            )
            self._settle_call(self.losses[-1])
            return

    def _settle_call(self, birth: Birth) -> None:
        """Of a pipeline's last stage, where the model itself is not called: the call of the last module."""
        if not birth.call and self._top.children:
            birth.caller = self._top.children[-1]
            birth.call = self.calls[birth.caller]
            if birth.cause is not None and not birth.cause.call:
                birth.cause.caller, birth.cause.call = birth.caller, birth.call

    def _bad_field(self, batch: Batch) -> Birth | None:
        for label, tensor in fields_of(batch):
            if not is_sound(tensor) and not values_of(tensor).is_minus_inf_alone:
                return self._born("batch", "", f"batch{label}", tensor, None)
        return None

    def _bad_output(self, bad: Sequence[Tensor]) -> Birth | None:
        """An output that no watched module gave: of the code around the model."""
        if not bad:
            return None
        last = self._top.children[-1] if self._top.children else None
        return self._born("code", "", "its output", bad[0], None, after=last, cause=worst(self._top.visible))

    def _identity(self, claim: Claim, tensor: Tensor) -> Tensor:
        own = self._gradients.identity(tensor, claim)
        if own is not tensor and (birth := self._known_as(tensor)) is not None:
            self._know(own, birth)
        return own

    def _tally_gradient(self, module: str, gradient: Tensor) -> None:
        self.tallies[module].gradients.add(gradient)

    def _give_up(self) -> None:
        self._gives_up = True
        self._gradients.gives_up = True
        logger.warning("Looking at the modules of this step failed; it is not looked at further.", exc_info=True)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to its tensors, in plain tuples, lists and dicts; other things stay."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_map(each, function) for each in value)
    if type(value) is dict:
        return {key: _map(each, function) for key, each in value.items()}
    return value


@torch.no_grad()
def _asked_by_sample(loss_fn: Callable[[Any, Batch], Any], output: Any, batch: Batch) -> Lines:
    """The samples whose loss alone is not finite."""
    found, count = [], 0
    for count, (one, own) in enumerate(_one_by_one(output, batch), 1):
        loss = LossSum.of(loss_fn(one, own))
        if not is_sound(loss.total / loss.weight):
            found.append(count - 1)
    return Lines(((count, tuple(found)),))


def _one_by_one(output: Any, batch: Batch) -> Iterator[tuple[Any, Batch]]:
    from trainfleet.batch import batch_size, cut_batch

    size = batch_size(batch)
    yield from zip(cut_batch(output, size), cut_batch(batch, size))
