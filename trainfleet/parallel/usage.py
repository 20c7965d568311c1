"""Which parameters a step used, on any rank.

Averaging turns the missing gradient of an unused parameter into zeros, and an optimizer would decay what
one process leaves alone. So each rank notes which parameters its backward reached, and a gradient that no
rank has is taken away again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trainfleet.errors import PlanError
from trainfleet.parallel.layout import is_sharded
from trainfleet.parallel.torch_private import gathered_parameters


class Usage:
    """Notes, from one `start` to the next, which trainable parameters of `model` got a gradient here."""

    def __init__(self, model: nn.Module, sharded: FSDPModule | None) -> None:
        self._named = dict(model.named_parameters())
        self._trained = [parameter.requires_grad for parameter in self._named.values()]
        self.parameters = [parameter for parameter in self._named.values() if parameter.requires_grad]
        self._sharded = sharded
        self._used = [False] * len(self.parameters)
        self._watched: set[int] = set()
        self._sharded_parts = [i for i, parameter in enumerate(self.parameters) if is_sharded(parameter)]

    def _watch(self, i: int, parameter: nn.Parameter) -> None:
        if i not in self._watched:
            self._watched.add(i)
            parameter.register_post_accumulate_grad_hook(self._note(i))  # type: ignore[no-untyped-call]

    def _note(self, i: int) -> Callable[[Tensor], None]:
        used = self._used  # not self: it holds the parameters, and the model would never be freed

        def note(_: Tensor) -> None:
            used[i] = True

        return note

    def start(self) -> None:
        """Forget what was noted. PlanError if what is trained has changed: gradients would not be exchanged."""
        if [parameter.requires_grad for parameter in self._named.values()] != self._trained:
            changed = [n for (n, p), was in zip(self._named.items(), self._trained) if p.requires_grad != was]
            raise PlanError(
                f"requires_grad of {changed[0]} has changed since the model was spread. Freeze and unfreeze before "
                "`parallelize`; to change it later, save, build the model anew and restore."
            )
        self._used[:] = [False] * len(self.parameters)

    def watch(self) -> None:
        """After a forward: watch what it gathered for the first time, before its backward."""
        if self._sharded is None or len(self._watched) == len(self._sharded_parts):
            return
        gathered = dict(gathered_parameters(self._sharded))
        for i in self._sharded_parts:
            if (whole := gathered.get(self.parameters[i])) is not None:
                self._watch(i, whole)

    def bits(self, device: torch.device | str) -> Tensor:
        """One number a parameter: 1 where this rank used it. Sum them over the ranks.

        Ask before gradients of other ranks arrive: of whole parameters, those that have a gradient were used.
        """
        used = [parameter.grad is not None for parameter in self.parameters]
        for i in self._sharded_parts:
            used[i] = self._used[i]
        return torch.tensor(used, dtype=torch.float64, device=device)

    def drop_unused(self, counts: list[float]) -> None:
        """Take away the gradients of parameters that no rank used; of experts that only others used, make them zero."""
        for parameter, count in zip(self.parameters, counts):
            if count == 0:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
