"""Tests of Triton kernels by its interpreter, in a process of their own."""

import importlib.util
from pathlib import Path

import pytest
from conftest import ROOT, start

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch comes without Triton here"
)


def check_by_the_interpreter(script: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a file of tests with the interpreter, which Triton chooses when it is imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = ("-q", "--show-capture=no", "-p", "no:cacheprovider", f"--rootdir={ROOT}")
    result = start("-m", "pytest", *options, script, folder=folder)
    assert result.returncode == 0, result.stdout + result.stderr
