"""The files `interpreted_*.py`, which test Triton kernels without a GPU."""

from pathlib import Path

import pytest
from conftest import ROOT, start
from helpers.interpreter import needs_triton


@pytest.mark.slow
@needs_triton
def test_kernels_by_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process of their own, since Triton chooses its interpreter when it is imported."""
    pytest.importorskip("hypothesis")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    scripts = sorted(Path(__file__).parent.glob("*/interpreted_*.py"))
    assert len(scripts) == 5
    options = ("-q", "--show-capture=no", "-p", "no:cacheprovider", f"--rootdir={ROOT}")
    result = start("-m", "pytest", *options, *scripts, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
