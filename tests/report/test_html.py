import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.record import one
from helpers.rows import cells, grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drophot import Record
from drophot.records import to_line, write
from drophot.report import differences, html, table
from drophot.report.svg_panels import Panels

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
pytest.importorskip("scipy", reason="the extra `stats` is not installed")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What is on a page, and that its tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.words = ""
        self.panels: list[str] = []
        self.legend: list[str] = []
        self.sections: dict[str, str] = {}
        self.heading = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "svg" and ("aria-hidden", "true") not in attrs:
            self.panels.append(dict(attrs)["aria-label"] or "")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "h2":
            self.heading = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open and "svg" not in self.open:
            return
        self.words += data
        if self.open[-1:] == ["span"]:
            self.legend.append(data)
        if "h2" in self.open:
            self.heading += data
        elif self.heading:
            self.sections[self.heading] = self.sections.get(self.heading, "") + data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def page(source: Any, folder: Path) -> Page:
    return Page(html(source, folder / "page.html").read_text(encoding="utf-8"))


def store(folder: Path, runs: list[Record], **grid_json: Any) -> Path:
    folder.mkdir()
    write(runs, folder / "records.jsonl")
    if grid_json:
        (folder / "grid.json").write_text(json.dumps(grid_json))
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    path = html(grid(), tmp_path_factory.mktemp("full") / "page.html")
    text = path.read_text(encoding="utf-8")
    return Page(text), text


@pytest.mark.slow
def test_nothing_outside_the_page_is_asked_for(full: tuple[Page, str]) -> None:
    found, text = full
    for tag, name, value in found.attributes:
        if name in ("src", "srcset", "href", "xlink:href", "data", "action"):
            assert value.startswith("#"), (tag, name, value)
        assert "url(" not in value or "url(#" in value
    assert "://" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img", "metadata"} & set(found.tags)


def test_parts_of_figures_have_names_of_their_own_and_are_found(full: tuple[Page, str]) -> None:
    found, text = full
    names = [value for _, name, value in found.attributes if name == "id"]
    assert max(Counter(names).values()) == 1
    used = re.findall(r'(?:url\(|href=")#([^")]+)', text)
    assert used
    assert set(used) <= set(names)


def test_every_figure_is_there_once(full: tuple[Page, str]) -> None:
    ratios = ["0% removed", "80% removed", "10% kept", "50% kept"]
    curves = [f"{k}% kept, {p}% removed" for k in (10, 50) for p in (0, 80)]
    assert full[0].panels == ratios + curves + ["80% removed"]
    assert full[0].tags["figure"] == 4
    names = ["low: least forgotten", "high: most forgotten", "random", "baseline: all data"]
    assert full[0].legend == 4 * names


def test_its_parts_come_in_order(full: tuple[Page, str]) -> None:
    assert list(full[0].sections) == [
        "Figure 1: accuracy by share of data and of weights",
        "Table 1: differences after fine-tuning",
        "Figure 2: accuracy over the epochs of fine-tuning",
        "Figure 3: accuracy before and after pruning",
        "Table 2: all accuracies",
        "Table 3: agreement of the coresets",
        "Table 4: seconds",
        "Table 5: settings that differ",
        "Table 6: configuration",
        "How to read this",
    ]
    summary = full[0].words.partition("Figure 1")[0]
    for fact in (
        "6,000 to 30,000 of 60,000",
        "2 epochs",
        "cpu",
        "torch 2",
        "42 runs. 14 cells, each with 3 seeds.",
    ):
        assert fact in summary
    assert "so far" not in summary
    for word in ("Holm", "best epoch is never picked", "Student"):
        assert word in full[0].sections["How to read this"]


def test_tables_hold_what_the_functions_give(full: tuple[Page, str]) -> None:
    def plain(rows: list[list[str]]) -> list[list[str]]:
        return [[" ".join(cell.replace("*", " *").split()) for cell in row] for row in rows]

    first, second, _ = full[0].tables
    head, _, *rows = cells(differences(grid()))
    assert plain(first) == plain([head, *rows])
    head, _, *rows = cells(table(grid()))
    assert plain(second)[0] == head
    assert sorted(plain(second)[1:]) == sorted(rows)
    assert [row[1] for row in second[1:3]] == ["baseline", "baseline"]


def test_shared_seconds_count_once(full: tuple[Page, str]) -> None:
    seconds = {row[0]: row[1:] for row in full[0].tables[2][1:]}
    trainings = {(r.seed, r.seconds["train"]) for r in grid()}
    finetunings = [r.seconds["finetune"] for r in grid()]
    total = sum(value for _, value in trainings)
    assert seconds["train"] == [str(len(trainings)), *_times(total, len(trainings))]
    assert seconds["finetune"] == ["42", *_times(sum(finetunings), 42)]
    assert seconds["all"][-1] == f"{total + sum(finetunings):,.1f}"


def _as_run_by_a_grid(seed: int, mode: str, **changes: Any) -> Record:
    plain = {"select": 1.0, "train": 2.0, "prune": 0.004, "finetune": 8.0}
    seconds = plain | ({"score": 100.0 + seed} if mode != "random" else {})
    return replace(one(mode=mode, seed=seed), seconds=seconds, **changes)


@pytest.mark.usefixtures("blank_figures")
def test_the_time_of_scoring_counts_once_for_each_seed(tmp_path: Path) -> None:
    runs = [_as_run_by_a_grid(s, m) for s in range(2) for m in ("low", "high", "random")]
    found = page(runs, tmp_path)
    (seconds,) = (t for t in found.tables if t[0][0] == "step")
    steps = [row[0] for row in seconds[1:]]
    assert steps == ["score", "select", "train", "prune", "finetune", "all"]
    assert seconds[1] == ["score", "2", "100.5", "201.0"]
    assert seconds[4][2] == "0.004", "a short step is not shown as 0.0"
    assert "no time of scoring" not in found.words
    given = [replace(r, seconds={"train": 2.0}) for r in runs if r.mode != "high"]
    assert "Runs of low have no time of scoring" in page(given, tmp_path).words


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(("seeds", "ends"), [(3, "lowest to the highest"), (5, "95 % intervals")])
def test_bands_of_few_seeds_are_their_range(seeds: int, ends: str, tmp_path: Path) -> None:
    found = page(grid(seeds=seeds, keeps=(0.1, 0.5), prunes=(0.8,)), tmp_path)
    for name in (
        "Figure 1: accuracy by share of data and of weights",
        "Figure 2: accuracy over the epochs of fine-tuning",
    ):
        assert ends in found.sections[name]


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (2, 2), (4, 4), (5, 5), (6, 3), (7, 4)])
def test_panels_fill_the_width_of_their_card(panels: int, columns: int, tmp_path: Path) -> None:
    shares = tuple(0.1 + 0.1 * number for number in range(panels))
    runs = [replace(r, finetune_curve=()) for r in grid(seeds=1, keeps=shares)]
    path = html(runs, tmp_path / "page.html")
    found = re.findall(r"--columns:(\d)", path.read_text(encoding="utf-8"))
    by_share = 1 if panels > 1 else 0  # against the share of data there are two panels
    assert int(found[by_share]) == columns


@pytest.mark.usefixtures("blank_figures")
def test_every_setting_that_differs_is_shown_in_full(tmp_path: Path) -> None:
    adam = {"type": "torch.optim.adam.Adam", "lr": 0.1, "betas": [0.9, 0.999], "long": "x" * 90}
    sgd = {"type": "torch.optim.sgd.SGD", "lr": 0.1, "momentum": 0.9, "long": "y" * 90}
    common = {"batch_size": 32, "network": {"call": "fcnet"}}
    runs = [
        replace(one(seed=seed), settings={**common, "optimizer": optimizer}, cell=name)
        for seed in range(2)
        for name, optimizer in (("a", adam), ("b", sgd))
    ]
    found = page(runs, tmp_path)
    (full,) = (t for t in found.tables if t[0][:2] == ["setting", "value"])
    rows = {(name, value): int(count) for name, value, _, count in full[1:]}
    assert rows == {
        ("optimizer.type", "torch.optim.adam.Adam"): 2,
        ("optimizer.type", "torch.optim.sgd.SGD"): 2,
        ("optimizer.betas", "[0.9, 0.999]"): 2,
        ("optimizer.betas", "–"): 2,
        ("optimizer.momentum", "–"): 2,
        ("optimizer.momentum", "0.9"): 2,
        ("optimizer.long", "x" * 90): 2,
        ("optimizer.long", "y" * 90): 2,
    }
    assert {row[2] for row in full[1:]} == {"momentum=0.9", "momentum=–"}
    (configuration,) = (t for t in found.tables if ["batch_size", "32"] in t)
    assert ["network.call", "fcnet"] in configuration
    assert not any(row[0].startswith("optimizer") for row in configuration)


def _times(total: float, count: int) -> list[str]:
    return [f"{total / count:,.1f}", f"{total:,.1f}"]


def test_a_page_is_the_same_again_and_in_any_order_of_records(
    full: tuple[Page, str], tmp_path: Path
) -> None:
    assert html(grid()[::-1], tmp_path / "page.html").read_text(encoding="utf-8") == full[1]


@pytest.mark.usefixtures("blank_figures")
def test_a_running_grid_with_half_a_line_and_a_line_twice(tmp_path: Path) -> None:
    runs = grid(seeds=2)
    folder = store(tmp_path / "store", runs, plan={"cells": 40}, configuration={"a": {"b": [1]}})
    again = replace(runs[0], trained_accuracy=0.123456)
    with (folder / "records.jsonl").open("ab") as file:
        file.write(to_line(again).encode() + b"\n")
        file.write(to_line(replace(runs[0], seed=7)).encode()[:-9])
    found = page(folder, tmp_path)
    assert "28 of 40 runs so far." in found.words
    assert "2 seeds" in found.words
    configuration = next(t for t in found.tables if t[0][0] == "a.b")
    assert configuration == [["a.b", "[1]"]]
    expected = cells(table([again, *runs[1:]]))[2:]
    assert any(row in expected for row in found.tables[1] if row[3] == "60,000")
    assert {row[4 + 1] for row in found.tables[1][1:]} == {"2"}
    rows = [[" ".join(cell.split()) for cell in row] for row in found.tables[1][1:]]
    assert sorted(rows) == sorted(expected)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_wherever_the_last_line_ends_the_others_count(cut: int, tmp_path: Path) -> None:
    folder = store(tmp_path / "store", [one()])
    with (folder / "records.jsonl").open("ab") as file:
        file.write(to_line(one(model="ü", seed=1)).encode()[:cut])
    assert "1 run." in page(folder, tmp_path).words


@pytest.mark.usefixtures("blank_figures")
def test_a_finished_or_larger_store_is_not_so_far(tmp_path: Path) -> None:
    folder = store(tmp_path / "store", grid(seeds=1), plan={"cells": 3})
    words = page(folder, tmp_path).words
    assert "14 runs." in words
    assert "so far" not in words


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`source`.*no records.jsonl"):
        html(tmp_path, tmp_path / "page.html")
    (tmp_path / "records.jsonl").write_text('{"half": ')
    with pytest.raises(ValueError, match="`source`.*at least one record"):
        html(str(tmp_path), tmp_path / "page.html")
    (tmp_path / "records.jsonl").write_text(to_line(one()) + "\nx\n")
    with pytest.raises(ValueError, match=r"records.jsonl.* line 2.*`line`"):
        html(tmp_path, tmp_path / "page.html")
    with pytest.raises(ValueError, match="`path`.*folder "):
        html([one()], tmp_path)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("blank_figures")
def test_one_seed(tmp_path: Path) -> None:
    found = page(grid(seeds=1), tmp_path)
    assert "There is only one seed, so there are no intervals." in found.words
    assert not any(
        "[" in cell or "±" in cell for rows in found.tables for row in rows for cell in row
    )
    assert found.tags["figure"] == 4
    assert "each with 1 seed." in found.words


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("runs", "words", "figures"),
    [
        (grid(modes=("baseline", "low")), "There is no random coreset to compare with.", 4),
        (grid(modes=("random", "low")), "There is no baseline to compare with.", 4),
        (grid(modes=("low", "high")), "Left out: there is nothing to compare.", 4),
        (grid(modes=("baseline",)), "Left out: there is nothing to compare.", 3),
        (grid(keeps=(0.1,), prunes=(0.8,)), "there is one data ratio and one prune ratio only.", 2),
        (grid(keeps=(0.1,)), "for each share of data kept", 3),
        (grid(prunes=(0.8,)), "for each share of weights removed", 3),
        (grid(prunes=(0.0,)), "0% removed", 3),
        ([one()], "There is no", 2),
    ],
)
def test_what_is_missing_is_left_out_and_named(
    runs: list[Record], words: str, figures: int, tmp_path: Path
) -> None:
    found = page(runs, tmp_path)
    if len(runs) > 1:
        assert words in found.words + "".join(found.panels)
    assert found.tags["figure"] == figures


@pytest.mark.usefixtures("blank_figures")
def test_epochs_that_cannot_be_drawn_are_left_out_and_named(tmp_path: Path) -> None:
    none = [replace(r, finetune_curve=()) for r in grid()]
    assert "Left out: there are no epochs of fine-tuning." in page(none, tmp_path).words
    mixed = [*grid(), one(seed=9, finetune_curve=(0.5,) * 3)]
    assert "finetune_epochs: 3" in page(mixed, tmp_path).words, "drawn apart"


@pytest.mark.usefixtures("blank_figures")
def test_cells_that_are_missing_leave_their_place_empty(tmp_path: Path) -> None:
    runs = [r for r in grid(modes=("low", "random")) if (r.keep_ratio, r.prune_ratio) != (0.1, 0.0)]
    found = page(runs, tmp_path)
    curves = [p for p in found.panels if "," in p]
    assert curves == ["10% kept, 80% removed", "50% kept, 0% removed", "50% kept, 80% removed"]
    assert "<div></div>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("blank_figures")
def test_controls_networks_and_protocols_are_drawn_apart(tmp_path: Path) -> None:
    small: dict[str, Any] = {"keeps": (0.1,), "prunes": (0.8,), "seeds": 2}
    runs = grid(**small)
    runs += grid(**small, equal_steps=True, modes=("low", "high", "random"))
    runs += grid(**small, reinitialized=True)
    found = page(runs, tmp_path)
    assert found.tags["h3"] == 2 * 3  # one reason for all three is said once
    assert "steps: equal, weights: trained" in found.words
    assert "began from other weights" in found.words
    # Each has its baseline.
    assert found.legend.count("baseline: all data") == found.tags["figure"] == 2 * 3
    assert page([*runs, one(model="fcnet")], tmp_path).tags["h3"] == 2 * 4


@pytest.mark.usefixtures("blank_figures")
def test_what_is_left_out_for_one_reason_is_said_once(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"finetune_curve": (), "prune_ratio": 0.0}
    runs = [replace(r, **plain) for r in grid(prunes=(0.0,))]
    runs += [replace(r, equal_steps=True) for r in runs if r.mode != "baseline"]
    found = page(runs, tmp_path)
    assert found.words.count("Left out: there are no epochs of fine-tuning.") == 1
    assert found.words.count("Left out: nothing was pruned and nothing fine-tuned.") == 1
    assert "; not pruned; not fine-tuned; 3 seeds." in found.words
    assert found.tags["h3"] == found.tags["figure"] == 2  # accuracy by share, each with its figure
    runs.append(replace(runs[-1], reinitialized=True, prune_ratio=0.5))
    found = page(runs, tmp_path)
    reason = "steps: fewer, weights: trained; steps: equal, weights: trainedLeft out: nothing"
    assert reason in found.words  # two of the three in one line


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("only", [{}, {"keeps": (0.1,)}, {"prunes": (0.8,)}])
def test_no_label_of_a_figure_is_cut_off(
    only: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    drawn = Panels._svg

    def look(self: Panels, figure: Any, label: str = "") -> str:
        if label:
            figure.draw_without_rendering()
            (ax,) = figure.axes
            box = ax.get_tightbbox()
            assert min(box.p0) >= 0, label
            assert box.x1 <= figure.bbox.x1, label
            assert box.y1 <= figure.bbox.y1, label
            low, high = ax.get_ylim()
            ticks = zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
            seen.append(max(len(text.get_text()) for y, text in ticks if low <= y <= high))
        return drawn(self, figure, label)

    monkeypatch.setattr(Panels, "_svg", look)
    # Close to one another, so that the scale has three decimals: 97.522 and not 97.
    close = {"finetuned_accuracy", "trained_accuracy", "pruned_accuracy"}
    runs = [
        replace(
            r, finetune_curve=(0.975,), **{name: 0.975 + getattr(r, name) / 1e3 for name in close}
        )
        for r in grid(**only)
    ]
    page(runs, tmp_path)
    assert max(seen) >= 6


NASTY = '<script>alert("1")</script>&amp;\'"><b>'


@pytest.mark.slow
def test_text_is_escaped_wherever_it_comes_from(tmp_path: Path) -> None:
    runs = [
        replace(r, model=NASTY, device=NASTY, versions={NASTY: NASTY}, seconds={NASTY: 1.0})
        for r in grid(seeds=1)
    ]
    runs.append(one(protocol=NASTY))
    folder = store(tmp_path / "store", runs, configuration={NASTY: {NASTY: NASTY}})
    found = page(folder, tmp_path)
    assert "script" not in found.tags
    assert found.words.count(NASTY) > 8
    assert [[f"{NASTY}.{NASTY}", NASTY]] in found.tables


@pytest.mark.slow
@given(st.lists(st.sampled_from(grid(seeds=2)), min_size=1, max_size=5))
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_handful_of_a_grid_makes_a_page(runs: list[Record]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = page(runs, Path(folder))
    cells = len({(r.mode, r.keep_ratio, r.prune_ratio, r.seed) for r in runs})
    assert f"{cells} run{'s' * (cells > 1)}." in found.words
    assert len(next(t for t in found.tables if t[0][0] == "model")) - 1 == len({
        (r.mode, r.keep_ratio, r.prune_ratio) for r in runs
    })


@pytest.mark.usefixtures("blank_figures")
def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "page.html"
    assert html([one()], str(path)) == path
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        html(grid(), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_readers_style_is_left_alone_and_not_taken(
    full: tuple[Page, str], tmp_path: Path
) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"grid.color": "red", "xtick.direction": "in"}):
        before = dict(mpl.rcParams)
        text = html(grid(), tmp_path / "page.html").read_text(encoding="utf-8")
        assert dict(mpl.rcParams) == before
    assert text == full[1]


def test_it_reads_in_the_dark_on_a_phone_and_on_paper(full: tuple[Page, str]) -> None:
    found, text = full
    assert ("meta", "name", "viewport") in found.attributes
    for words in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto", "tabular-nums"):
        assert words in text
    assert text.count('<div class="scroll"><table>') == text.count("<table>")


def test_a_missing_matplotlib_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "drophot\[plot\]"'):
        html(tmp_path / "nowhere", tmp_path / "page.html")


@pytest.mark.usefixtures("blank_figures")
def test_each_table_is_there_or_the_page_says_why(tmp_path: Path) -> None:
    sections = page(grid(seeds=1), tmp_path).sections
    numbers = [int(found[1]) for name in sections if (found := re.match(r"Table (\d)", name))]
    assert numbers == [1, 2, 3, 4, 5, 6]
    (differing,) = [text for name, text in sections.items() if name.startswith("Table 5")]
    assert "Left out" in differing


@pytest.mark.usefixtures("blank_figures")
def test_runs_that_also_differ_in_a_control_have_a_true_reason_for_no_table_5(
    tmp_path: Path,
) -> None:
    runs = [*grid(seeds=1), *grid(seeds=1, modes=("high",), equal_steps=True)]
    sections = page(runs, tmp_path).sections
    (differing,) = [text for name, text in sections.items() if name.startswith("Table 5")]
    assert re.search("Left out.* settings that the tables show", differing)
