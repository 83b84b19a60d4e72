"""Agreement of coresets, against `stats.stability`, and samples forgotten by pruning."""

import csv
import io
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from helpers.record import one
from helpers.rows import cells

from drophot import Record
from drophot.records.coreset_text import to_text
from drophot.report import agreement, html, plot_forgotten
from drophot.stats import forgotten_by_pruning, stability

N = 40
CORESETS = {
    (mode, seed): np.random.default_rng([number, seed]).choice(N, 10, replace=False)
    for number, mode in enumerate(["random", "high", "low"])
    for seed in range(3)
}


def runs(**changes: object) -> list[Record]:
    return [
        one(mode=mode, seed=seed, num_kept=10, coreset=to_text(indices, N), **changes)
        for (mode, seed), indices in CORESETS.items()
    ]


def of_mode(mode: str) -> list[np.ndarray]:
    return [CORESETS[mode, seed] for seed in range(3)]


def test_the_agreement_over_seeds_and_between_modes() -> None:
    records = [*runs(), *runs(prune_ratio=0.5)[:-1], one(mode="baseline", keep_ratio=1.0)]
    head, _, *rows = cells(agreement(records))
    assert head == ["kept", "share", "n", "over seeds", "low", "high", "random"]
    assert [row[:3] for row in rows] == [[m, "10%", "3"] for m in ("low", "high", "random")]
    found = list(csv.DictReader(io.StringIO(agreement(records, "csv"))))
    assert len(found) == 6, "coresets that cells share count once"
    for row in found:
        mode, other = row["mode"], row["other_mode"]
        if other:
            both = zip(of_mode(mode), of_mode(other), strict=True)
            wanted = mean(stability(pair, N).index for pair in both)
            shown = rows[["low", "high", "random"].index(mode)][head.index(other)]
            assert row["low"] == row["high"] == ""
        else:
            over = stability(of_mode(mode), N)
            wanted = over.index
            assert (float(row["low"]), float(row["high"])) == pytest.approx(over.interval)
            shown = next(cells[3] for cells in rows if cells[0] == mode).split(" [")[0]
        assert float(row["index"]) == pytest.approx(wanted)
        assert shown == f"{wanted:z.2f}".replace("-", "−")
        assert row["n"] == "3"


def test_cells_of_other_settings_are_not_compared() -> None:
    high, low = ([r for r in runs(schedule=s) if r.mode == m] for m, s in
                 [("high", "one-shot"), ("low", "gradual")])  # fmt: skip
    _, _, *rows = cells(agreement(high + low))
    assert [row[-2:] for row in rows] == [["", "–"], ["–", ""]]


def test_two_seeds_have_no_interval() -> None:
    pair = [record for record in runs() if record.mode == "high" and record.seed < 2]
    wanted = stability(of_mode("high")[:2], N).index
    assert cells(agreement(pair))[2][-1] == f"{wanted:z.2f}".replace("-", "−")
    (row,) = csv.DictReader(io.StringIO(agreement(pair, "csv")))
    assert row["low"] == row["high"] == ""


def test_two_coresets_are_needed() -> None:
    with pytest.raises(ValueError, match="`records`.* 1 of 2 records"):
        agreement([runs()[0], one(mode="high", seed=4)])


@pytest.mark.parametrize("held", [True, False])
def test_the_page_shows_the_agreement(tmp_path: Path, held: bool) -> None:
    text = html(runs() if held else [one(), one(mode="low")], tmp_path / "page.html").read_text()
    _, _, rest = text.partition("<h2>Table 3: agreement of the coresets</h2>")
    section = rest.partition("</section>")[0]
    assert ("over seeds" in section) == held
    assert ("Left out" in section) != held


def test_the_share_forgotten_is_drawn_by_score() -> None:
    before, scores = np.ones(10, dtype=bool), np.arange(10)
    found = forgotten_by_pruning(before, scores < 8, scores, groups=2)
    ax = plot_forgotten(found, label="half removed")
    found = forgotten_by_pruning(before, scores < 5, scores, groups=2)
    assert plot_forgotten(found, label="more removed", ax=ax) is ax
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] >= 100
    assert len(ax.containers) == 2
    line = ax.containers[0].lines[0]
    assert line.get_xdata().tolist() == [2, 7]
    assert line.get_ydata().tolist() == [0, 40]
    assert line.get_color() != ax.containers[1].lines[0].get_color()
    assert (legend := ax.get_legend()) is not None
    assert [text.get_text() for text in legend.get_texts()] == ["half removed", "more removed"]
