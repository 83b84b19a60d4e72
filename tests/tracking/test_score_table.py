"""The scores of a tracker as columns and as a CSV file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drophot import DynamicsTracker, ForgettingTracker

IDS = ["a.png", 'b, "c".png', "ü/d.png", "7"]


def presented(tracker: ForgettingTracker) -> ForgettingTracker:
    """All samples but the last."""
    targets = torch.tensor([0, 1, 2])
    for shift in (0, 1):
        tracker.update(torch.arange(3), torch.eye(3).roll(shift, 0), targets)
    return tracker


@pytest.mark.parametrize("kind", [ForgettingTracker, DynamicsTracker])
def test_a_csv_file_holds_the_columns_and_the_ids(
    kind: type[ForgettingTracker], tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    tracker = presented(kind(4))
    columns = tracker.columns()
    assert columns["presentations"].tolist() == [2, 2, 2, 0]
    assert columns["forgetting"].tolist() == [1, 1, 1, 0]
    assert columns["target"].tolist() == [0, 1, 2, -1]
    tracker.to_csv(tmp_path / "scores.csv", ids=IDS)
    found = pandas.read_csv(tmp_path / "scores.csv", dtype={"id": str})
    assert found.pop("id").tolist() == IDS
    assert list(found) == list(columns)
    for name, column in columns.items():
        values = found[name].to_numpy().astype(column.dtype)
        np.testing.assert_array_equal(values, column)  # float32 to the bit, and NaN
    tracker.to_csv(str(tmp_path / "plain.csv"))
    assert list(pandas.read_csv(tmp_path / "plain.csv")) == list(columns)


def test_a_table_takes_the_ids_as_its_index() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = pandas.DataFrame(presented(DynamicsTracker(4)).columns(), index=IDS)
    assert table.loc["a.png", "presentations"] == 2


def test_ids_of_another_length_are_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`ids`.*4.*3"):
        presented(ForgettingTracker(4)).to_csv(tmp_path / "scores.csv", ids=IDS[:3])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["series", "tensor", "generator", "keys"])
def test_ids_are_taken_by_position(kind: str, tmp_path: Path) -> None:
    ids: Any = torch.tensor([30, 10, 20, 0])
    if kind == "series":  # whose labels are those of the table that it was taken from
        pandas = pytest.importorskip("pandas", reason="pandas is not installed")
        ids = pandas.Series(ids.tolist(), index=[3, 2, 1, 0])
    elif kind == "generator":
        ids = (str(number) for number in ids.tolist())
    elif kind == "keys":
        ids = dict.fromkeys(ids.tolist()).keys()
    presented(ForgettingTracker(4)).to_csv(tmp_path / "scores.csv", ids=ids)
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", "30", "10", "20", "0"]


@pytest.mark.parametrize(
    ("ids", "kind", "found"),
    [
        ("abcd", TypeError, "'abcd'"),
        (b"abcd", TypeError, "b'abcd'"),
        (set(IDS), TypeError, "set"),
        (frozenset(IDS), TypeError, "set"),
        (["a", "b", "a", "c"], ValueError, "'a'.*0.*2"),
        ([1, "b", "1", "c"], ValueError, "'1'.*0.*2"),
        (["a", None, "b", "c"], ValueError, "None.*1"),
        (["a", "b", float("nan"), "c"], ValueError, "nan.*2"),
    ],
)
def test_ids_that_do_not_name_each_sample_are_errors(
    ids: Any, kind: type[Exception], found: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=rf"`ids`.*{found}"):
        presented(ForgettingTracker(4)).to_csv(tmp_path / "scores.csv", ids=ids)
    assert not list(tmp_path.iterdir())
