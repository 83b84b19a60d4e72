"""The handle that ends a hold."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from drophot.prune.holding import Hold


class Handle(RemovableHandle):
    def __init__(self, hold: Hold) -> None:
        super().__init__(OrderedDict())
        self._hold = hold

    def remove(self) -> None:
        self._hold.end()

    def __enter__(self) -> Handle:
        if not self._hold._active:
            raise RuntimeError(
                "The hold has ended, so nothing would be held in this `with` block. Call `hold` "
                "again for each block."
            )
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self._hold.end(check=kind is None)

    def __getstate__(self) -> Hold:  # type: ignore[override]
        return self._hold

    def __setstate__(self, state: Hold) -> None:
        self.__init__(state)
