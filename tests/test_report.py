import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_records import one

from drophot.report import plot_steps, table

RUNS = [
    one(seed=0, trained_accuracy=0.90),
    one(seed=1, trained_accuracy=0.94),
    one(mode="random", keep_ratio=1.0, kept=60_000),
]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_a_row_for_each_group_of_seeds() -> None:
    head, rule, *rows = cells(table(RUNS))
    assert head == [
        "model",
        "kept",
        "share",
        "samples",
        "removed",
        "n",
        "before pruning",
        "after pruning",
        "after fine-tuning",
        "zeros held",
    ]
    assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rule)
    spread = ["92.00 ± 2.83", "50.00 ± 0.00", "95.00 ± 0.00"]
    assert rows == [
        ["lenet", "high", "10%", "6,000", "80%", "2", *spread, "80.00"],
        ["lenet", "everything", "100%", "60,000", "80%", "1", "90.00", "50.00", "95.00", "80.00"],
    ]


@pytest.mark.parametrize("change", [{"mode": "low"}, {"keep_ratio": 0.2}, {"prune_ratio": 0.4}])
def test_what_differs_in_more_than_the_seed_is_not_averaged(change: dict[str, Any]) -> None:
    assert len(cells(table([one(), one(seed=1, **change)]))) == 4
    assert len(cells(table([one(), one(seed=1)]))) == 3


def test_columns_line_up() -> None:
    lines = table(RUNS).splitlines()
    assert len({len(line) for line in lines}) == 1
    bars = {tuple(i for i, c in enumerate(line) if c == "|") for line in lines}
    assert len(bars) == 1


def test_a_figure_of_the_three_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    axes = plot_steps(RUNS)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "before pruning",
        "after pruning",
        "after fine-tuning",
    ]
    assert [list(bars[0].get_ydata()) for bars in axes.containers] == [  # type: ignore[index]
        pytest.approx([92, 50, 95]),
        pytest.approx([90, 50, 95]),
    ]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "lenet: high, 10% kept, 2 seeds",
        "lenet: everything",
    ]
    axes.get_figure().savefig(tmp_path / "figure.png")  # type: ignore[union-attr]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_figure_goes_where_it_is_told() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    left, right = figure.subplots(1, 2)
    assert plot_steps([replace(RUNS[0])], ax=right) is right
    assert not left.has_data()


def test_no_records_are_an_error() -> None:
    for draw in (table, plot_steps):
        with pytest.raises(ValueError, match="at least one record. Found none"):
            draw([])


def test_a_missing_matplotlib_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "drophot\[plot\]"'):
        plot_steps(RUNS)
