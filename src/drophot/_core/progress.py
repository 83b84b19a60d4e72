"""Optional progress bars by tqdm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


def import_tqdm() -> Any:
    """Tqdm's bar, or an ImportError that says how to install it."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            'A progress bar requires tqdm: pip install "drophot[progress]"'
        ) from error
    return tqdm


@contextmanager
def epoch_bar(
    progress: bool, total: int, name: str, on_epoch: Callable[[int], object] | None = None
) -> Iterator[Callable[[int], object]]:
    """Show a bar of `total` epochs if `progress` is true.

    Yields a function to be called with the epoch's number after each epoch. It calls `on_epoch`
    first.
    """
    with (
        import_tqdm()(total=total, desc=name, unit="epoch", leave=False)
        if progress
        else nullcontext() as bar
    ):

        def after_epoch(epoch: int) -> None:
            if on_epoch is not None:
                on_epoch(epoch)
            if bar is not None:
                bar.update()

        yield after_epoch
