"""Operations on a GPU that wait for it, refused."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def refuse_waiting(refused: bool) -> None:
    """Let operations that wait for the GPU raise an error, or work again."""
    with warnings.catch_warnings():
        # Torch says once per process that the mode is a prototype.
        warnings.filterwarnings("ignore", ".*ynchronization debug mode")
        torch.cuda.set_sync_debug_mode("error" if refused else "default")


@contextmanager
def waiting_refused() -> Iterator[None]:
    try:
        refuse_waiting(True)
        yield
    finally:
        refuse_waiting(False)
