"""DeepSpeed's universal checkpoints: a folder for each parameter, with its weights and what the optimizer remembers.

    OUTPUT/latest_universal                     the name of the folder below
    OUTPUT/global_step100/zero/NAME/fp32.pt     {"param": weights}, whole
                                    exp_avg.pt  and so on, for each thing that is remembered; step.pt
                               optimizer_state.pt   settings of the optimizer's groups
                          *_model_states.pt     steps taken; buffers

DeepSpeed makes such a folder of its own checkpoints by `ds_to_universal`, and loads it with
{"checkpoint": {"load_universal": true}} on any number of ranks in any stage. Weights alone need no format of its own:
what its `zero_to_fp32` writes and `trainfleet checkpoint export` are the same safetensors files.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from trainfleet.checkpoint.arrays import make
from trainfleet.checkpoint.export import exported_name
from trainfleet.checkpoint.foreign import deepspeed_groups
from trainfleet.checkpoint.foreign.pieces import ForeignArray, check_shape, whole_array
from trainfleet.checkpoint.foreign.torch_file import bytes_of, is_dense, load_tensors
from trainfleet.checkpoint.tree import StoredArray
from trainfleet.checkpoint.whole import Whole
from trainfleet.deps import require
from trainfleet.errors import CheckpointError, StoreError

LATEST = "latest_universal"
_SETTINGS = "optimizer_state.pt"
_WEIGHTS = "fp32"
_PARAM = "param"
_VERSION = "0.19.8"  # of DeepSpeed, whose layout this is
_LAYOUT = 0.2  # of universal checkpoints that were not cut by tensor parallelism
_DEADLINE = timedelta(minutes=2)


def is_universal(place: Path) -> bool:
    """Whether this is a universal checkpoint, or a folder whose newest one is named."""
    return (place / LATEST).is_file() or (place / "zero" / _SETTINGS).is_file()


def write_universal(whole: Whole, folder: Path, step: int, tell: Callable[[int], None] = lambda n: None) -> Path:
    """Write model and optimizer for DeepSpeed below `folder`; the folder of the step, complete or not there.

    CheckpointError where the checkpoint holds no optimizer of our engines; StoreError where it cannot be written.
    `tell` hears of the bytes. Memory is that of one array.
    """
    require("torch", extra="torch", purpose="Writing for DeepSpeed")
    import torch

    optimizer = whole.states.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("memory"), dict):
        raise CheckpointError(
            "The checkpoint holds no state 'optimizer', without which DeepSpeed does not load a universal checkpoint.",
            hint="Export the weights alone, without --universal; DeepSpeed's models load them as any other.",
        )
    weights = {exported_name(array): array for array in whole.arrays("model")}
    tag, beside = f"global_step{step}", folder / ".unfinished-universal"

    def tensor(array: StoredArray) -> Any:
        data = whole.read(array)
        tell(data.size)
        return make("torch", array.dtype, array.shape, data)

    def save(content: Any, *names: str) -> None:
        file = beside.joinpath(*names)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)

    steps: list[Any] = []
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for name, memory in optimizer["memory"].items():
            if name not in weights or Path(name).name != name:
                raise CheckpointError(f"The optimizer remembers something of {name}, which is no array of the model.")
            save({_PARAM: tensor(weights.pop(name)).float()}, "zero", name, f"{_WEIGHTS}.pt")
            for key, value in memory.items():
                if not isinstance(value, StoredArray):
                    continue
                if key == "step":
                    steps.append(tensor(value))
                    save(steps[-1], "zero", name, "step.pt")
                else:
                    save({_PARAM: tensor(value).float()}, "zero", name, f"{key}.pt")
        groups = [{**group, "params": []} for group in optimizer["groups"]]
        state = {0: {"step": steps[0] if steps else torch.zeros(())}}
        settings = {
            "param_groups": groups,
            "optimizer_state_dict": {"state": state, "param_groups": groups},
            "ds_version": _VERSION,
            "clip_grad": 0.0,
            "overflow": False,
        }
        save(settings, "zero", _SETTINGS)
        about = {
            "module": {name: tensor(array) for name, array in weights.items()},
            "buffer_names": list(weights),
            "global_steps": step,
            "skipped_steps": 0,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "lr_scheduler": None,
            "ds_version": _VERSION,
            "universal_checkpoint_info": {"universal_checkpoint_version": _LAYOUT},
        }
        save(about, "mp_rank_00_model_states.pt")  # stages 1 and 2
        save(about, "zero_pp_rank_0_mp_rank_00_model_states.pt")  # stage 3
        shutil.rmtree(folder / tag, ignore_errors=True)
        beside.rename(folder / tag)
        (folder / LATEST).write_text(tag)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder / tag


def open_universal(place: Path) -> dict[str, Any]:
    """The states `model` and `optimizer` of a universal checkpoint, with ForeignArrays, each read when it is wanted.

    Nothing of what its pickles name is run. CheckpointError where it is damaged, or cut by experts.
    """
    folder = _newest(place) / "zero"
    names = sorted(path.name for path in folder.iterdir() if (path / f"{_WEIGHTS}.pt").is_file())
    if not names:
        raise CheckpointError(f"{folder} holds no parameter, which would be a folder with {_WEIGHTS}.pt.")
    about = next(iter(sorted(folder.parent.glob("*mp_rank_00_model_states.pt"))), None)
    said: dict[str, Any] = _described(about) if about is not None else {"shapes": {}, "steps": 0}
    shapes: dict[str, list[int]] = said["shapes"]
    memory: dict[str, dict[str, ForeignArray]] = {}
    for name in names:
        files = sorted(file for file in (folder / name).glob("*.pt") if file.stem != _WEIGHTS)
        memory[name] = {file.stem: _array(f"{name}.{file.stem}", file, shapes.get(name)) for file in files}
        if memory[name] and "step" not in memory[name]:  # of stage 3, as are tensors in one dimension
            memory[name]["step"] = _number(f"{name}.step", float(said["steps"]))
    groups = _described(folder / _SETTINGS)["groups"]
    if not groups:
        raise CheckpointError(f"{folder / _SETTINGS} holds no settings of an optimizer.")
    started = [name for name in names if memory[name]]
    return {
        "model": {name: _array(name, folder / name / f"{_WEIGHTS}.pt", shapes.get(name)) for name in names},
        "optimizer": {"memory": memory, "started": started, "groups": groups},
    }


def arrays_of(states: Mapping[str, Any]) -> list[ForeignArray]:
    """Every array below."""
    found: list[ForeignArray] = []
    for value in states.values():
        if isinstance(value, ForeignArray):
            found.append(value)
        elif isinstance(value, Mapping):
            found += arrays_of(value)
    return found


def _newest(place: Path) -> Path:
    if not (place / LATEST).is_file():
        return place
    name = (place / LATEST).read_text().strip()
    if Path(name).name != name or not (place / name / "zero").is_dir():
        raise CheckpointError(f"{place / LATEST} names {name[:80]!r}, which is no universal checkpoint beside it.")
    return place / name


def _array(name: str, file: Path, known: list[int] | None) -> ForeignArray:
    """The tensor of a file, of the `known` shape where it lies there in one dimension.

    Numbers of steps, which some versions save as plain numbers, are taken as float32.
    """
    import torch

    content = load_tensors(file, str(file))
    tensor: Any = content.get(_PARAM) if isinstance(content, Mapping) else content
    if isinstance(content, Mapping) and content.get("is_expert_param"):
        raise CheckpointError(f"{file} is a part of an expert layer, which is not read.")
    if isinstance(tensor, int | float):
        tensor = torch.tensor(float(tensor))
    if not is_dense(tensor):
        raise CheckpointError(f"{file} holds no tensor under {_PARAM!r}.")
    if file.stem == "step":
        tensor = tensor.float()
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = check_shape(name, dtype, tuple(int(n) for n in tensor.shape))
    if known is not None and len(shape) == 1 and math.prod(check_shape(name, dtype, known)) == shape[0]:
        shape = tuple(known)
    return whole_array(name, dtype, shape, lambda: bytes_of(tensor, dtype))


def _number(name: str, value: float) -> ForeignArray:
    return whole_array(name, "float32", (), lambda: np.array(value, "<f4").reshape(1).view(np.uint8))


def _described(file: Path) -> dict[str, Any]:
    """What a file says beside tensors; see deepspeed_groups.py for why another process reads them."""
    command = [sys.executable, "-I", str(deepspeed_groups.__file__), str(file.absolute())]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_DEADLINE.total_seconds(), check=False
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{file} could not be read within {_DEADLINE.total_seconds():.0f} s.") from error
    except ValueError as error:  # killed at a limit, it leaves no answer
        raise CheckpointError(f"{file} took more time or memory to read than any such file needs.") from error
    if "error" in answer:
        raise CheckpointError(f"{file} is none of DeepSpeed's: {answer['error']}")
    return dict(answer)
