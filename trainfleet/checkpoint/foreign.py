"""Weights that others saved, as arrays by name: safetensors, PyTorch's `.pt`, distributed checkpoints (DCP).

Nothing here runs what a file says. `.pt` files are read with `weights_only`; the metadata of a DCP, which is a pickle,
by an unpickler that knows the few classes that belong there and no others.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainfleet.deps import require
from trainfleet.errors import CheckpointError

_MOST_METADATA_BYTES = 1 << 30
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_INNER = ("model", "state_dict", "model_state_dict", "module")
"""Where training scripts put the weights among other things."""

_DCP_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64",
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def read_foreign(source: Path) -> dict[str, Any]:
    """The tensors of a file or folder by name, on the CPU; CheckpointError if it is none of the known kinds."""
    if source.is_dir():
        if (source / ".metadata").is_file():
            return _from_dcp(source)
        files = _safetensors_in(source)
        return {name: tensor for file in files for name, tensor in _from_safetensors(file)}
    if not source.is_file():
        raise CheckpointError(f"There is no file or folder {source}.")
    if source.suffix == ".safetensors":
        return dict(_from_safetensors(source))
    if source.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return _from_torch(source)
    raise CheckpointError(
        f"{source} is of no known kind: known are .safetensors, .pt, .pth, .bin, .ckpt, folders of safetensors files, "
        "and folders of PyTorch's distributed checkpoints."
    )


def renamed(tensors: Mapping[str, Any], strip: str | None) -> tuple[dict[str, Any], str]:
    """Without the prefix `strip`, or without those of wrappers where all names bear one; and what was stripped.

    CheckpointError where a name does not begin with `strip`, or two would become one.
    """
    prefix = strip or ""
    if strip is None:
        while found := next((w for w in _WRAPPERS if all(n.startswith(prefix + w) for n in tensors)), None):
            prefix += found
    if unlike := [name for name in tensors if not name.startswith(prefix)]:
        raise CheckpointError(f"{unlike[0]} does not begin with {prefix!r}; the prefix is to be one of all names.")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, prefix


def _safetensors_in(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is no index of safetensors files: {error}.") from error
        if odd := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise CheckpointError(f"{index} names {odd[0]!r}, which is no file beside it.")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds neither safetensors files nor a distributed checkpoint (.metadata).")
    return files


def _from_safetensors(file: Path) -> Iterator[tuple[str, Any]]:
    require("safetensors", extra="torch", purpose="reading safetensors files")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping, though it looks like one
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _from_torch(file: Path) -> dict[str, Any]:
    require("torch", extra="torch", purpose="reading .pt files")
    import torch

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than weights, and what it holds could run as a program; it was not loaded.",
            hint="Save the weights alone where it came from: torch.save(model.state_dict(), ...).",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read as a file of PyTorch: {error}") from error
    tensors = _tensors_of(loaded)
    if not tensors and isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _INNER if isinstance(loaded.get(key), Mapping)), None)
        tensors = _tensors_of(inner)
    if not tensors:
        raise CheckpointError(f"{file} holds no mapping of names to tensors.")
    return tensors


def _tensors_of(loaded: Any) -> dict[str, Any]:
    import torch

    if not isinstance(loaded, Mapping) or not loaded:
        return {}
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    return tensors if len(tensors) == len(loaded) else {}


class _DcpUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _DCP_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which does not belong there")


def _from_dcp(folder: Path) -> dict[str, Any]:
    require("torch", extra="torch", purpose="reading distributed checkpoints")
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    file = folder / ".metadata"
    if file.stat().st_size > _MOST_METADATA_BYTES:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes; no checkpoint describes itself at such length.")
    try:
        metadata = _DcpUnpickler(io.BytesIO(file.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        described = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        _refuse_paths_outside(metadata)
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    except CheckpointError:
        raise
    except Exception as error:  # a pickle of the right classes with the wrong contents can fail in any way
        raise CheckpointError(f"{file} is not the metadata of a distributed checkpoint: {error}.") from error

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return metadata  # type: ignore[no-any-return]

    try:
        # Only tensors are asked for, which torch reads with weights_only.
        load(tensors, storage_reader=Reader(folder), no_dist=True)
    except (Exception, CheckpointException) as error:  # which is no Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CheckpointError(f"The distributed checkpoint in {folder} cannot be read: {reason}") from error
    return tensors


def _refuse_paths_outside(metadata: Any) -> None:
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"The metadata names the file {info.relative_path!r}, which is not beside it.")
