"""Pixels: images that travelled as uint8 become floats, where they are computed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from trainfleet.batch import Batch, map_arrays
from trainfleet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor


class Pixels:
    """uint8 images [N, C, H, W] as float32 [N, C, H, W]: 0..255 to 0..1, then less `mean`, by `std`.

    mean, std   one number, or one for each channel, on the scale 0..1, as torchvision's Normalize takes them
    channels    `last` for images that come as [N, H, W, C]; images [N, H, W] get one channel

    Every array of uint8 in a batch with three dimensions or more is an image; others stay as they are. DataError for a
    batch without one, and for as many numbers as there are no channels.
    """

    def __init__(
        self,
        *,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        channels: Literal["first", "last"] = "first",
    ) -> None:
        if channels not in ("first", "last"):
            raise ConfigError(f"channels is {channels!r}; images have them `first` or `last`.")
        self._mean, self._std, self._channels = _numbers(mean), _numbers(std), channels
        if self._std is not None and not all(number > 0 for number in self._std):
            raise ConfigError(f"std is {std}; numbers to divide by must be more than 0.")

    def __call__(self, batch: Batch) -> Batch:
        found = 0

        def cast(array: Any) -> Any:
            nonlocal found
            if str(array.dtype) != "torch.uint8" or array.ndim < 3:
                return array
            found += 1
            return self._cast(array)

        prepared = map_arrays(cast, batch)
        if not found:
            raise DataError(
                "data.on_device is `pixels`, and a batch has no uint8 images. Leave them uint8 in the dataset and its "
                "transform, or leave on_device out."
            )
        return prepared

    def _cast(self, images: Tensor) -> Tensor:
        if images.ndim == 3:
            images = images.unsqueeze(1)
        elif self._channels == "last":
            images = images.movedim(-1, 1).contiguous()
        floats = images.float().div_(255)
        if self._mean is not None:
            floats -= self._by_channel(self._mean, floats)
        if self._std is not None:
            floats /= self._by_channel(self._std, floats)
        return floats

    def _by_channel(self, numbers: list[float], images: Tensor) -> Tensor:
        if len(numbers) not in (1, images.shape[1]):
            raise DataError(
                f"Images have {images.shape[1]} channels, and mean or std {len(numbers)} numbers. Give one for each, "
                "or one for all; channels='last' is for images [N, H, W, C]."
            )
        return images.new_tensor(numbers).view(-1, *[1] * (images.ndim - 2))


def _numbers(value: float | Sequence[float] | None) -> list[float] | None:
    if value is None:
        return None
    return [float(value)] if isinstance(value, int | float) else [float(number) for number in value]
