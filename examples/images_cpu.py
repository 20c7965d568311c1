"""The side that has images and CPUs: it decodes and shifts them for `images_gpu.py`, until Ctrl-C.

The images are handwritten digits, written as PNG and JPEG files first, a folder for each class, as one's own would be.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from trainfleet import DataService, LocalBatches
from trainfleet.data.images import ImageFolder
from trainfleet.data.split import Part


def write_digits(folder: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    for number, (image, label) in enumerate(zip(images, labels)):
        place = folder / str(label) / f"{number:04}.{'png' if number % 2 else 'jpg'}"
        place.parent.mkdir(exist_ok=True)
        pixels = (image.reshape(8, 8) * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).resize((24, 24)).save(place)


def shift(sample: dict, rng: np.random.Generator) -> dict:
    """Up to 2 pixels in any direction: the same for (seed, epoch, image), whoever makes it."""
    moved = np.roll(sample["input"], tuple(rng.integers(-2, 3, 2)), axis=(1, 2))
    return {**sample, "input": moved}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        images = ImageFolder(folder, mode="L", dtype="uint8")
        rest, held_out = (Part(images, 0.2, held_out=part) for part in (False, True))
        training = LocalBatches(images, size=32, workers=2, part=rest, transform=shift)
        evaluation = LocalBatches(images, size=32, part=held_out, shuffle=False, short="keep")
        DataService(training, evaluation=evaluation, address=sys.argv[1]).serve()
