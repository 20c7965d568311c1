from __future__ import annotations

from trainfleet.store import MemoryStore


def test_stores_in_memory_share_nothing():
    first, second = MemoryStore(), MemoryStore()
    first.put("x", b"1")
    assert second.names() == []


def test_the_bytes_are_copied_and_read_only():
    store = MemoryStore()
    buffer = bytearray(b"abc")
    store.put("x", buffer)
    buffer[:] = b"xyz"
    assert store.get("x") == b"abc"
    assert isinstance(store.get("x"), bytes)


def test_it_tells_how_much_it_holds():
    store = MemoryStore()
    store.put("x", b"")
    assert repr(store) == "MemoryStore(1 names)"
