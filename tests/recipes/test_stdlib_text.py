"""The text of the standard library: the same on every run, held out by file, and counted right."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "recipes"))

import stdlib_text
from stdlib_text import StdlibText, load_text, trigram_nats, unigram_nats

from trainfleet.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hundred small files, each of a text that names it, in two folders."""
    monkeypatch.setattr(stdlib_text, "MIN_BYTES", 1000)
    for i in range(200):
        path = tmp_path / ("even" if i % 2 == 0 else "odd") / f"module_{i:03}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<{path.name}>")
    return tmp_path


def names(text: np.ndarray) -> list[str]:
    return text.tobytes().decode().strip("<>").split("><")


def test_every_file_is_in_one_split_and_about_one_in_twenty_is_held_out(folder: Path) -> None:
    text = load_text(str(folder))
    train, validation = names(text.train), names(text.validation)
    assert text.num_files == 200 and text.num_unreadable == 0
    assert sorted(train + validation) == [f"module_{i:03}.py" for i in range(200)]
    assert 3 <= len(validation) <= 20
    assert train == [
        f"module_{i:03}.py" for i in [*range(0, 200, 2), *range(1, 200, 2)] if f"module_{i:03}.py" in train
    ]


def test_a_new_file_leaves_the_others_where_they_are(folder: Path) -> None:
    before = set(names(load_text(str(folder)).validation))
    load_text.cache_clear()
    (folder / "even" / "another.py").write_text("<another.py>")
    assert set(names(load_text(str(folder)).validation)) - {"another.py"} == before


def test_tests_installed_packages_and_caches_are_left_out(folder: Path) -> None:
    for skipped in ("test", "even/tests", "site-packages/x", "odd/__pycache__"):
        (folder / skipped).mkdir(parents=True)
        (folder / skipped / "a.py").write_text("<a.py>")
    (folder / "notes.txt").write_text("<notes.txt>")
    assert load_text(str(folder)).num_files == 200


def test_an_unreadable_file_is_skipped_and_counted(folder: Path) -> None:
    (folder / "broken.py").symlink_to(folder / "nowhere.py")
    text = load_text(str(folder))
    assert (text.num_files, text.num_unreadable) == (200, 1)


@pytest.mark.parametrize("path", [".", "no/such/folder"])
def test_too_little_text_is_a_sentence(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"0 bytes of Python source in 0 files .* at least 1000000 are needed"):
        load_text(str(tmp_path / path))


def test_windows_cover_the_split_in_order_and_targets_are_one_byte_on(folder: Path) -> None:
    source = StdlibText(split="train", length=7, folder=str(folder))
    text = source.text.train
    assert len(source) == (len(text) - 1) // 7
    samples = [source[i] for i in range(len(source))]
    assert np.concatenate([sample["input"] for sample in samples]).tolist() == text[: len(source) * 7].tolist()
    assert np.concatenate([sample["target"] for sample in samples]).tolist() == text[1 : len(source) * 7 + 1].tolist()
    assert samples[0]["input"].dtype == samples[0]["target"].dtype == np.int64
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_number_of_windows_is_spread_over_the_whole_split(folder: Path) -> None:
    every = StdlibText(split="train", length=5, folder=str(folder))
    few = StdlibText(split="train", length=5, windows=4, folder=str(folder))
    stride = len(every) // 4
    assert [few[i]["input"].tolist() for i in range(4)] == [every[i * stride]["input"].tolist() for i in range(4)]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"split": "test"}, "no split 'test'"),
        ({"length": 0}, "is 0 bytes"),
        ({"length": 10**6}, "Use a smaller length"),
        ({"length": 10, "windows": 10**6}, "1000000 were asked for"),
        ({"length": 10, "windows": 0}, "0 were asked for"),
    ],
)
def test_impossible_windows_are_refused(folder: Path, args: dict[str, object], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        StdlibText(**{"folder": str(folder), **args})  # type: ignore[arg-type]


def test_the_baselines_are_those_of_counting_by_hand() -> None:
    generator = np.random.default_rng(0)
    train, held_out = generator.choice(6, (2, 400), p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05]).astype(np.uint8)
    held_out[50] = 77  # never seen in training
    assert unigram_nats(train, held_out) == pytest.approx(plain_unigram(bytes(train), bytes(held_out)))
    assert trigram_nats(train, held_out) == pytest.approx(plain_trigram(bytes(train), bytes(held_out)))


def plain_unigram(train: bytes, held_out: bytes) -> float:
    counts = Counter(train)
    return -sum(math.log((counts[byte] + 1) / (len(train) + 256)) for byte in held_out) / len(held_out)


def plain_trigram(train: bytes, held_out: bytes) -> float:
    padded = bytes(2) + train
    followers: dict[bytes, Counter[int]] = {}
    for i in range(2, len(padded)):
        for n in range(3):
            followers.setdefault(padded[i - n : i], Counter())[padded[i]] += 1

    def probability(context: bytes, byte: int) -> float:
        shorter = probability(context[1:], byte) if context else 1 / 256
        seen = followers.get(context)
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen)) if seen else shorter

    padded = bytes(2) + held_out
    return -sum(math.log(probability(padded[i - 2 : i], padded[i])) for i in range(2, len(padded))) / len(held_out)


def test_the_standard_library_is_there_and_counting_does_not_predict_it_well() -> None:
    source = StdlibText()
    assert len(source.text.train) > 15 * len(source.text.validation) > 1_000_000
    baselines = source.baselines()
    assert 2.9 < baselines["unigram"] < 3.6
    assert 1.6 < baselines["trigram"] < 2.1
