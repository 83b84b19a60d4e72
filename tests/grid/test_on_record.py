"""`Grid.run(on_record=...)`: called for each new record, in the process of the grid."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import get_ident
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.runs import drop_hot

from drophot import Grid, Record
from drophot.prune.importances import l1

pytestmark = pytest.mark.filterwarnings("ignore:.*leave no sample of classes")


def grid(**changes: Any) -> Grid:
    pipeline = drop_hot(score_epochs=1, train_epochs=1, finetune_epochs=1)
    lists: dict[str, Any] = {"data_ratios": [0.5], "modes": ["random"], "prune_ratios": [0.6]}
    return Grid(pipeline, **(lists | {"seeds": [0, 3]} | changes))


def ordered(records: list[Record]) -> list[tuple[int, str, float]]:
    return sorted((record.seed, record.mode, record.prune_ratio) for record in records)


@pytest.mark.parametrize("threads", [0, 2])
def test_each_record_is_passed_once_when_it_is_in_the_store(threads: int, tmp_path: Path) -> None:
    seen: list[Record] = []

    def take(record: Record) -> None:
        assert get_ident() == here
        last = (tmp_path / "records.jsonl").read_text().splitlines()[-1]
        assert record.fingerprint in last
        torch.rand(7)  # does not change what follows
        seen.append(record)

    here = get_ident()
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            found = grid().run(tmp_path, pool, on_record=take)
    else:
        found = grid().run(tmp_path, on_record=take)
    assert len(found) == 6
    assert ordered(seen) == ordered(found)
    assert all(record in found for record in seen)
    if not threads:
        assert found == grid().run(tmp_path / "plain")


def test_only_new_records_of_a_store_are_passed(tmp_path: Path) -> None:
    seen: list[Record] = []
    grid(seeds=[0]).run(tmp_path)
    grid().run(tmp_path, on_record=seen.append)
    assert [record.seed for record in seen] == [3, 3, 3]
    grid().run(tmp_path, on_record=seen.append)
    assert len(seen) == 3


def test_an_error_ends_the_run_and_the_next_call_resumes(tmp_path: Path) -> None:
    def fail(record: Record) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise ConnectionError("no server")

    seen: list[Record] = []
    with pytest.raises(ConnectionError, match="no server") as raised:
        grid().run(tmp_path, on_record=fail)
    assert str(tmp_path) in "".join(raised.value.__notes__)
    assert len(seen) == 2
    found = grid().run(tmp_path, on_record=seen.append)
    assert ordered(seen) == ordered(found)


def test_what_cannot_be_called_is_refused_before_any_work(tmp_path: Path) -> None:
    wrong: list[tuple[Any, str]] = [
        ([], r"\[\]"),
        (lambda: 3, "lambda"),
        (lambda record, store: None, "lambda.*store"),
    ]
    for value, found in wrong:
        with pytest.raises(TypeError, match=f"`on_record`.*{found}"):
            grid().run(tmp_path / "results", on_record=value)
    assert not list(tmp_path.iterdir())


def test_the_names_of_the_recipe_differ_with_all_controls(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "other_tools.md").read_text()
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(re.findall(r"```python\n(.*?)```", text, re.S)[0], names)
    controls = ["equal_steps", "reinitialize", "repair", "gradual"]
    records = grid(controls=controls, importances=[None, l1], seeds=[0]).run(tmp_path)
    found = {names["name_of"](record) for record in records}
    assert len(found) == len(records) > 10
    settings = [names["settings_of"](record) for record in records]
    assert {value["equal_steps"] for value in settings} == {False, True}
    assert {value["schedule"] for value in settings} == {"one-shot", "gradual"}
    assert {value["importance"] for value in settings} == {"magnitude", "l1"}
    assert {value["repaired"] for value in settings} == {False, True}
    assert len({str(value) for value in settings}) == len(records)


def test_the_recipe_for_tensorboard_logs_each_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="`tensorboard` is not installed",
    )
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "other_tools.md").read_text()
    names: dict[str, Any] = {"__name__": "recipe"}
    for block in re.findall(r"```python\n(.*?)```", text, re.S)[:2]:
        exec(block, names)
    assert len(names["records"]) == 4
    for record in names["records"]:
        logged = events.EventAccumulator(f"runs/{names['name_of'](record)}")
        logged.Reload()
        curve = [event.value for event in logged.Scalars("test accuracy/fine-tuning")]
        wanted = [record.pruned_accuracy, *record.finetune_curve]
        assert curve == pytest.approx(wanted, abs=1e-6)
