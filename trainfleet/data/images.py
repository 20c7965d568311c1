"""Images in a folder, one subfolder a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainfleet.deps import require
from trainfleet.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class ImageFolder:
    """{"input": image (channels, height, width), "target": number of its class}, the classes in name order.

    `size` (height, width, or one number for both) scales every image; without it they keep their own, and
    only images of one size can share a batch. float32 is in 0..1; uint8 is as stored, four times smaller on
    its way to a device that casts it there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        size: int | Sequence[int] | None = None,
        mode: Literal["RGB", "L", "RGBA"] = "RGB",
        dtype: Literal["float32", "uint8"] = "float32",
    ) -> None:
        _pillow()
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"The image folder {folder} does not exist. Check the path; it is relative to {Path.cwd()}."
            )
        self._size = (size, size) if isinstance(size, int) else tuple(size) if size is not None else None
        self._mode, self._dtype, self._folder = mode, dtype, folder
        self.classes = sorted(sub.name for sub in folder.iterdir() if sub.is_dir())
        self._files: list[tuple[str, int]] = []
        for number, name in enumerate(self.classes):
            found = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"The class folder {folder / name} holds no image ({', '.join(sorted(SUFFIXES))}).")
            self._files += [(str(file), number) for file in found]
        if not self._files:
            raise DataError(f"{folder} has no class folders; put the images of each class into {folder}/<class>/.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, target = self._files[index]
        try:
            pixels: Any = decode_image(file, self._mode, self._size)
        except DataError as exc:
            raise DataError(f"{file} cannot be read as an image: {exc}") from exc
        if self._dtype == "float32":
            pixels = pixels.astype(np.float32) / np.float32(255)
        return {"input": pixels, "target": np.int64(target)}

    def __repr__(self) -> str:
        return f"images {self._folder}"


def decode_image(image: Any, mode: str | None, size: Sequence[int] | None = None) -> NDArray[Any]:
    """Pixels (channels, height, width) of a file, its name, or a PIL image; uint8 unless its mode is I, F or I;16.

    `mode` None: as stored. Raises DataError for what is no image, or one of so many pixels that it must be a trap.
    """
    library = _pillow()
    try:
        with image if isinstance(image, library.Image) else library.open(image) as opened:
            picture = opened.convert(mode) if mode is not None else opened
            if size is not None:
                picture = picture.resize((size[1], size[0]), library.Resampling.BILINEAR)
            pixels = np.array(picture)
    except (OSError, SyntaxError, ValueError, EOFError, library.DecompressionBombError) as exc:
        raise DataError(str(exc)) from exc
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _pillow() -> Any:
    return require("PIL.Image", "data", purpose="Reading images")
