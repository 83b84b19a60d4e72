"""Work on the blocks of arrays in threads that do not wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Elements per block. Small enough for the cache of one core with the temporaries, and large enough
# that NumPy rarely needs the interpreter.
BLOCK = 1 << 18


def map_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call a function with each item, in as many threads as torch has.

    Use it with NumPy, which computes in the calling thread. An operation of torch ends when its
    slowest thread does, so many small ones wait again and again for a core that another process
    takes. Here a slow thread only takes fewer items.
    """
    return _map(function, items, min(torch.get_num_threads(), len(items)))


def map_torch(
    function: Callable[[Item], Result], items: Sequence[Item], device: torch.device
) -> list[Result]:
    """Like `map_threads`, for functions that call torch. On a CPU, each operation uses one thread.

    So does torch in threads that begin meanwhile. On other devices, one item is processed after the
    other. The modes of torch are those of a new thread: gradients are on.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1 or device.type != "cpu":
        return [function(item) for item in items]
    with _single_threaded_operations():
        return _map(function, items, threads)


def _map(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


@contextmanager
def _single_threaded_operations() -> Iterator[None]:
    """Let operations of torch use one thread, in this thread and in new ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_blocks(
    function: Callable[[int, slice], Result], lengths: Iterable[int]
) -> list[list[Result]]:
    """Call a function with the number of an array and a block of it, for all blocks of all arrays.

    Returns the results by array. The threads are those of `map_threads`.
    """
    blocks = [
        [block_at(position, length) for position in range(-(-length // BLOCK))]
        for length in lengths
    ]
    items = [(number, block) for number, own in enumerate(blocks) for block in own]
    found = iter(map_threads(lambda item: function(*item), items))
    return [list(islice(found, len(own))) for own in blocks]


def block_at(position: int, length: int) -> slice:
    """The block at a position among those of an array."""
    return slice(position * BLOCK, min((position + 1) * BLOCK, length))
