"""What DeepSpeed's `optimizer_state.pt` and `*_model_states.pt` say beside tensors, read by a process of its own.

Those files are zips with a pickle, which names classes of DeepSpeed and may name anything. So this file is run as a
program, `python -I deepspeed_groups.py FILE`, under limits of memory and time: it knows the few names that belong
there, and makes of each an inert stub. It prints JSON with the settings of the optimizer's groups, the shapes of
parameters and the number of steps taken, as far as the file has them, or why it cannot be read:

    {"groups": [{"lr": 0.001, "betas": [0.9, 0.999]}], "shapes": {"head.weight": [16, 32]}, "steps": 100}
    {"error": why}

Whoever reads that checks it: it is the file's word.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

_MEMORY_BYTES = 1 << 30
_MOST_PICKLE_BYTES = 1 << 26
_CPU_SECONDS = 60

_CLASSES = {
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_device_tensor_from_numpy"},
    "torch": {"device", "Tensor"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch.nn.parameter": {"Parameter"},
    "deepspeed.runtime.fp16.loss_scaler": {"LossScaler", "DynamicLossScaler"},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
}
_DTYPES = {"float16", "bfloat16", "float32", "float64", "int32", "int64", "bool", "uint8"}
_STORAGES = "Storage"
"""How the names of torch's storages end."""


class Stub:
    """Stands for an object of some class."""

    def __new__(cls, *made_with: Any, **named: Any) -> Stub:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Ordered(dict[Any, Any]):
    """collections.OrderedDict"""

    def __setstate__(self, state: Any) -> None:
        pass


class _Size(tuple[Any, ...]):
    """torch.Size"""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Ordered
        if (module, name) == ("torch", "Size"):
            return _Size
        of_torch = module in ("torch", "torch.storage") and (
            name.endswith(_STORAGES) or name.startswith(("float", "bf"))
        )
        if of_torch or name in _CLASSES.get(module, ()):
            return Stub
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which does not belong there")

    def persistent_load(self, place: Any) -> Stub:
        return Stub()


def described(file: Path) -> dict[str, Any]:
    """The JSON above."""
    with zipfile.ZipFile(file) as archive:
        member = next(each for each in archive.infolist() if each.filename.endswith("/data.pkl"))
        if member.file_size > _MOST_PICKLE_BYTES or member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is larger than any such file, or compressed")
        state = _Unpickler(io.BytesIO(archive.read(member))).load()
    groups = state.get("param_groups") or state.get("optimizer_state_dict", {}).get("param_groups", [])
    shapes: dict[str, list[int]] = {}
    for part in state.get("param_shapes") or []:
        shapes |= {str(name): [int(length) for length in shape] for name, shape in part.items()}
    plain = [{str(k): v for k, v in dict(group).items() if k != "params" and _is_plain(v)} for group in groups]
    steps = state.get("global_steps", 0) - state.get("skipped_steps", 0)
    return {"groups": plain, "shapes": shapes, "steps": int(steps)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _limit(num_bytes: int) -> None:
    """Bound what this process may take; where the system has no such limits the deadline of the parent remains."""
    try:
        import resource
    except ImportError:
        return
    limits = {
        resource.RLIMIT_AS: _MEMORY_BYTES + 2 * num_bytes,
        resource.RLIMIT_CPU: _CPU_SECONDS,
        resource.RLIMIT_FSIZE: 0,  # it writes into a pipe only
        resource.RLIMIT_NPROC: 0,
    }
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def main() -> None:
    file = Path(sys.argv[1])
    try:
        _limit(min(file.stat().st_size, 1 << 33))
        answer = json.dumps(described(file), allow_nan=False)
    except BaseException as error:  # a pickle can fail in any way; how is told, and the process ends
        answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
    sys.stdout.write(answer)


if __name__ == "__main__":
    main()
