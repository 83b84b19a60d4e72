"""Tests of Triton kernels, which `test_interpreted.py` runs by Triton's interpreter."""

import importlib.util
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch comes without Triton here"
)


class _Nothing:
    """What a launch restores at its end."""

    def restore(self) -> None: ...


def patch_language_once() -> None:
    """The interpreter replaces the functions of `triton.language` once and not at every call.

    At each call of a device function it looks at all names of the language, which takes half of
    the time. Here the language stays replaced until the process ends.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch, patched = interpreter._patch_lang, set[int]()

    def patch_once(function: Any) -> _Nothing:
        module = id(function.__globals__)  # which says by what names the function knows it
        if module not in patched:
            patch(function)
            patched.add(module)
        return _Nothing()

    interpreter._patch_lang = patch_once
