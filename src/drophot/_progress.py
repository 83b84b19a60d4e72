"""A progress bar, for those who ask for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def check() -> Any:
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
def bar(progress: bool, total: int, name: str) -> Iterator[Callable[[], object]]:
    """Show how many epochs of a training are done.

    Args:
        progress: Whether to show it at all.
        total: All epochs.
        name: What is being done.

    Yields:
        To be called after each epoch.
    """
    if not progress:
        yield lambda: None
        return
    with check()(total=total, desc=name, unit="epoch", leave=False) as shown:
        yield shown.update
