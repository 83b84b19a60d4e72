"""Work on the blocks of an array in threads that do not wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Elements per block. Small enough for the cache of one core with the temporaries, and large enough
# that NumPy rarely needs the interpreter.
BLOCK = 1 << 18


def map_blocks(function: Callable[[int], Result], length: int) -> list[Result]:
    """Call a function with the start of each block, in as many threads as torch has.

    Use it with NumPy, which computes in the calling thread. An operation of torch ends when its
    slowest thread does, so many small ones wait again and again for a core that another process
    takes. Here a slow thread only takes fewer blocks.
    """
    starts: Iterable[int] = range(0, length, BLOCK)
    threads = min(torch.get_num_threads(), -(-length // BLOCK))
    if threads <= 1:
        return [function(start) for start in starts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, starts))
