"""The recorder: while it is entered, operations on tensors are written down and done on the meta device only.

Two modes work together. The dispatch mode sees every operation; the disguise makes recorded tensors say that
they live on the CPU, as they would in a plain construction, so that the constructor takes the same branches
(some initialisers return at once when they see a meta tensor).
"""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trainfleet.errors import PlanError
from trainfleet.parallel.recording import FILLS, OVERWRITES, Constant, Op, Recording, Rewind, Storage, View, run_steps
from trainfleet.parallel.torch_private import outside_modes

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
RANDOM, DYNAMIC = torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape
READS_DATA, RESHAPES = torch.Tag.data_dependent_output, torch.Tag.inplace_view
_LIKE = re.compile(r"aten::(new_\w+|(empty|zeros|ones|full|rand|randn|randint)_like)")
_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills `recording` while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._storages: dict[int, Storage] = {}
        self._memory: list[torch.UntypedStorage] = []  # keeps the meta storages, so that addresses stay unique
        self._expected: dict[torch.Generator, bytes] = {}
        self._places: dict[bytes, int] = {}
        self._num_marks = 0
        self.is_aside = False
        """What is made now is not recorded: the constructor asked for the meta device itself."""

    # --- what is recorded ---

    def view(self, tensor: Tensor) -> View | None:
        """Where a recorded tensor lies; None for any other."""
        if not tensor.is_meta or tensor.layout != torch.strided:
            return None
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        return None if storage is None else View.of(tensor, storage)

    def finish(self) -> Recording:
        """The recording, when the constructor is done. Generators it used are left at a place of their own."""
        self.recording.num_bytes = [memory.nbytes() for memory in self._memory]
        for generator, start in self.recording.starts.items():
            # Neither where it began nor where it will end: who draws next must not draw these numbers again.
            generator.manual_seed(int.from_bytes(_digest(start)[:7], "little"))
        return self.recording

    def abandon(self) -> None:
        """Put the generators back where they were."""
        for generator, start in self.recording.starts.items():
            generator.set_state(start)

    def value(self, tensor: Tensor, doing: str) -> Tensor:
        """A recorded tensor's values, computed now; PlanError where they are random."""
        view = self.view(tensor)
        assert view is not None
        steps = self.recording.slice_of([view.storage])
        if any(step.is_random for step in steps):
            raise PlanError(
                f"{_caller()} reads a random number of a tensor that is not made yet ({doing}), so the model cannot "
                "be built on the meta device. Build it for real (without `deferred`), or draw the number with "
                "Python's `random`."
            )
        memory: dict[Storage, torch.UntypedStorage] = {}
        run_steps(steps, self._sizes(), [view.storage], memory.__setitem__)
        return view.on(memory[view.storage])

    # --- how it is recorded ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        views = [self.view(tensor) for tensor in tensors]
        if not any(views):
            if func is aten.lift_fresh.default and not tensors[0].is_meta:
                return self._promote(tensors[0])
            if tensors or self.is_aside:
                return self._untouched(func, args, kwargs)
        elif func is aten.lift_fresh.default:
            return args[0]
        names = {argument.name for argument in func._schema.arguments}
        if "device" in names:
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if READS_DATA in func.tags or DYNAMIC in func.tags:
            return self._now(func, args, kwargs)
        try:
            results = self._on_meta(func, args, kwargs)
        except NotImplementedError:
            results = self._tried(func, args, kwargs)
        if RESHAPES not in func.tags:
            self._write_down(func, args, kwargs, results)
        return results

    def run_whole(self, function: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Write down a Python function that fills `tensor` with random numbers as one operation."""
        view = self.view(tensor)
        assert view is not None
        self._before_random(kwargs.get("generator"))
        written = frozenset([view.storage])
        whole = written if view.covers(self._sizes()[view.storage]) else frozenset()
        self._append(Op(function, (view, *args), kwargs, (), written - whole, written, whole, True))
        return tensor

    def _on_meta(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in FILLS:
            return args[0]

        def to_meta(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf if leaf.is_meta else _twin(leaf)
            return None if isinstance(leaf, torch.Generator) else META if leaf == CPU else leaf

        args, kwargs = pytree.tree_map(to_meta, (args, kwargs))
        return func(*args, **kwargs)

    def _tried(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operation that the meta device does not know would return: tried with ones."""
        if self._split(func, args, kwargs)[0] or RANDOM in func.tags:
            raise _impossible(func)

        def ones(leaf: Any) -> Any:
            return torch.ones_like(leaf, device=CPU) if isinstance(leaf, Tensor) else leaf

        return pytree.tree_map(_twin, func(*pytree.tree_map(ones, args), **pytree.tree_map(ones, kwargs)))

    def _write_down(self, func: Any, args: Any, kwargs: dict[str, Any], results: Any) -> None:
        written, other = self._split(func, args, kwargs)
        made: list[View | None] = []
        for result in pytree.tree_leaves(results):
            fresh = isinstance(result, Tensor) and self.view(result) is None
            made.append(self._add(result) if fresh else None)
        is_random = RANDOM in func.tags
        if not (written or any(made) or is_random):
            return  # a view: what it is stands in the tensor itself
        writes = frozenset(view.storage for view in written)
        reads = frozenset(view.storage for view in other)
        sizes = self._sizes()
        whole = frozenset(view.storage for view in written if view.covers(sizes[view.storage])) - reads
        overwrites = whole if func in OVERWRITES or _is_out(func) else frozenset()
        if is_random:
            self._before_random(kwargs.get("generator"))
        if _LIKE.fullmatch(func._schema.name):
            # It asks only how its tensor lies, so the values need not exist.
            args, reads = (_twin(args[0]), *args[1:]), frozenset()
        args, kwargs = pytree.tree_map(self._symbol, (args, kwargs))
        reads |= writes - overwrites
        outcome = tuple(made) if any(made) else ()
        dtype = torch.get_default_dtype()
        self._append(Op(func, args, kwargs, outcome, reads, writes, overwrites, is_random, dtype))

    def _split(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[View], list[View]]:
        """The recorded tensors that `func` writes, and the others it is given."""
        written: list[View] = []
        other: list[View] = []
        for i, argument in enumerate(func._schema.arguments):
            given = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for leaf in pytree.tree_leaves(given):
                if not isinstance(leaf, Tensor):
                    continue
                view = self.view(leaf)
                if view is not None:
                    (written if writes else other).append(view)
                elif writes:
                    raise PlanError(
                        f"{_caller()} writes deferred numbers into a tensor that is already real ({func}). "
                        "Make that tensor inside the constructor, or build the model for real (without `deferred`)."
                    )
        return written, other

    def _untouched(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation on real tensors (or on the constructor's own meta tensors) is done at once."""
        if RANDOM in func.tags and not any(getattr(arg, "is_meta", False) for arg in args):
            raise PlanError(
                f"{_caller()} draws random numbers for a tensor that is already real ({func}), out of their order. "
                "Make that tensor inside the constructor, or build the model for real (without `deferred`)."
            )
        return func(*args, **kwargs)

    def _now(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation whose result steers the constructor is done now, on the values so far."""
        if self._split(func, args, kwargs)[0] or RANDOM in func.tags:
            raise _impossible(func)

        def real(leaf: Any) -> Any:
            recorded = isinstance(leaf, Tensor) and self.view(leaf) is not None
            return self.value(leaf, str(func)) if recorded else leaf

        results = func(*pytree.tree_map(real, args), **pytree.tree_map(real, kwargs))
        return pytree.tree_map(lambda leaf: self._promote(leaf) if isinstance(leaf, Tensor) else leaf, results)

    def _promote(self, tensor: Tensor) -> Tensor:
        """A recorded tensor with the values of a real one."""
        meta: Tensor = _twin(tensor)
        self._append(Op(_copy_of, (Constant.of(tensor, _caller()),), {}, (self._add(meta),)))
        return meta

    def _symbol(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or (leaf.is_meta and self.view(leaf) is None):
            return leaf
        return self.view(leaf) or Constant.of(leaf, _caller())

    def _add(self, tensor: Tensor) -> View:
        _refuse_kind(tensor)
        memory = tensor.untyped_storage()
        self._storages[memory._cdata] = len(self._memory)
        self._memory.append(memory)
        return View.of(tensor, len(self._memory) - 1)

    def _append(self, op: Op) -> None:
        self.recording.steps.append(op)
        if op.is_random:
            self._after_random(op.kwargs.get("generator"))

    def _sizes(self) -> _Sizes:
        return _Sizes(self._memory)

    # --- where the random numbers are ---
    # Nothing is drawn now. So after each random operation the generator is given a state that stands for "after this
    # operation": a constructor that saves, seeds and restores (`fork_rng`) then shows which place it went back to.

    def _before_random(self, generator: torch.Generator | None) -> None:
        generator = generator or torch.default_generator
        if generator.device != CPU:
            raise PlanError(
                f"{_caller()} draws from a generator of {generator.device}; deferred numbers are drawn on the CPU. "
                "Give it a generator of the CPU, or build the model for real (without `deferred`)."
            )
        state = generator.get_state()
        place = _digest(state)
        if generator not in self._expected:
            self.recording.starts[generator] = state
        elif place != self._expected[generator]:
            after = self._places.get(place)
            self.recording.steps.append(Rewind(generator, state if after is None else None, after))

    def _after_random(self, generator: torch.Generator | None) -> None:
        generator = generator or torch.default_generator
        self._num_marks += 1
        generator.manual_seed((0x5EED << 40) + self._num_marks)
        self._expected[generator] = _digest(generator.get_state())
        self._places[self._expected[generator]] = len(self.recording.steps) - 1


class _Sizes(list[int]):
    """The present bytes of each storage."""

    def __init__(self, memory: list[torch.UntypedStorage]) -> None:
        super().__init__()
        self._memory = memory

    def __getitem__(self, storage: Any) -> Any:
        return self._memory[storage].nbytes()


class Disguise(TorchFunctionMode):
    """Recorded tensors behave towards the constructor's Python as tensors on the CPU."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        subject = args[0] if args else None
        if not isinstance(subject, Tensor) or self._recorder.view(subject) is None:
            self._recorder.is_aside = str(kwargs.get("device")) == "meta"
            try:
                return func(*args, **kwargs)
            finally:
                self._recorder.is_aside = False
        if func in _SEEMING:
            return _SEEMING[func]
        if func in (Tensor.cpu, Tensor.cuda):
            return subject
        if func is Tensor.to:
            args, kwargs = _without_device(args, kwargs)
            return func(*args, **kwargs) if len(args) > 1 or kwargs.keys() - {"non_blocking"} else subject
        if func in _READERS:
            with outside_modes():
                result = func(self._recorder.value(subject, func.__name__), *args[1:], **kwargs)
            if hasattr(result, "setflags"):
                result.setflags(write=False)  # writing into it would not reach the tensor
            return result
        return func(*args, **kwargs)


_SEEMING: dict[Any, Any] = {
    Tensor.device.__get__: CPU,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}
_READERS = (Tensor.numpy, Tensor.__array__, Tensor.tolist)


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record what this thread does with tensors."""
    recorder = Recorder()
    init: Any = torch.nn.init
    plain = init._no_grad_trunc_normal_

    def trunc_normal_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # It draws until every number fits, so its operations depend on its numbers: it is recorded whole.
        with torch._C.DisableTorchFunction():  # the disguise would hide from us that it is recorded
            if recorder.view(tensor) is not None:
                return recorder.run_whole(plain, tensor, *args, **kwargs)
        return plain(tensor, *args, **kwargs)  # type: ignore[no-any-return]

    with ExitStack() as stack:
        # What `trunc_normal_` calls has no name of its own to dispatch on; other threads get the plain one.
        init._no_grad_trunc_normal_ = trunc_normal_
        stack.callback(setattr, init, "_no_grad_trunc_normal_", plain)
        stack.enter_context(recorder)
        stack.enter_context(Disguise(recorder))
        yield recorder


def _without_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of `Tensor.to` without the device: recorded tensors have but one."""
    rest = [arg.dtype if isinstance(arg, Tensor) else arg for arg in args[1:]]
    rest = [arg for arg in rest if not isinstance(arg, torch.device | str)]
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    if rest and rest[0] is None:
        rest = rest[1:]
    return (args[0], *rest), kwargs


def _is_out(func: Any) -> bool:
    return any(argument.is_out for argument in func._schema.arguments)


def _twin(leaf: Any) -> Any:
    """A meta tensor that lies as `leaf` does."""
    if not isinstance(leaf, Tensor):
        return leaf
    _refuse_kind(leaf)
    return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=META)


def _refuse_kind(tensor: Tensor) -> None:
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise PlanError(
            f"{_caller()} uses a {type(tensor).__name__} of layout {tensor.layout}, which cannot be deferred. "
            "Build the model for real (without `deferred`)."
        )


def _impossible(func: Any) -> PlanError:
    return PlanError(
        f"{_caller()} uses {func}, which the meta device cannot do, so the model cannot be built there. "
        "Build it for real (without `deferred`)."
    )


def _copy_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def _digest(state: Tensor) -> bytes:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()


def _caller() -> str:
    """The line of the constructor that is running."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_OURS):
            return f"{frame.filename}:{frame.lineno} ({frame.line})"
    return "the constructor"
