"""How much memory there is, how much a training step takes, and how to get more out of it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GLIBC = platform.libc_ver()[0] == "glibc"
_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # numbers of mallopt's options, from malloc.h
_MB = 1 << 20


def available(device: torch.device | str) -> float:
    """The memory that can still be had.

    Args:
        device: A GPU, or the CPU.

    Returns:
        Bytes; infinity where nobody says.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(
            next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        )
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def needed(model: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    """The memory of a training step: weights, gradients, two averages, and what backward needs.

    Args:
        model: The model. As in training, BatchNorm's averages move on.
        inputs: A batch, on the model's device.
        targets: Its targets.

    Returns:
        Bytes, without what a library takes for itself.
    """
    weights = sum(tensor.nbytes for tensor in model.parameters())
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(inputs), targets)
    del loss  # so long the addresses stay those of different tensors
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return 4 * weights + sum(kept.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, of the CPU or of a GPU.

    Args:
        error: What was raised.

    Returns:
        Whether it does.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def held() -> Iterator[None]:
    """Let the C library keep the memory that tensors give back, for those of the next step.

    By default glibc returns it to the system at once, and each step of a small convolutional
    network pays again for a thousand pages: up to a third of its time. Elsewhere this does nothing.

    Yields:
        Nothing. What was held is given back afterwards.
    """
    if not _GLIBC:
        yield
        return
    library = ctypes.CDLL(None)

    def set_limits(mmap: int, trim: int, pad: int) -> None:
        if not library.mallopt(_MMAP, mmap):
            library.mallopt(_MMAP, 32 * _MB)  # the most that older versions take
        library.mallopt(_TRIM, trim)
        library.mallopt(_TOP_PAD, pad)

    set_limits(1024 * _MB, 1024 * _MB, 64 * _MB)
    try:
        yield
    finally:
        # What glibc's own limits grow to; below these it would return memory ever more often.
        set_limits(32 * _MB, 64 * _MB, _MB // 8)
        library.malloc_trim(0)
