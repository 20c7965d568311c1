"""A source: samples by their index. And the way to one: a short name, or an import path."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from trainfleet.data.order import Blocks
from trainfleet.errors import ConfigError, DataError, TrainfleetError
from trainfleet.imports import load_object


@runtime_checkable
class Source(Protocol):
    """Samples by index. Any map-style torch dataset is one, and a list too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class BlockSource(Source, Protocol):
    """A source whose samples lie in blocks that have to be fetched, and which is told what comes."""

    blocks: Blocks
    still_there: Callable[[], None]
    """Called while a sample is waited for and its bytes come, so that nobody takes its process for hung."""

    def expect(self, present: Sequence[int], ahead: Sequence[int]) -> None:
        """The blocks that are in use now, and those to have ready soon, in their order."""


SOURCES = {
    "csv": "trainfleet.data.tabular:CsvTable",
    "numpy": "trainfleet.data.tabular:NumpyArrays",
    "parquet": "trainfleet.data.arrow:ArrowTable",
    "arrow": "trainfleet.data.arrow:ArrowTable",
    "text": "trainfleet.data.text:TextWindows",
    "images": "trainfleet.data.images:ImageFolder",
    "hf": "trainfleet.data.huggingface:load_dataset",
    "mds": "trainfleet.data.shards.mds:MosaicShards",
    "webdataset": "trainfleet.data.shards.tar:TarShards",
    "flight": "trainfleet.data.shards.flight:FlightTable",
}
"""The short names of `open_source`, and what each stands for."""


def open_source(kind: str, **args: Any) -> Any:
    """The source named by a short name (`csv`, `text`, ...) or an import path `package.module:Name`.

    What the path names is called with `args`; an object that is a source already is used as it is.
    """
    target = kind if ":" in kind else SOURCES.get(kind)
    if target is None:
        near = difflib.get_close_matches(kind, SOURCES, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"data.source is {kind!r}, which is neither a short name nor an import path. {guess}"
            f"Use one of {', '.join(SOURCES)}, or package.module:Name."
        )
    found = load_object(target, key="data.source")
    if not callable(found):
        if args:
            raise ConfigError(f"{kind} is an object, not a class or function, so it takes no args; got {sorted(args)}.")
        return _checked(found, kind)
    try:
        source = found(**args)
    except TrainfleetError:
        raise
    except TypeError as exc:
        raise ConfigError(f"The source {kind} does not take these args: {exc}.") from exc
    except FileNotFoundError as exc:
        raise DataError(f"The source {kind} is missing: {exc.filename or exc} does not exist.") from exc
    except Exception as exc:
        raise DataError(f"The source {kind} could not be opened: {type(exc).__name__}: {exc}") from exc
    return _checked(source, kind)


def _checked(source: Any, kind: str) -> Any:
    if is_indexed(source):
        if len(source) == 0:
            raise DataError(f"The source {kind} is empty: it opened, and holds no sample. Check its path and filters.")
    elif not isinstance(source, Iterable):
        raise DataError(
            f"The source {kind} gave a {type(source).__name__}, which has neither len() and [index] nor an iterator."
        )
    return source


def blocks_of(source: Any) -> Blocks | None:
    """The blocks of a source that has them."""
    found = getattr(source, "blocks", None)
    return found if isinstance(found, Blocks) else None


def is_indexed(source: Any) -> bool:
    """Whether samples can be had by index; torch's IterableDataset has `__getitem__` but only to refuse."""
    is_iterable_dataset = any(cls.__name__ == "IterableDataset" for cls in type(source).__mro__)
    return hasattr(source, "__getitem__") and hasattr(source, "__len__") and not is_iterable_dataset


def files_of(path: str | Path | Sequence[str | Path], pattern: str, *, what: str) -> list[Path]:
    """The files of one path, a folder (by `pattern`, sorted by name) or several; DataError if there are none."""
    paths = [path] if isinstance(path, str | Path) else list(path)
    found: list[Path] = []
    for one in (Path(p).expanduser() for p in paths):
        if one.is_dir():
            found += sorted(file for file in one.glob(pattern) if file.is_file())
        elif one.is_file():
            found.append(one)
        else:
            raise DataError(f"The {what} {one} does not exist. Check the path; it is relative to {Path.cwd()}.")
    if not found:
        raise DataError(f"No {what} matches {pattern!r} in {', '.join(map(str, paths))}. Check the folder and pattern.")
    return found
