from __future__ import annotations

import gc

import numpy as np

from trainfleet.net.memory import MAX_FREE, Pool


def test_a_buffer_is_used_again_when_its_last_array_is_gone():
    pool = Pool()
    first = pool.take(1 << 20)
    place = first.ctypes.data
    part = first[100:200].view(np.uint8).reshape(10, 10)
    del first
    assert pool.free_bytes == 0, "an array still lies in it"
    del part
    assert pool.free_bytes >= 1 << 20
    assert pool.take(1 << 20).ctypes.data == place


def test_a_buffer_in_use_is_never_given_out_twice():
    pool = Pool()
    held = [pool.take(100_000) for _ in range(20)]
    assert len({array.ctypes.data for array in held}) == 20
    del held
    gc.collect()
    pool.take(100_000)
    assert pool.free_bytes <= (MAX_FREE + 1) * 120_000


def test_the_buffer_that_came_back_last_is_the_next():
    pool = Pool()
    held = [pool.take(100_000) for _ in range(3)]
    last = held[1].ctypes.data
    for place in (2, 0, 1):
        held[place] = None
    assert pool.take(100_000).ctypes.data == last


def test_arrays_outlive_their_pool():
    pool = Pool()
    array = pool.take(100_000)
    array[:] = 7
    del pool
    gc.collect()
    assert (array == 7).all()


def test_buffers_begin_at_multiples_of_64():
    pool = Pool()
    assert all(pool.take(n).ctypes.data % 64 == 0 for n in (1, 1000, 1 << 16, 1 << 21))


def test_a_small_need_does_not_take_a_large_buffer():
    pool = Pool()
    pool.take(1 << 24)
    assert pool.free_bytes > 1 << 24
    pool.take(1 << 17)
    assert pool.free_bytes > 1 << 24


def test_memory_comes_from_the_allocator_that_was_given():
    asked = []

    def allocate(num_bytes: int) -> bytearray:
        asked.append(num_bytes)
        return bytearray(num_bytes)

    pool = Pool(allocate)
    for _ in range(3):
        taken = pool.take(1 << 20)
        taken[:] = 1
        del taken
    assert len(asked) == 1 and asked[0] >= 1 << 20
