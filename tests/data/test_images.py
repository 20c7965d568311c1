from __future__ import annotations

import numpy as np
import pytest

from trainfleet.data.images import ImageFolder
from trainfleet.errors import DataError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    for name, value in (("cat", 255), ("ant", 0)):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (6, 4), (value, 51, 0)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_classes_are_the_folders_in_name_order(folder):
    source = ImageFolder(folder)
    assert source.classes == ["ant", "cat"] and [source[i]["target"] for i in range(4)] == [0, 0, 1, 1]
    pixels = source[2]["input"]
    assert pixels.shape == (3, 4, 6) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, 0, 0], [1, 0.2, 0], atol=1e-7)


def test_images_are_scaled_and_kept_small(folder):
    pixels = ImageFolder(folder, size=(2, 3), mode="L", dtype="uint8")[0]["input"]
    assert pixels.shape == (1, 2, 3) and pixels.dtype == np.uint8


def test_what_is_wrong_with_a_folder_is_named(folder, tmp_path):
    (folder / "ant" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ant/0\.png cannot be read as an image"):
        ImageFolder(folder)[0]
    with pytest.raises(DataError, match="does not exist"):
        ImageFolder(folder / "none")
    with pytest.raises(DataError, match="no class folders"):
        ImageFolder(folder / "cat")
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match="dog holds no image"):
        ImageFolder(folder)
