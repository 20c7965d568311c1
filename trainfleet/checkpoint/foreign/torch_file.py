"""Tensors in files that torch.save made, read with `weights_only`: nothing that a file says is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainfleet.checkpoint.arrays import Bytes, copy_bytes
from trainfleet.checkpoint.foreign.pieces import ForeignArray, check_shape, whole_array
from trainfleet.deps import require
from trainfleet.errors import CheckpointError

INNER = ("model", "state_dict", "model_state_dict", "module")
"""Under which of these keys training scripts put the weights, where there are other things beside them."""

_TIMES_THE_FILE, _AND_BYTES = 16, 1 << 30
"""What the tensors may take beyond their file: one number can stand for all elements of a tensor, or of a bomb."""


@dataclass(slots=True)
class TorchFile:
    arrays: list[ForeignArray]
    within: str | None = None
    """The key of INNER under which they are."""
    tied: dict[str, str] = field(default_factory=dict)
    """Names left out because their tensor is there under another name, which is the value."""
    others: list[str] = field(default_factory=list)
    """Keys beside them that are no tensors."""


def arrays_in_torch_file(file: Path) -> TorchFile:
    """The tensors of a file by name, on the CPU, mapped rather than read where the file allows it."""
    loaded = load_tensors(file, file.name)
    within = next((key for key in INNER if isinstance(loaded, Mapping) and _has_tensors(loaded.get(key))), None)
    weights = loaded[within] if within is not None else loaded
    if not _has_tensors(weights):
        raise CheckpointError(f"{file} holds no mapping of names to tensors.")
    found = TorchFile([], within, others=[] if within is None else [str(key) for key in loaded if key != within])
    places: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        if not is_dense(tensor):
            found.others.append(str(name))
            continue
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in places:
            found.tied[str(name)] = places[place]
            continue
        places[place] = str(name)
        found.arrays.append(_as_array(str(name), tensor))
    total, size = sum(array.num_bytes for array in found.arrays), file.stat().st_size
    if total > _TIMES_THE_FILE * size + _AND_BYTES:
        raise CheckpointError(f"The tensors in {file} would take {total} bytes, and the file has {size}; not read.")
    return found


def load_tensors(source: Path | BinaryIO, name: str) -> Any:
    """What torch.load gives; CheckpointError, with `name`, if it cannot be read or holds more than weights."""
    require("torch", extra="torch", purpose="Reading files of torch.save")
    import torch

    try:
        mapped = _is_plain_zip(source, name) and isinstance(source, Path)
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{name} holds more than weights, and what it holds could run as a program; it was not loaded.",
            hint="Save the weights alone where it came from: torch.save(model.state_dict(), ...).",
        ) from error
    except Exception as error:  # torch and zipfile fail in many ways at damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name} cannot be read as a file of torch.save: {reason}") from error


def is_dense(tensor: Any) -> bool:
    import torch

    return isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout == torch.strided


def bytes_of(tensor: Any, dtype: str) -> Bytes:
    """The elements of a tensor."""
    data = np.empty(tensor.numel() * tensor.element_size(), np.uint8)
    copy_bytes(tensor, dtype, data)
    return data


def _as_array(name: str, tensor: Any) -> ForeignArray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = check_shape(name, dtype, tuple(int(n) for n in tensor.shape))
    return whole_array(name, dtype, shape, lambda: bytes_of(tensor, dtype))


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(is_dense(item) for item in value.values())


def _is_plain_zip(source: Path | BinaryIO, name: str) -> bool:
    """Whether it is the zip that torch.save makes; CheckpointError where what is in it would take more than the file.

    torch itself would unpack such a bomb before anybody could measure it.
    """
    is_zip = zipfile.is_zipfile(source)
    if is_zip:
        with zipfile.ZipFile(source) as archive:
            size = (archive.fp.seek(0, 2) if archive.fp else 0) or 0
            members = archive.infolist()
        if packed := [each.filename for each in members if each.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(f"{name} is compressed inside ({packed[0]}), as torch.save never does; not read.")
        if sum(each.file_size for each in members) > size:
            raise CheckpointError(f"What {name} holds would take more bytes than the file has; not read.")
    if not isinstance(source, Path):
        source.seek(0)
    return is_zip
