"""Tests of Triton kernels, which `test_interpreted.py` runs by Triton's interpreter."""

import importlib.util

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch comes without Triton here"
)
