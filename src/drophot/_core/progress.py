"""A progress bar, for those who ask for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


def import_tqdm() -> Any:
    """Find tqdm.

    Returns:
        Its bar.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError('Progress comes from tqdm: pip install "drophot[progress]"') from error
    return tqdm


@contextmanager
def epoch_bar(
    progress: bool, total: int, name: str, on_epoch: Callable[[int], object] | None = None
) -> Iterator[Callable[[int], object]]:
    """Show how many epochs of a training are done.

    Args:
        progress: Whether to show it at all.
        total: All epochs.
        name: What is being done.
        on_epoch: Called with the epoch's number first, after each epoch.

    Yields:
        To be called with the epoch's number after each epoch.
    """
    with (
        import_tqdm()(total=total, desc=name, unit="epoch", leave=False)
        if progress
        else nullcontext() as shown
    ):

        def after(epoch: int) -> None:
            if on_epoch is not None:
                on_epoch(epoch)
            if shown is not None:
                shown.update()

        yield after
