"""Flow: micro-batches on their way through the stages of this rank, forward and back.

Whatever crosses a boundary goes along in one message, the state of the random generators too: a stage goes on drawing
where the one before it stopped, as one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainfleet.comm.group import Links, Work
from trainfleet.parallel.context.handover import Handover
from trainfleet.parallel.pipeline.graph import Kind, Named, Value, replaced
from trainfleet.parallel.pipeline.pipe import Pipeline
from trainfleet.parallel.pipeline.program import Program
from trainfleet.parallel.pipeline.record import tensors_of
from trainfleet.parallel.pipeline.schedules import Action, forward_orders
from trainfleet.parallel.pipeline.wire import Message
from trainfleet.parallel.torch_private import backward_of_inputs, backward_of_parameters

_Place = tuple[int, int]
"""Stage and micro-batch."""


@dataclass(slots=True)
class _Passed:
    """What a stage keeps of a micro-batch between its forward and its backward."""

    leaves: dict[int, Tensor] = field(default_factory=dict)
    """By number, the received values whose gradients go back."""
    roots: list[Tensor] = field(default_factory=list)
    """What backward begins with."""
    gradients: list[Tensor | None] = field(default_factory=list)
    groups: Any = None
    """What the first part of a backward leaves for the second."""


class Flow:
    """One pass of `programs`, one for each of `inputs`. `seed(i)` seeds the generators for micro-batch i, if given.

    `handovers` say of each of the inputs how stages hand on what is in pieces; None where everything is whole.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        programs: Sequence[Program],
        inputs: Sequence[Any],
        *,
        seed: Callable[[int], None] | None = None,
        handovers: Sequence[Handover | None] | None = None,
    ) -> None:
        self._pipeline, self._programs, self._inputs, self._seed = pipeline, programs, inputs, seed
        self._handovers = handovers or [None] * len(inputs)
        self._links = cast(Links, pipeline.group)
        self._receiving: dict[tuple[str, _Place], tuple[Message, Tensor, Work]] = {}
        self._arrived: dict[tuple[str, _Place], tuple[Tensor | None, list[Tensor | None]]] = {}
        self._leaving: dict[tuple[str, _Place], Tensor] = {}
        self._sending: list[tuple[Work, Tensor]] = []
        self._passed: dict[_Place, _Passed] = {}
        self._generators = _Generators(pipeline.device)

    # messages

    def exchange(self, action: Action) -> None:
        """Begin a send or a receive."""
        kind, place = action.kind[-1], (action.stage, action.micro_batch)
        if action.kind.startswith("send"):
            buffer = self._leaving.pop((kind, place), None)
            if buffer is not None:
                peer = self._pipeline.ranks[action.stage + (1 if kind == "F" else -1)]
                self._sending.append((self._links.send(buffer, peer), buffer))
            return
        message = self._message(kind, action.micro_batch, action.stage - (1 if kind == "F" else 0))
        if message.num_bytes:
            peer = self._pipeline.ranks[action.stage - (1 if kind == "F" else -1)]
            buffer = message.empty(self._pipeline.device)
            self._receiving[kind, place] = message, buffer, self._links.recv_(buffer, peer)

    def _message(self, kind: str, i: int, boundary: int) -> Message:
        """What crosses `boundary`, between the stage of that number and the next, in one direction."""
        program = self._programs[i]
        kinds = self._kinds(i, program.crossings[boundary])
        if kind == "F":
            return Message(kinds, self._generators.num_bytes if self._sends_state(program, boundary) else 0)
        trained = [each for each in kinds if each.requires_grad]
        return Message(trained, len(trained))

    def _kinds(self, i: int, numbers: Sequence[int]) -> list[Kind]:
        """What this rank has of values of micro-batch `i`."""
        handover, kinds = self._handovers[i], self._programs[i].kinds(numbers)
        return kinds if handover is None else [replace(kind, shape=handover.shape(kind.shape)) for kind in kinds]

    def _sends_state(self, program: Program, boundary: int) -> bool:
        return self._seed is not None and program.first_random <= boundary

    def _arrive(self, kind: str, place: _Place) -> tuple[Tensor | None, list[Tensor | None]]:
        """The head and the tensors of a message, from a peer or from this rank itself."""
        if (kind, place) in self._arrived:
            return self._arrived.pop((kind, place))
        if (kind, place) not in self._receiving:
            return None, []
        message, buffer, work = self._receiving.pop((kind, place))
        work.wait()
        head, tensors = message.unpacked(buffer)
        return head, list(tensors)

    def _depart(self, kind: str, place: _Place, tensors: list[Tensor | None], head: Tensor | None) -> None:
        stage, i = place
        target = stage + (1 if kind == "F" else -1)
        if self._pipeline.ranks[target] == self._pipeline.group.rank:
            self._arrived[kind, (target, i)] = head, tensors
            return
        message = self._message(kind, i, min(stage, target))
        if message.num_bytes:
            self._leaving[kind, place] = message.packed(tensors, self._pipeline.device, head)

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    # computing

    def forward(self, stage: int, i: int) -> Any:
        """Run a stage on micro-batch `i`; the output of the model where it is the last."""
        program, part = self._programs[i], self._programs[i].parts[stage]
        head, tensors = self._arrive("F", (stage, i)) if stage else (None, [])
        self._go_on_drawing(head, i)
        passed = self._passed[stage, i] = _Passed()
        received: dict[int, Tensor] = {}
        for number, tensor in zip(part.receives, tensors, strict=True):
            assert tensor is not None
            received[number] = _leaf(tensor, program.graph.kinds[number].requires_grad, number, passed)
        ran = self._pipeline.compute(program, stage, self._inputs[i], received, self._handovers[i])
        if part.is_last:
            return ran.output
        kinds = program.kinds(part.sends)
        passed.roots = [tensor for tensor, kind in zip(ran.tensors, kinds) if kind.requires_grad]
        state = self._generators.state() if self._sends_state(program, stage) else None
        self._depart("F", (stage, i), [tensor.detach() for tensor in ran.tensors], state)
        return None

    def on_pieces(self, i: int, compute: Callable[[Any], Any]) -> Any:
        """`compute` of the inputs of micro-batch `i`, on pieces if its stages compute so; what it gives is whole."""
        handover, inputs = self._handovers[i], self._inputs[i]
        if handover is None:
            return compute(inputs)
        return handover.whole(handover.run(lambda: compute(inputs)))

    def _go_on_drawing(self, head: Tensor | None, i: int) -> None:
        if self._seed is None:
            return
        if head is not None and len(head):
            self._generators.set(head)
        else:  # nobody has drawn before
            self._seed(i)

    def begin_backward(self, stage: int, i: int, loss: Tensor | None) -> None:
        """Get what the backward of a stage begins with: `loss`, where it is the last, or what the next one sent."""
        passed = self._passed[stage, i]
        if loss is not None:
            passed.roots, passed.gradients = [loss], [None]
            return
        head, gradients = self._arrive("B", (stage, i))
        present = [bool(each) for each in head.tolist()] if head is not None else []
        pairs = [
            (root, gradient)
            for root, gradient, is_there in zip(passed.roots, gradients, present)
            if is_there and root.requires_grad
        ]
        passed.roots, passed.gradients = [root for root, _ in pairs], [gradient for _, gradient in pairs]

    def backward(self, stage: int, i: int) -> None:
        """The whole backward of a stage."""
        passed = self._passed[stage, i]
        if passed.roots:
            torch.autograd.backward(passed.roots, passed.gradients)
        self._send_back(stage, i, passed)
        del self._passed[stage, i]

    def backward_of_inputs(self, stage: int, i: int, parameters: Sequence[nn.Parameter]) -> None:
        """The part of a backward that the stage before waits for; the first stage has none."""
        passed = self._passed[stage, i]
        if passed.roots and passed.leaves:
            passed.groups = backward_of_inputs(passed.roots, passed.gradients, list(passed.leaves.values()), parameters)
        self._send_back(stage, i, passed)

    def backward_of_parameters(self, stage: int, i: int, parameters: Sequence[nn.Parameter]) -> None:
        """The rest of it."""
        passed = self._passed.pop((stage, i))
        if passed.groups is not None:
            backward_of_parameters(passed.groups, parameters)
        elif passed.roots:
            torch.autograd.backward(passed.roots, passed.gradients)

    def _send_back(self, stage: int, i: int, passed: _Passed) -> None:
        if not stage or not passed.leaves:
            return
        gradients = [leaf.grad for leaf in passed.leaves.values()]
        present = [gradient is not None for gradient in gradients]
        head = torch.tensor(present, dtype=torch.uint8, device=self._pipeline.device)
        self._depart("B", (stage, i), gradients, head)
        for leaf in passed.leaves.values():
            leaf.grad = None


def _leaf(tensor: Tensor, is_trained: bool, number: int, passed: _Passed) -> Tensor:
    """A received value, where this stage's part of the graph begins. A copy, for the model may change it in place."""
    if not is_trained or not torch.is_grad_enabled():
        return tensor.clone()
    leaf = passed.leaves[number] = tensor.detach().requires_grad_()
    return leaf.clone()


class _Generators:
    """The state of torch's generators, of the CPU and of this rank's GPU, as bytes."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._sizes = [len(torch.get_rng_state())]
        if self._device.type == "cuda":
            self._sizes.append(len(torch.cuda.get_rng_state(self._device)))
        self.num_bytes = sum(self._sizes)

    def state(self) -> Tensor:
        states = [torch.get_rng_state()]
        if len(self._sizes) > 1:
            states.append(torch.cuda.get_rng_state(self._device))
        return torch.cat(states).to(self._device)

    def set(self, state: Tensor) -> None:
        parts = torch.split(state.cpu(), self._sizes)
        torch.set_rng_state(parts[0].clone())
        if len(parts) > 1:
            torch.cuda.set_rng_state(parts[1].clone(), self._device)


def run_forward(flow: Flow, pipeline: Pipeline, count: int, last: Callable[[int], None]) -> None:
    """Forwards alone; `last(i)` takes that of the last stage for micro-batch i, on the rank that has it."""
    for action in forward_orders(pipeline.plan, count)[pipeline.group.rank]:
        if action.kind != "F":
            flow.exchange(action)
            continue
        if action.stage == pipeline.stages.count - 1:
            last(action.micro_batch)
        else:
            flow.forward(action.stage, action.micro_batch)
    flow.finish()


@torch.no_grad()
def output_of(pipeline: Pipeline, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What the whole model gives, on every rank; without a graph. All ranks call it, with the same arguments."""
    inputs = (args, dict(kwargs))
    program = pipeline.program(_call, inputs)
    outputs: list[Any] = [None]
    flow = Flow(pipeline, [program], [inputs])
    last = pipeline.stages.count - 1
    pipeline.is_called = True
    try:
        run_forward(flow, pipeline, 1, lambda i: outputs.__setitem__(i, flow.forward(last, i)))
    finally:
        pipeline.is_called = False
    message = Message(program.kinds_of_output(pipeline.shadow.model))
    if pipeline.group.rank == pipeline.last_rank:
        buffer = message.packed(list(tensors_of(outputs[0])), pipeline.device)
    else:
        buffer = message.empty(pipeline.device)
    pipeline.group.broadcast_(buffer, source=pipeline.last_rank).wait()
    rest = iter(message.unpacked(buffer)[1])
    return replaced(program.graph.output, (Value, Named), lambda _: next(rest))


def _call(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = inputs
    return model(*args, **kwargs)
