"""What the metadata of a PyTorch distributed checkpoint says, read by a process of its own that can do no harm.

That metadata is a pickle. A pickle can run anything, fill all memory, or change the classes of the process that reads
it. So this file is run as a program, `python -I dcp_metadata.py .metadata`, under limits of memory and time. It
imports nothing but the standard library, knows the few names that belong there, and makes of each an inert `Stub`:
none of torch's own code runs. It prints JSON:

    {"tensors": [{"keys", "dtype", "shape", "chunks": [{"offsets", "shape", "file", "begin", "bytes"}]}], "others": 3}

or {"error": why}. `keys` lead to the tensor in what was saved. Whoever reads that checks it: it is the file's word.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

_MEMORY_BYTES = 1 << 30  # and what a metadata file of this size may need as objects:
_TIMES_ITS_SIZE = 60
_CPU_SECONDS = (10, 60)  # the least; and seconds more for each GB

_CLASSES = {
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
    # where torch 2.1 had them
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.distributed._shard.metadata": {"ShardMetadata"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
}
_DTYPES = {
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float8_e4m3fn", "float8_e5m2",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip


class Stub:
    """Stands for an object of some class, and keeps what was set in it."""

    kind = ""
    state: Any = None

    def __init__(self, *made_with: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stub(kind: str) -> type[Stub]:
    return type(kind, (Stub,), {"kind": kind})


class _Size(tuple[Any, ...]):
    """torch.Size"""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._stubs: dict[tuple[str, str], Any] = {("torch", "Size"): _Size, ("collections", "OrderedDict"): dict}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stubs:
            if module == "torch" and name in _DTYPES:
                self._stubs[module, name] = _stub(f"dtype {name}")()
            elif name in _CLASSES.get(module, ()):
                self._stubs[module, name] = _stub(name)
            else:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}, which does not belong there")
        return self._stubs[module, name]


def described(file: Path) -> dict[str, Any]:
    """The metadata as the JSON above."""
    with file.open("rb") as opened:
        metadata = _fields(_Unpickler(opened).load(), "Metadata")
    places = {}
    for index, info in (metadata.get("storage_data") or {}).items():
        key, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if place.get("transform_descriptors"):
            raise ValueError("its files are compressed or encrypted by an extension; save it without")
        places[key["fqn"], _numbers(key.get("offset") or ())] = place
    nested = metadata.get("planner_data") or {}
    tensors = []
    for name, entry in metadata["state_dict_metadata"].items():
        if getattr(entry, "kind", None) == "TensorStorageMetadata":
            keys = [str(key) for key in nested.get(name) or (name,)] if isinstance(nested, dict) else [str(name)]
            tensors.append({"keys": keys, **_tensor(name, _fields(entry, "TensorStorageMetadata"), places)})
    return {"tensors": tensors, "others": len(metadata["state_dict_metadata"]) - len(tensors)}


def _tensor(name: Any, entry: dict[str, Any], places: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    chunks = []
    for chunk in entry["chunks"]:
        fields = chunk.state
        offsets = _numbers(fields["offsets"])
        place = places.get((name, offsets)) or places[name, ()]
        chunks.append(
            {
                "offsets": offsets,
                "shape": _numbers(fields["sizes"]),
                "file": str(place["relative_path"]),
                "begin": int(place["offset"]),
                "bytes": int(place["length"]),
            }
        )
    dtype = entry["properties"].state[0].kind
    return {
        "dtype": dtype.removeprefix("dtype "),
        "shape": _numbers(entry["size"]),
        "chunks": chunks,
    }


def _fields(found: Any, kind: str) -> dict[str, Any]:
    if getattr(found, "kind", None) != kind:
        raise ValueError(f"there is a {getattr(found, 'kind', type(found).__name__)} where a {kind} belongs")
    return dict(found.state)


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _limit(num_bytes: int) -> None:
    """Bound what this process may take; where the system has no such limits the deadline of the parent remains."""
    try:
        import resource
    except ImportError:
        return
    least, more = _CPU_SECONDS
    seconds = least + more * (num_bytes >> 30)
    limits = {
        resource.RLIMIT_AS: _MEMORY_BYTES + _TIMES_ITS_SIZE * num_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 0,  # it writes into a pipe only
        resource.RLIMIT_NPROC: 0,
    }
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it would take more memory than any such file needs"
    if isinstance(error, OSError | ValueError | pickle.UnpicklingError | EOFError) and str(error):
        return str(error)
    return f"it has another form ({type(error).__name__}: {error})"


def main() -> None:
    file = Path(sys.argv[1])
    try:
        _limit(file.stat().st_size)
        answer = json.dumps(described(file))
    except BaseException as error:  # a pickle can fail in any way; how is told, and the process ends
        answer = json.dumps({"error": _reason(error)})
    sys.stdout.write(answer)


if __name__ == "__main__":
    main()
