"""Tables, pages, figures and statistics pool seeds and nothing else."""

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.utils.data import TensorDataset

from drophot import DropHot, Grid, Record, records
from drophot.models import fcnet
from drophot.records import fingerprint
from drophot.report import differences, html, plot_curves, plot_ratios, plot_steps, table
from drophot.stats import compare

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
pytest.importorskip("scipy", reason="the extra `stats` is not installed")

INPUTS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, 0] > 0).long()
TRAIN, TEST = TensorDataset(INPUTS[:40], TARGETS[:40]), TensorDataset(INPUTS[40:], TARGETS[40:])


def drop_hot(model: Any = None, train: Any = TRAIN, **changes: Any) -> DropHot:
    asked: dict[str, Any] = {"data_ratio": 0.5, "mode": "high", "prune_ratio": 0.5, "device": "cpu"}
    asked |= {"score_epochs": 1, "train_epochs": 1, "finetune_epochs": 1, "batch_size": 8}
    model = model or partial(fcnet, in_features=4, hidden=4, num_classes=2)
    return DropHot(model, train, TEST, **(asked | changes))


def two_seeds(run: DropHot) -> list[Record]:
    return [run.replace(seed=seed).run() for seed in (0, 1)]


@pytest.fixture(scope="module")
def base() -> list[Record]:
    return two_seeds(drop_hot())


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


CHANGES: dict[str, dict[str, Any]] = {
    "score_epochs": {"score_epochs": 2},
    "train_epochs": {"train_epochs": 2},
    "finetune_epochs": {"finetune_epochs": 2},
    "batch_size": {"batch_size": 16},
    "forgetting": {"forgetting": "toneva"},
    "optimizer": {"optimizer": partial(SGD, lr=0.1)},
    "network": {"model": partial(fcnet, in_features=4, hidden=6, num_classes=2)},
    "train_set": {"train": TensorDataset(INPUTS[:30], TARGETS[:30])},
    "scope": {"scope": "global"},
    "protocol": {"protocol": "released"},
    "steps": {"equal_steps": True},
    "removed are": {"structured": True},
    "schedule": {"schedule": "gradual", "prunings": 2, "finetune_epochs": 2},
    "weights": {"reinitialize": True},
    "start": {"rewind": True},
}


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heading", CHANGES)
def test_runs_that_differ_in_a_setting_are_rows_with_a_column_that_says_so(
    heading: str, base: list[Record], tmp_path: Path
) -> None:
    runs = base + two_seeds(drop_hot(**CHANGES[heading]))
    head, _, *rows = rows_of(table(runs))
    assert [row[head.index("n")] for row in rows] == ["2", "2"]
    column = next(i for i, name in enumerate(head) if heading in name.split(", "))
    assert rows[0][column] != rows[1][column]
    lines = list(csv.DictReader(io.StringIO(table(runs, "csv"))))
    assert [line["n"] for line in lines] == ["2", "2"]
    assert len({line["cell"] for line in lines}) == 2
    for plot in (plot_steps, plot_curves):
        assert len(set(labels(plot(runs)))) == 2
    with pytest.raises(ValueError, match="`records`"):
        plot_ratios(runs)
    if heading in ("score_epochs", "network"):
        page = html(runs, tmp_path / "page.html").read_text(encoding="utf-8")
        assert "4 runs." in page
        assert page.count("<h3>") >= 2
    # The order of the records changes no row.
    assert sorted(table(runs[::-1]).splitlines()) == sorted(table(runs).splitlines())


def test_seeds_of_one_configuration_are_one_row_without_more_columns(base: list[Record]) -> None:
    head, _, *rows = rows_of(table(base))
    assert head[:3] == ["model", "kept", "share"]
    assert len(rows) == 1
    assert len({record.cell for record in base}) == 1
    assert len({record.fingerprint for record in base}) == 2


def test_a_record_carries_what_was_asked_for(base: list[Record], tmp_path: Path) -> None:
    first = base[0]
    asked = drop_hot().configuration
    assert fingerprint({**first.settings, "seed": 0}) == first.fingerprint == fingerprint(asked)
    assert "seed" not in first.settings
    assert first.cell == fingerprint(first.settings)
    assert first.test_samples == len(TEST)
    records.write(base, tmp_path / "records.jsonl")
    again = records.read(tmp_path / "records.jsonl")
    assert again == base
    assert [r.settings for r in again] == [r.settings for r in base]


def test_differences_are_taken_within_a_configuration(base: list[Record]) -> None:
    slow = partial(SGD, lr=1e-6)
    runs = [*base, *two_seeds(drop_hot(data_ratio=1.0)), *two_seeds(drop_hot(mode="random"))]
    runs += two_seeds(drop_hot(optimizer=slow)) + two_seeds(
        drop_hot(data_ratio=1.0, optimizer=slow)
    )
    assert [(row.mode, row.n) for row in compare(runs)] == [("high", 2), ("random", 2), ("high", 2)]
    head, _, *rows = rows_of(differences(runs))
    assert "optimizer" in head
    assert [row[head.index("n")] for row in rows] == ["2", "2"]


def test_a_baseline_is_one_whatever_mode_it_was_asked_for_with() -> None:
    runs = [drop_hot(mode=mode, data_ratio=1.0).run() for mode in ("high", "low", "random")]
    (row,) = rows_of(table(runs))[2:]
    assert row[1:6] == ["baseline", "100%", "40", "50%", "1"]


def settled(record: Record, **settings: Any) -> Record:
    return replace(record, settings=settings, cell=fingerprint(settings))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"data": "0123456789abcdef" * 2}, {"data": "fedcba9876543210" * 2}),
        (
            {"code": {"net": "a" * 64, "fit": "b" * 64}},
            {"code": {"net": "a" * 64, "fit": "c" * 64}},
        ),
        ({"optimizer": {"type": "SGD", "lr": 0.1}}, {"optimizer": {"type": "SGD", "lr": 0.01}}),
        ({"ambient": {"autocast": None}}, {"ambient": {"autocast": "bfloat16"}}),
        ({"layers": [[1, "a" * 99]]}, {"layers": [[2, "a" * 99]]}),
        ({"words": "x" * 99}, {"words": "x" * 98 + "y"}),
        ({"a": 1, "b": None}, {"a": 1}),
        ({"flag": True}, {"flag": False}),
        ({"number": 1}, {"number": 1.5}),
        ({}, {"batch_size": 64}),
        ({"name": "a.b.C(lr=0.1)"}, {"name": "d.e.C(lr=0.1)"}),
    ],
    ids=str,
)
def test_whatever_a_setting_is_rows_can_be_told_apart_and_read(
    one: dict[str, Any], other: dict[str, Any], base: list[Record]
) -> None:
    runs = [settled(r, **settings) for settings in (one, other) for r in base]
    for text in (table(runs), table(runs, "text")):
        first, second = text.splitlines()[2:]
        assert first != second
        assert len(first) < 250
    assert len(set(labels(plot_steps(runs)))) == 2
    assert len(list(csv.DictReader(io.StringIO(table(runs, "csv"))))) == 2


def test_long_settings_that_go_together_share_a_column(base: list[Record]) -> None:
    runs = [settled(base[0], lr=n, data=["x" * 99, n], code=["y" * 99, n]) for n in (1, 2)]
    head, _, *rows = rows_of(table(runs))
    assert head[1:3] == ["lr", "data, code"]
    assert [row[1] for row in rows] == ["1", "2"]
    assert all(re.fullmatch("[0-9a-f]{8}", row[2]) for row in rows)


def test_old_records_are_told_apart_by_what_they_show(base: list[Record]) -> None:
    old = [replace(r, settings={}, cell="", test_samples=0) for r in base]
    assert len(rows_of(table(old))) == 3
    longer = [replace(r, finetune_curve=(0.5, *r.finetune_curve)) for r in old]
    head, _, *rows = rows_of(table(old + longer))
    assert [row[head.index("finetune_epochs")] for row in rows] == ["1", "2"]
    assert len(rows_of(table(old + base))) == 4


DOORS: list[Callable[[Any], Any]] = [
    table,
    partial(table, format="csv"),
    compare,
    differences,
    plot_steps,
    plot_curves,
    plot_ratios,
]


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("door", range(len(DOORS) + 1))
def test_a_seed_twice_in_a_cell_is_one_run_or_an_error(
    door: int, base: list[Record], tmp_path: Path
) -> None:
    def page(runs: list[Record]) -> Any:
        return html(runs, tmp_path / "page.html").read_text(encoding="utf-8")

    call = [*DOORS, page][door]
    everything = [replace(r, mode="baseline", keep_ratio=1.0) for r in base]
    runs = [*everything, *base]
    again = [replace(r, seconds={"train": 1.0}) for r in runs]
    found, expected = call(runs + again), call(runs)
    if isinstance(expected, (str, list)):
        assert found == expected
    with pytest.raises(ValueError, match=f"seed 1 .*high.*{base[1].cell}"):
        call([*runs, replace(base[1], finetuned_accuracy=0.123, device="cuda: X")])


@pytest.mark.parametrize("door", [*DOORS, lambda runs: html(runs, "page.html")])
def test_what_is_no_records_is_a_sentence(
    door: Callable[[Any], Any], base: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="at least one record"):
        door([])
    for wrong in (base[0], ["a.jsonl"], [base[0], None], 3, [1.0]):
        with pytest.raises(TypeError, match=r"`(records|source)`"):
            door(wrong)
    if door in DOORS:
        for path in ("results/records.jsonl", Path("results")):
            with pytest.raises(TypeError, match=r"`records`.*results.*drophot.records.read"):
                door(path)
    assert not (tmp_path / "page.html").exists()


def test_swapped_arguments_of_the_page_are_named(base: list[Record]) -> None:
    with pytest.raises(TypeError, match=r"`path`.*html\(records"):
        html("r.html", base)  # type: ignore[arg-type]


# --- numbers that are not there ------------------------------------------------------------------


def lost(runs: list[Record], seeds: tuple[int, ...] = (0, 1)) -> list[Record]:
    """The coresets of some seeds diverged."""
    nan = dict.fromkeys(("trained_accuracy", "pruned_accuracy", "finetuned_accuracy"), math.nan)
    return [
        replace(r, **nan, finetune_curve=(math.nan,) * len(r.finetune_curve))  # type: ignore[arg-type]
        if r.seed in seeds and r.mode == "high"
        else r
        for r in runs
    ]


def whole(base: list[Record], seeds: int = 2) -> list[Record]:
    found = []
    for mode, keep in (("baseline", 1.0), ("high", 0.1), ("high", 0.5), ("random", 0.1)):
        for prune in (0.0, 0.5):
            for seed in range(seeds):
                end = 0.9 + 0.01 * math.sin(7 * seed + 3 * keep + prune)
                found.append(
                    replace(
                        base[0],
                        **{"mode": mode, "keep_ratio": keep, "prune_ratio": prune, "seed": seed},
                        trained_accuracy=end,
                        finetuned_accuracy=end,
                        finetune_curve=(end,),
                        settings={},
                        cell="",
                    )
                )
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("seeds", "gone"), [(1, (0,)), (3, (0,)), (3, (0, 1)), (3, (0, 1, 2))], ids=str
)
def test_accuracies_that_are_nan_are_shown_as_missing_everywhere(
    seeds: int, gone: tuple[int, ...], base: list[Record], tmp_path: Path
) -> None:
    runs = lost(whole(base, seeds), gone)
    for text in (
        table(runs),
        differences(runs),
        table(runs, "csv"),
        differences(runs, format="csv"),
    ):
        assert "nan" not in text
    left = seeds - len([seed for seed in gone if seed < seeds])
    head, _, *rows = rows_of(table(runs))
    high = [row[head.index("after fine-tuning")] for row in rows if row[1] == "high"]
    for cell in high:
        assert (cell == "–") == (left == 0)
        assert (f"(n = {left})" in cell) == (0 < left < seeds)
    assert all("–" not in " ".join(row) for row in rows if row[1] != "high")
    for line in csv.DictReader(io.StringIO(table(runs, "csv"))):
        assert line["n"] == str(seeds)
        assert line["finetuned_accuracy_n"] == str(left if line["mode"] == "high" else seeds)
    assert {row.n for row in compare(runs) if row.mode == "high"} == {left}
    for keep in (0.1, 0.5):
        some = [r for r in runs if r.keep_ratio in (keep, 1.0)]
        plot_steps(some).figure.canvas.draw()
        plot_curves(some).figure.canvas.draw()
        plot_ratios(some, x="prune_ratio").figure.canvas.draw()
    plot_ratios([r for r in runs if r.prune_ratio]).figure.canvas.draw()
    page = html(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower()


@pytest.mark.filterwarnings("error")
def test_a_page_on_which_every_run_diverged(base: list[Record], tmp_path: Path) -> None:
    runs = lost([replace(r, mode="high") for r in whole(base) if r.mode == "random"])
    page = html(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "every run diverged" in page


def test_a_network_of_ones_own_has_no_accuracy_before_pruning() -> None:
    found = []
    for seed in (0, 1):
        run = drop_hot(mode="random", seed=seed)
        run.select()
        run.model = fcnet(in_features=4, hidden=4, num_classes=2)
        run.prune()
        found.append(run.finetune())
    head, _, row = rows_of(table(found))
    assert row[head.index("before pruning")] == "–"
    assert "nan" not in table(found, "csv")


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("modes", [18, 19])
def test_any_number_of_modes(modes: int, base: list[Record], tmp_path: Path) -> None:
    runs = [
        replace(r, mode=f"mode{number}" if number else "baseline", settings={}, cell="")
        for number in range(modes + 1)
        for r in base
    ]
    page = html(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("can be told apart" in page) == (modes > 18)
    assert f"mode{modes}" in page
    assert len(rows_of(table(runs))) == modes + 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["_make_net", "cost$5$", "_", r"x\$y"])
def test_any_name_is_shown_as_it_is(name: str, base: list[Record], tmp_path: Path) -> None:
    runs = [replace(r, model=name) for r in base]
    runs += [replace(r, mode=name, settings={}, cell="") for r in base]
    for plot in (plot_steps, plot_curves):
        axes = plot(runs)
        axes.figure.canvas.draw()
        assert len(labels(axes)) == 2
    axes = plot_ratios(runs[2:])
    axes.figure.canvas.draw()
    assert [label.strip() for label in labels(axes)] == [name.replace("$", r"\$")]
    assert name in html(runs, tmp_path / "page.html").read_text(encoding="utf-8")


# --- seconds -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("score_epochs", [1, 2])
def test_a_grid_counts_the_time_of_scoring(score_epochs: int, tmp_path: Path) -> None:
    run = drop_hot(score_epochs=score_epochs)
    grid = Grid(run, data_ratios=[0.5], modes=["high", "random"], prune_ratios=[0.5], seeds=[0])
    found = grid.run(tmp_path / "store")
    for record in found:
        if record.mode == "baseline":
            # With equal epochs it is the network of step 1.
            steps = ["score"] if score_epochs == 1 else ["select", "train"]
            assert list(record.seconds) == [*steps, "prune", "finetune"]
            continue
        alone = run.replace(mode=record.mode).run()
        assert record == alone
        assert list(record.seconds) == list(alone.seconds)
        assert record.settings == alone.settings
        assert record.cell == alone.cell
    scoring = {r.seconds["score"] for r in found if "score" in r.seconds}
    assert len(scoring) == 1
    assert min(scoring) > 0
    page = html(tmp_path / "store", tmp_path / "page.html").read_text(encoding="utf-8")
    part = re.sub("<[^>]*>", " ", page[page.index("<h2>Table 4: seconds") :]).split()
    times = {name: part[part.index(name) + 1] for name in ("score", "select", "train", "finetune")}
    trainings = "2" if score_epochs == 1 else "3"
    assert times == {"score": "1", "select": trainings, "train": trainings, "finetune": "4"}
