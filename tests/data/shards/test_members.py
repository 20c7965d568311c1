"""The files of an archive are those that the standard library finds, and a broken archive is never a shorter one."""

from __future__ import annotations

import io
import tarfile
import tempfile

import pytest
from data.shards.made import tarred
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainfleet.data.shards.cache import Damaged
from trainfleet.data.shards.members import BLOCK, Member, members

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FILES = {"a.txt": b"one", "empty.txt": b"", "folder/b.txt": b"x" * 512, "c.bin": b"y" * 513}


def found(data):
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return list(members(file.fileno(), len(data)))


def by_tarfile(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [Member(info.name, info.offset_data, info.size) for info in archive if info.isreg()]


@pytest.mark.parametrize("form", FORMS)
def test_files_are_found_where_the_standard_library_finds_them(form):
    long = {f"{'deep/' * 12}{'n' * 60}.{i}": bytes([i]) for i in range(3)}
    odd = {"ümlaut.txt": b"1", "s p.txt": b"2"}
    longer = {f"{'d' * 130}/{'e' * 130}.x": b"z"} if form != "ustar" else {}
    data = tarred({**FILES, **long, **odd, **longer}, form=FORMS[form])
    assert found(data) == by_tarfile(data) and len(found(data)) == 9 + len(longer)


def test_folders_and_links_have_no_bytes_here():
    kinds = iter([tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])

    def change(info):
        info.type, info.linkname, info.size = next(kinds), "/etc/passwd", 0

    assert found(tarred(dict.fromkeys(["f", "s", "l", "p"], b""), change=change)) == []


@settings(max_examples=100)
@given(cut=st.integers(0, 10_239))
@example(cut=BLOCK * 2)
def test_an_archive_that_is_cut_off_anywhere_is_damaged(cut):
    data = tarred(FILES, form=tarfile.GNU_FORMAT)
    whole = by_tarfile(data)[-1]
    if cut < whole.begin + 2 * BLOCK + BLOCK:
        with pytest.raises(Damaged, match="cut off"):
            found(data[:cut])
    else:
        assert len(found(data[:cut])) == 4


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_garbled_headers_give_places_within_the_archive_or_are_said(changes):
    data = bytearray(tarred(FILES))
    for place, value in changes:
        data[place] = value
    try:
        listed = found(bytes(data))
    except Damaged:
        return
    assert all(m.begin >= 0 and m.begin + m.size <= len(data) for m in listed)


def with_sum(header):
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def header(kind=b"0", size=b"00000000000\0", name=b"x.txt"):
    block = bytearray(BLOCK)
    block[: len(name)], block[124:136], block[156:157], block[257:263] = name, size, kind, b"ustar\0"
    return with_sum(block)


END = bytes(2 * BLOCK)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no archive".ljust(2048, b"x"), "no header of a tar archive at byte 0"),
        (header(size=b"77777777777\0") + END, "cut off: what begins at byte 512 has 8589934591 bytes"),
        (header(size=b"\x80" + b"\xff" * 11) + END, "is no number"),
        (header(size=b"\xff" * 12) + END, "is no number"),
        (header(size=b"-0000000001\0") + END, "is no number"),
        (header(kind=b"L", size=b"00010000000\0") + bytes(1 << 22), "is said to have 2097152 bytes"),
        (header(kind=b"S") + END, "with holes"),
        (header(kind=b"x", size=b"00000000012\0") + b"99 path=a\n".ljust(BLOCK, b"\0") + END, "attributes .* garbled"),
        (header(kind=b"x", size=b"00000000014\0") + b"12 size=-1\n\0".ljust(BLOCK, b"\0") + END, "garbled"),
        (b"", "cut off at byte 0"),
    ],
)
def test_what_cannot_be_is_a_sentence(data, words):
    with pytest.raises(Damaged, match=words):
        found(data)


def test_large_sizes_are_read_in_binary():
    data = header(size=b"\x80" + (3).to_bytes(11, "big")) + b"abc".ljust(BLOCK, b"\0") + END
    assert found(data) == [Member("x.txt", BLOCK, 3)]


def test_a_name_is_only_a_name():
    assert [m.name for m in found(tarred({"../../evil.txt": b"1", "/etc/evil.txt": b"2"}))] == [
        "../../evil.txt",
        "/etc/evil.txt",
    ]
