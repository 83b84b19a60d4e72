"""The gallery's examples, each run by itself, with warnings as errors."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.processes import run_script

pytestmark = pytest.mark.slow
GALLERY = sorted((ROOT / "docs" / "gallery").glob("*.py"))


def test_the_gallery_is_there() -> None:
    assert len(GALLERY) >= 5
    assert all(path.name.startswith("plot_") for path in GALLERY), "the docs run no others"


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_an_example_ends_in_asserts(path: Path) -> None:
    assert isinstance(ast.parse(path.read_text()).body[-1], ast.Assert)


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("matplotlib", "scipy", "sklearn"):
        pytest.importorskip(extra)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run_script(path, folder=tmp_path, filters=["error", "ignore:FigureCanvasAgg"])
    assert not list(tmp_path.iterdir()), "nothing is left behind"
