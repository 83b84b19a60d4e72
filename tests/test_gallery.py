"""The gallery's examples, each in a folder of its own, with warnings as errors."""

import ast
import runpy
from pathlib import Path

import pytest
from conftest import ROOT

GALLERY = sorted((ROOT / "docs" / "gallery").glob("*.py"))


def test_the_gallery_is_there() -> None:
    assert len(GALLERY) >= 5
    assert all(path.name.startswith("plot_") for path in GALLERY), "the docs run no others"


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_an_example_ends_in_asserts(path: Path) -> None:
    assert isinstance(ast.parse(path.read_text()).body[-1], ast.Assert)


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg")
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("matplotlib", "scipy", "sklearn"):
        pytest.importorskip(extra)
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    plt.close("all")
    assert not list(tmp_path.iterdir()), "nothing is left behind"
