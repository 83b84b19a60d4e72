"""Errors that are unrelated to the code that raised them: signal handlers, exhausted memory."""

from __future__ import annotations

import signal
from traceback import walk_tb
from types import CodeType

from drophot._core.memory import is_out_of_memory
from drophot._core.signatures import without_partials


def must_propagate(error: BaseException) -> bool:
    """Whether a caught error must be raised again because it is not about the code that was run.

    True if memory was exhausted, or if a signal handler raised the error. A handler, such as a time
    limit by `signal.alarm`, can run between any two lines, and its error seems to come from there.
    """
    if is_out_of_memory(error):
        return True
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    return any(frame.f_code in handlers for frame, _ in walk_tb(error.__traceback__))


def _code_of(handler: object) -> CodeType | None:
    """The code of a function, a method, a partial or a callable object."""
    handler = without_partials(handler)
    function = getattr(handler, "__func__", handler)
    if not hasattr(function, "__code__") and callable(handler):
        function = type(handler).__call__
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None
