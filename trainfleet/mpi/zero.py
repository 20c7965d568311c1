"""ZeRO: optimizer state, gradients and parameters split over the data-parallel ranks, one more with each stage.

Rajbhandari et al., arXiv:1910.02054, section 5. Each rank owns a band of rows of every parameter (of the first
dimension; the last bands may be short or empty) and alone updates it. P bytes of parameters, S of optimizer state a
byte of parameter, N ranks:

    stage   parameters   gradients   state    exchanged in a step
      1         P            P        SP/N    mean of gradients 2P, gathering of parameters P
      2         P           P/N       SP/N    scattering of gradients P, gathering of parameters P
      3        P/N          P/N       SP/N    the same, and one gathering more: forward and backward each gather
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from trainfleet.codec import Codec
from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.mpi.arrays import Array, for_group, like, namespace
from trainfleet.mpi.average import average_gradients, refuse_unlike
from trainfleet.mpi.layers import Cuts, Gradients, Layer, Saved
from trainfleet.mpi.optimizers import Optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that a rank holds now."""

    parameters: int
    gradients: int
    optimizer_state: int


class Zero:
    """An optimizer whose work and memory are shared: `register` parameters, `reduce_gradients`, `step`.

        zero = Zero(AdamW(learning_rate=1e-3), stage=2, group=group)
        zero.register(model.parameters)
        zero.reduce_gradients(gradients)   # as often as there are micro-batches
        zero.step()

    The step is by the mean over ranks of the summed gradients, times `scale`. In stage 3 the mapping holds bands
    instead of whole parameters; `gather` gives whole ones, and `Sharded` does so around a layer. `replicas` is the
    group of ranks that own the same bands, where shards are fewer than all data-parallel ranks. `codec` encodes what
    is averaged whole: in stages 0 and 1, and between replicas.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        stage: Literal[0, 1, 2, 3],
        group: Group,
        *,
        replicas: Group | None = None,
        codec: Codec | None = None,
    ) -> None:
        if stage not in (0, 1, 2, 3):
            raise PlanError(f"The stage of ZeRO is {stage!r}; use 1, 2 or 3 (0 splits nothing).")
        self.optimizer = optimizer
        self.stage = stage
        self.steps = 0
        self.memory: dict[str, dict[str, Array]] = {}
        """What the optimizer remembers of this rank's bands, by parameter."""
        self._group = group
        self._replicas = replicas
        self._codec = codec
        self._parameters: MutableMapping[str, Array] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._gradients: dict[str, Array] = {}
        self._agreed: set[tuple[str, ...]] = set()  # which gradients ranks were seen to scatter together

    def register(self, parameters: MutableMapping[str, Array]) -> None:
        """Take over parameters: the mapping's arrays are replaced in `step`, in stage 3 by bands at once.

        PeerError where the ranks do not register the same names, shapes and dtypes.
        """
        refuse_unlike(list(parameters.items()), self._group)
        self._parameters = parameters
        for name in list(parameters):
            self._shapes[name] = tuple(parameters[name].shape)
            band = self.band_of(name, parameters[name])
            xp = namespace(band)
            self.memory[name] = {key: xp.zeros_like(band) for key in self.optimizer.memories}
            if self.stage == 3:
                parameters[name] = band.copy()

    def rows(self, name: str) -> tuple[int, int]:
        """The first row of this rank's band, and the first beyond it."""
        shape = self._shapes[name] or (1,)
        if self.stage == 0:
            return 0, shape[0]
        height = -(-shape[0] // self._group.size)
        return min(shape[0], self._group.rank * height), min(shape[0], (self._group.rank + 1) * height)

    def band_of(self, name: str, whole: Array) -> Array:
        first, end = self.rows(name)
        return whole.reshape(self._shapes[name] or (1,))[first:end]

    def reduce_gradients(self, gradients: Mapping[str, Array]) -> None:
        """Add gradients to those that wait for `step`; in stages 2 and 3 only this rank's bands are kept."""
        for name, gradient in gradients.items():
            if name not in self._shapes:
                raise KeyError(f"There is a gradient of {name!r}, which was not registered.")
            if tuple(gradient.shape) != self._shapes[name]:
                shapes = f"{tuple(gradient.shape)}, its parameter {self._shapes[name]}"
                raise ValueError(f"The gradient of {name!r} has the shape {shapes}.")
        own = self._scattered(gradients) if self.stage >= 2 else gradients
        for name, gradient in own.items():
            held = self._gradients.get(name)
            self._gradients[name] = gradient if held is None else held + gradient

    def step(self, scale: float = 1.0) -> None:
        """Update this rank's bands, and in stages 1 and 2 give them to the others."""
        gradients: Mapping[str, Array] = self._gradients
        self._gradients = {}
        if self.stage < 2:
            gradients = average_gradients(gradients, self._group, self._codec)
            gradients = {name: self.band_of(name, gradient) for name, gradient in gradients.items()}
        if self._replicas is not None and self._replicas.size > 1:
            gradients = average_gradients(gradients, self._replicas, self._codec)
        self.steps += 1
        updated: dict[str, Array] = {}
        for name, gradient in gradients.items():
            held = self._parameters[name]
            band = held if self.stage == 3 else self.band_of(name, held)
            scaled = gradient * scale if scale != 1.0 else gradient
            updated[name] = self.optimizer.update(band, scaled.astype(band.dtype), self.memory[name], self.steps)
        if self.stage in (1, 2):
            updated = self._gathered(updated)
        for name, value in updated.items():
            self._parameters[name] = value if self.stage == 3 else value.reshape(self._shapes[name])

    def gather(self, names: Iterable[str]) -> dict[str, Array]:
        """Whole parameters, in stage 3 put together from the bands of all ranks."""
        held = {name: self._parameters[name] for name in names}
        return self._gathered(held) if self.stage == 3 else held

    def memory_held(self) -> Memory:
        """What this rank holds at this moment; between steps there are no gradients."""
        states = [array for memory in self.memory.values() for array in memory.values()]
        return Memory(
            parameters=_bytes(self._parameters[name] for name in self._shapes),
            gradients=_bytes(self._gradients.values()),
            optimizer_state=_bytes(states),
        )

    def memory_of_ranks(self) -> list[Memory]:
        """`memory_held` of every rank of the group, by rank; all of them call it."""
        return [Memory(**held) for held in self._group.exchange(asdict(self.memory_held()))]

    def _scattered(self, gradients: Mapping[str, Array]) -> dict[str, Array]:
        """The mean over ranks of this rank's bands: one message for all gradients of a dtype."""
        bands: dict[str, Array] = {}
        together = tuple(sorted(gradients))
        if together not in self._agreed:
            refuse_unlike([(name, gradients[name]) for name in together], self._group)
            self._agreed.add(together)
        for names in self._by_dtype(gradients):
            held = {name: for_group(gradients[name], self._group) for name in names}
            rows = namespace(held[names[0]]).concatenate([self._padded(name, held[name]) for name in names], axis=1)
            (row,) = self._group.reduce_scatter(rows, "mean")
            at = 0
            for name in names:
                first, end = self.rows(name)
                width, size = self._width(name), self._width(name) // max(1, self._height(name))
                band = row[at : at + (end - first) * size].reshape((end - first, *self._shapes[name][1:]))
                bands[name] = like(gradients[name], band.copy())
                at += width
        return bands

    def _gathered(self, bands: Mapping[str, Array]) -> dict[str, Array]:
        whole: dict[str, Array] = {}
        for names in self._by_dtype(bands):
            held = {name: for_group(bands[name], self._group) for name in names}
            xp = namespace(held[names[0]])
            own = xp.zeros(sum(self._width(name) for name in names), dtype=held[names[0]].dtype)
            at = 0
            for name in names:
                own[at : at + held[name].size] = held[name].reshape(-1)
                at += self._width(name)
            rows, at = xp.stack(self._group.all_gather(own)), 0
            for name in names:
                columns = rows[:, at : at + self._width(name)].reshape(-1)
                size = int(np.prod(self._shapes[name], dtype=np.int64))
                whole[name] = like(bands[name], columns[:size].reshape(self._shapes[name]).copy())
                at += self._width(name)
        return whole

    def _height(self, name: str) -> int:
        return -(-(self._shapes[name] or (1,))[0] // self._group.size)

    def _width(self, name: str) -> int:
        """Numbers in a full band."""
        return self._height(name) * int(np.prod(self._shapes[name][1:], dtype=np.int64))

    def _padded(self, name: str, whole: Array) -> Any:
        """One row for each rank: its band, and zeros where it is short."""
        rows = namespace(whole).zeros(self._group.size * self._width(name), dtype=whole.dtype)
        rows[: whole.size] = whole.reshape(-1)
        return rows.reshape(self._group.size, -1)

    @staticmethod
    def _by_dtype(arrays: Mapping[str, Array]) -> list[list[str]]:
        names: dict[Any, list[str]] = {}
        for name in sorted(arrays):  # the same order on every rank
            names.setdefault(arrays[name].dtype, []).append(name)
        return list(names.values())


class Sharded:
    """A layer in stage 3: its parameters are whole only while it computes, and its gradients are scattered at once."""

    def __init__(self, layer: Layer, zero: Zero, prefix: str) -> None:
        self._layer = layer
        self._zero = zero
        self._prefix = prefix

    @property
    def parameters(self) -> MutableMapping[str, Array]:
        return self._layer.parameters

    @property
    def cuts(self) -> Cuts:
        return self._layer.cuts

    def forward(self, x: Array) -> tuple[Array, Saved]:
        bands = self._make_whole()
        y, saved = self._layer.forward(x)
        self._layer.parameters.update(bands)
        return y, saved

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        bands = self._make_whole()
        dx, gradients = self._layer.backward(saved, dy)
        self._layer.parameters.update(bands)
        self._zero.reduce_gradients({f"{self._prefix}.{name}": value for name, value in gradients.items()})
        return dx, {}

    def _make_whole(self) -> dict[str, Array]:
        bands = dict(self._layer.parameters)
        whole = self._zero.gather(f"{self._prefix}.{name}" for name in bands)
        self._layer.parameters.update({name: whole[f"{self._prefix}.{name}"] for name in bands})
        return bands


def _bytes(arrays: Iterable[Array]) -> int:
    return sum(array.nbytes for array in arrays)
