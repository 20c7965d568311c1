"""What bytes stand for, and that nothing else than that comes of them."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainfleet.data.shards.encodings import DTYPE_CODES, SCALARS, checked_mode, decode_file, decoder_of
from trainfleet.errors import DataError


def view(data):
    return memoryview(bytes(data))


@pytest.mark.parametrize("dtype", SCALARS)
def test_scalars_and_arrays_come_back_with_their_dtype(dtype):
    value = np.dtype(dtype).type(7)
    assert decoder_of(dtype, "c", None)(view(value.tobytes())) == value
    array = np.arange(6).astype(dtype).reshape(2, 3)
    found = decoder_of(f"ndarray:{dtype}:2,3", "c", None)(view(array.tobytes()))
    assert found.dtype == dtype and (found == array).all() and found.flags.writeable
    code = next(code for code, name in DTYPE_CODES.items() if name == dtype)
    told = bytes([code, 2 << 2 | 1]) + np.array([2, 3], "<u2").tobytes() + array.tobytes()
    assert (decoder_of("ndarray", "c", None)(view(told)) == array).all()


@pytest.mark.parametrize(
    ("encoding", "data", "words"),
    [
        ("int", b"123", "int64 has 3 bytes"),
        ("ndarray", b"", "garbled"),
        ("ndarray", bytes([7, 4, 1, 0]), "garbled"),
        ("ndarray:uint8", bytes([2 << 2, 255, 255]) + b"x", r"\[255, 255\] has 1 bytes"),
        ("ndarray:uint8:4", b"abc", "has 3 bytes"),
        ("str", b"\xff", "no UTF-8"),
        ("json", b"{", "no JSON"),
        ("json", b"[" * 100_000, "no JSON"),
        ("str_int", b"1" * 5000, "no number"),
        ("str_decimal", b"x", "no number"),
        ("pil", b"abc", "has 3 bytes"),
        ("pil", b"\xff\xff\xff\x7f\xff\xff\xff\x7f\x01\0\0\0L", "says that it is"),
        ("pil", b"\1\0\0\0\1\0\0\0\3\0\0\0EVLx", "mode 'EVL'"),
        ("png", b"no image", "cannot identify"),
    ],
)
def test_garbage_is_a_sentence(encoding, data, words):
    with pytest.raises(DataError, match=words):
        decoder_of(encoding, "c", "RGB")(view(data))


@pytest.mark.parametrize("encoding", ["ndarray:object", "ndarray:float32:0", "ndarray:float32:a", "nothing", "pkl"])
def test_encodings_that_are_none_are_refused_with_the_name_of_the_column(encoding):
    with pytest.raises(DataError, match="column 'c'"):
        decoder_of(encoding, "c", None)


def test_images_have_one_of_a_few_modes():
    assert [checked_mode(mode) for mode in (None, "RGB", "L")] == [None, "RGB", "L"]
    with pytest.raises(DataError, match="mode is 'rgb'; use RGB"):
        checked_mode("rgb")


ENCODINGS = ["bytes", "str", "int", "json", "str_int", "str_float", "str_decimal", "jpeg", "png", "pil", "ndarray"]


@settings(max_examples=400)
@given(data=st.binary(max_size=80), encoding=st.sampled_from([*ENCODINGS, "ndarray:int16", "float16"]))
def test_any_bytes_are_decoded_or_refused(data, encoding):
    with contextlib.suppress(DataError):
        decoder_of(encoding, "c", None)(view(data))


def picture(kind, mode="RGB"):
    out = io.BytesIO()
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).convert(mode).save(out, kind)
    return out.getvalue()


def numpy_file(save, value):
    out = io.BytesIO()
    save(out, **value) if isinstance(value, dict) else save(out, value)
    return out.getvalue()


def test_files_are_decoded_by_their_ending():
    assert decode_file("png", view(picture("PNG")), "RGB").shape == (3, 4, 5)
    assert (decode_file("seg.png", view(picture("PNG", "L")), None).shape) == (1, 4, 5)
    assert decode_file("cls", view(b"7\n"), None) == 7 and decode_file("cls", view(b"7"), None).dtype == np.int64
    assert decode_file("txt", view("é".encode()), None) == "é"
    assert decode_file("meta.json", view(b'{"a": [1]}'), None) == {"a": [1]}
    assert decode_file("npy", view(numpy_file(np.save, np.eye(2))), None).tolist() == [[1, 0], [0, 1]]
    assert decode_file("npz", view(numpy_file(np.savez, {"a": np.ones(2)})), None)["a"].tolist() == [1, 1]
    assert decode_file("pkl", view(b"c"), None) == b"c", "left as bytes: nothing is unpickled"


def test_arrays_of_objects_are_not_unpickled():
    with pytest.raises(DataError, match="without pickle"):
        decode_file("npy", view(numpy_file(np.save, np.array([{}], object))), None)
    with pytest.raises(DataError, match="without pickle"):
        decode_file("npz", view(numpy_file(np.savez, {"a": np.array([{}], object)})), None)
