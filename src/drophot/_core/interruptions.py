"""Errors that are not about the code that was running: an alarm of the user's, or no memory."""

from __future__ import annotations

import signal
from functools import partial
from traceback import walk_tb
from types import CodeType

from drophot._core.memory import is_out_of_memory


def must_propagate(error: BaseException) -> bool:
    """Whether an error says nothing about the code that it came out of.

    A handler of a signal, such as a time limit by `signal.alarm`, runs between any two lines, and
    what it raises seems to come from there.

    Args:
        error: What was raised, and caught.

    Returns:
        Whether memory ran out, or a signal's handler raised it.
    """
    if is_out_of_memory(error):
        return True
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    return any(frame.f_code in handlers for frame, _ in walk_tb(error.__traceback__))


def _code_of(handler: object) -> CodeType | None:
    """The code of a function, a method, a partial or an object that is called."""
    while isinstance(handler, partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)
    if not hasattr(function, "__code__") and callable(handler):
        function = type(handler).__call__
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None
