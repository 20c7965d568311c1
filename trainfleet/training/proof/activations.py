"""Activations: what the modules of a model gave while it was watched, gathered whole."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainfleet.batch import arrays
from trainfleet.comm.group import Group
from trainfleet.training.proof.verdict import ACTIVATION, Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class Activations:
    """Records the floating-point outputs of every module while it is entered, in the order of their calls.

    What is computed again in backward is not recorded again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: dict[str, list[list[NDArray[Any]]]] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Activations:
        from trainfleet.parallel.experts.apply import find_experts

        # Inside experts rows lie in the order in which tokens are dealt out, which is of no interest.
        inside = {inner for experts in find_experts(self._model).values() for inner in experts.children()}
        inside = {inner for module in inside for inner in module.modules()}
        for name, module in self._model.named_modules():
            if module not in inside:
                self._hooks.append(module.register_forward_hook(functools.partial(self._record, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        from trainfleet.parallel.torch_private import Leaving, in_backward, without_torch_functions

        if in_backward() or isinstance(output, Leaving):
            return
        with without_torch_functions():
            found = [whole_of(each) for each in arrays(output) if each.is_floating_point() or each.is_complex()]
        self._calls.setdefault(name, []).append(found)

    def by_micro_batch(self, ranks: Group, accumulation: int, parts: int) -> Trace:
        """The outputs by name of micro-batch and module, `accumulation` micro-batches of `parts` parts on each rank.

        A module that is not called equally often for each is left out.
        """
        from trainfleet.parallel.randomness import number_in_step

        found: Trace = {}
        number = accumulation * parts
        for name, calls in self._calls.items():
            each, odd = divmod(len(calls), number)
            if odd:
                continue
            for i, outputs in enumerate(calls):
                place = number_in_step(i // each, parts, ranks)
                call = f" (call {i % each + 1})" if each > 1 else ""
                for j, output in enumerate(outputs):
                    which = f"output {j + 1}" if len(outputs) > 1 else "output"
                    found[f"{ACTIVATION}{place + 1}, {which} of {name or 'the model'}{call}"] = output
        return found


def whole_of(tensor: Tensor) -> NDArray[Any]:
    """All of a tensor as an array, gathered where it lies in pieces; bfloat16, which NumPy has not, as float32."""
    import torch
    from torch.distributed.tensor import DTensor

    from trainfleet.parallel.torch_private import gathered_quietly

    value = tensor.detach()  # first: what gathers it is no part of anybody's graph
    with gathered_quietly():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
    copied = whole.to("cpu", copy=True)
    return (copied.float() if copied.dtype == torch.bfloat16 else copied).numpy()  # type: ignore[no-any-return]
