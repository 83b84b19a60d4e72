import builtins
import csv
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from helpers.record import one
from helpers.rows import cells, grid
from hypothesis import given, settings
from hypothesis import strategies as st

from drophot import Record, Scored, stats
from drophot.report import differences, plot_curves, plot_ratios, plot_steps, table

RUNS = [
    one(seed=0, trained_accuracy=0.90),
    one(seed=1, trained_accuracy=0.94),
    one(mode="baseline", keep_ratio=1.0, num_kept=60_000),
]
PLOTS: list[Callable[..., Any]] = [plot_steps, plot_curves, plot_ratios]


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


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
        ["lenet", "baseline", "100%", "60,000", "80%", "1", "90.00", "50.00", "95.00", "80.00"],
    ]


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"mode": "low"}, None),
        ({"keep_ratio": 0.2}, None),
        ({"prune_ratio": 0.4}, None),
        ({"protocol": "released"}, "protocol"),
        ({"equal_steps": True}, "steps"),
        ({"reinitialized": True}, "weights"),
    ],
)
def test_what_differs_in_more_than_the_seed_is_not_averaged(
    change: dict[str, Any], column: str | None
) -> None:
    head, _, *rows = cells(table([one(), one(seed=1, **change)]))
    assert len(rows) == 2
    assert ({"protocol", "steps", "weights"} & set(head)) == ({column} if column else set())
    if column:
        assert rows[0][head.index(column)] != rows[1][head.index(column)]
    assert len(read_csv(table([one(), one(seed=1, **change)], format="csv"))) == 2
    assert len(cells(table([one(), one(seed=1)]))) == 3


def test_the_words_for_controls() -> None:
    runs = [one(), one(equal_steps=True), one(mode="baseline"), one(reinitialized=True)]
    head, _, *rows = cells(table(runs))
    assert [row[head.index("steps")] for row in rows] == ["fewer", "equal", "all", "fewer"]
    assert [row[head.index("weights")] for row in rows] == ["trained"] * 3 + ["new"]


def test_columns_line_up() -> None:
    lines = table(RUNS).splitlines()
    assert len({len(line) for line in lines}) == 1
    bars = {tuple(i for i, c in enumerate(line) if c == "|") for line in lines}
    assert len(bars) == 1


def test_text_has_the_same_cells_without_bars() -> None:
    lines = table(RUNS, format="text").splitlines()
    assert not any("|" in line for line in lines)
    assert set(lines[1]) == {"-", " "}
    # Columns end where the rule's dashes end.
    edges = [i for i in range(len(lines[1])) if lines[1][i : i + 2] in ("- ", "-")]
    starts = [0, *(edge + 3 for edge in edges[:-1])]
    found = [
        [line[a : b + 1].strip() for a, b in zip(starts, edges, strict=True)] for line in lines
    ]
    markdown = cells(table(RUNS))
    assert found[0] == markdown[0]
    assert found[2:] == markdown[2:]


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.1, "10%"), (0.125, "12.5%"), (0.07, "7%"), (0.001, "0.1%"), (1, "100%")]
)
def test_shares_are_not_rounded_away(ratio: float, text: str) -> None:
    assert cells(table([one(keep_ratio=ratio)]))[2][2] == text


def test_a_bar_or_a_new_line_in_a_name_does_not_break_the_table() -> None:
    lines = table([one(model="a|b\nc")]).splitlines()
    assert len(lines) == 3
    assert r"a\|b c" in lines[2]
    assert read_csv(table([one(model='a|b\n"c"')], format="csv"))[0]["model"] == 'a|b\n"c"'


share = st.floats(0, 1)


@given(
    st.lists(share, min_size=1, max_size=6),
    st.text(max_size=5).filter(lambda t: not {"\0", "\r"} & set(t)),
)
def test_csv_gives_back_every_number(values: list[float], model: str) -> None:
    runs = [one(seed=s, model=model, pruned_accuracy=v) for s, v in enumerate(values)]
    rows = list(csv.DictReader(io.StringIO(table(runs, format="csv"), newline="")))
    assert len(rows) == 1
    assert rows[0]["model"] == model
    assert int(rows[0]["n"]) == len(values)
    assert float(rows[0]["pruned_accuracy_mean"]) == mean(values)
    if len(values) == 1:
        assert rows[0]["pruned_accuracy_std"] == ""
    else:
        assert float(rows[0]["pruned_accuracy_std"]) == stdev(values)
    assert float(rows[0]["keep_ratio"]) == 0.1
    assert rows[0]["equal_steps"] == "False"


@given(st.permutations(grid(seeds=2)))
@settings(max_examples=20)
def test_the_order_of_records_orders_the_table_and_changes_no_row(runs: list[Record]) -> None:
    assert set(table(runs).splitlines()) == set(table(grid(seeds=2)).splitlines())


@given(st.permutations(grid(seeds=2)))
@settings(max_examples=10)
def test_the_order_of_records_does_not_matter_to_differences(runs: list[Record]) -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    assert differences(runs) == differences(grid(seeds=2))


def test_differences_are_the_papers_table_with_intervals() -> None:
    scipy = pytest.importorskip("scipy.stats", reason="the extra `stats` is not installed")
    runs = grid()
    head, _, *rows = cells(differences(runs))
    assert head[:3] == ["share", "removed", "n"]
    assert head[3:] == [
        "low − base",
        "high − base",
        "random − base",
        "low − random",
        "high − random",
    ]
    assert [row[:3] for row in rows] == [
        ["10%", "0%", "3"],
        ["10%", "80%", "3"],
        ["50%", "0%", "3"],
        ["50%", "80%", "3"],
    ]

    def of(mode: str, keep: float) -> list[float]:
        return [
            record.finetuned_accuracy
            for record in runs
            if (record.mode, record.keep_ratio, record.prune_ratio) == (mode, keep, 0.8)
        ]

    for column, (mode, other) in {3: ("low", "baseline"), 7: ("high", "random")}.items():
        found = rows[1][column]
        pairs = zip(of(mode, 0.1), of(other, 1.0 if other == "baseline" else 0.1), strict=True)
        gains = [100 * (a - b) for a, b in pairs]
        half = scipy.t.ppf(0.975, 2) * stdev(gains) / math.sqrt(3)
        number, low, high = (
            found.replace("−", "-").translate(dict.fromkeys(map(ord, "[],*"))).split()
        )
        assert float(number) == pytest.approx(mean(gains), abs=0.0051)
        assert float(low) == pytest.approx(mean(gains) - half, abs=0.0051)
        assert float(high) == pytest.approx(mean(gains) + half, abs=0.0051)
        assert number[0] in "+-"


def test_stars_are_holms_over_the_whole_table() -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = grid()
    both = [*stats.compare(runs, against="baseline"), *stats.compare(runs, against="random")]
    both = [c for c in both if c.mode != "baseline"]
    expected = stats.holm([c.p_value for c in both])
    rows = read_csv(differences(runs, format="csv"))
    assert len(rows) == len(both) == 4 * 5
    found = {
        (r["mode"], r["against"], float(r["keep_ratio"]), float(r["prune_ratio"])): r for r in rows
    }
    for c, p in zip(both, expected, strict=True):
        row = found[c.mode, c.against, c.keep_ratio, c.prune_ratio]
        assert float(row["p_value"]) == c.p_value
        assert float(row["p_holm"]) == p
        assert float(row["difference"]) == c.difference
        assert (float(row["low"]), float(row["high"])) == c.interval
        assert float(row["effect_size"]) == c.effect_size
        assert int(row["n"]) == c.n
        assert row["measure"] == "finetuned_accuracy"
    # Holm over the table is not that over its halves, and it takes stars away.
    assert any(p > c.p_holm for c, p in zip(both, expected, strict=True))
    assert any(c.p_value < 0.05 <= p for c, p in zip(both, expected, strict=True))
    assert any(p < 0.05 for p in expected)
    assert differences(runs).count("*") == sum(p < 0.05 for p in expected)


def clear(seeds: int = 4) -> list[Record]:
    """Low is far below the baseline, by almost the same in every seed; high is like it."""
    runs = []
    for seed in range(seeds):
        end = 0.9 + 0.01 * seed
        runs.append(one(mode="baseline", keep_ratio=1.0, seed=seed, finetuned_accuracy=end))
        low = end - 0.1 + 0.0001 * (seed % 2)
        runs.append(one(mode="low", seed=seed, finetuned_accuracy=low))
        runs.append(one(mode="high", seed=seed, finetuned_accuracy=end + 0.01 * (-1) ** seed))
    return runs


def test_a_clear_difference_has_a_star_and_noise_has_none() -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    head, _, row = cells(differences(clear()))
    assert head == ["share", "removed", "n", "low − base", "high − base"]
    assert row[3].startswith("−9.99 [")
    assert row[3].endswith("] *")
    assert row[4].startswith("+0.00 [")
    assert row[4].endswith("]")


def test_one_seed_gives_a_difference_and_nothing_more() -> None:
    runs = grid(seeds=1)
    rows = cells(differences(runs))[2:]
    assert all("[" not in cell and "*" not in cell for row in rows for cell in row)
    assert all(row[2] == "1" for row in rows)
    by_mode = {(r.mode, r.keep_ratio): r.finetuned_accuracy for r in runs if r.prune_ratio == 0.8}
    gain = 100 * (by_mode["low", 0.1] - by_mode["baseline", 1.0])
    assert float(rows[1][3].replace("−", "-")) == pytest.approx(gain, abs=0.0051)
    long = read_csv(differences(runs, format="csv"))
    assert {row[name] for row in long for name in ("low", "high", "p_value", "p_holm")} == {""}


@pytest.mark.parametrize("changes", [{"seed": 11}, {"seed": 7, "protocol": "released"}])
def test_coresets_that_no_reference_goes_with_are_named_by_their_seeds(
    changes: dict[str, Any],
) -> None:
    runs = [one(mode="baseline", keep_ratio=1.0, seed=7), one(mode="high", **changes)]
    with pytest.raises(ValueError, match=rf"`records`.* seed 7.* seed {changes['seed']}"):
        differences(runs)


def test_columns_only_for_what_is_there() -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")

    def head(*modes: str) -> list[str]:
        return cells(differences(grid(modes=modes)))[0][3:]

    assert head("baseline", "low") == ["low − base"]
    assert head("random", "low") == ["low − random"]
    assert head("random", "baseline") == ["random − base"]
    for modes in (("low", "high"), ("baseline",), ("random",)):
        with pytest.raises(ValueError, match="`records`.* only " + ", ".join(modes)):
            head(*modes)


def test_differences_to_any_mode() -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = grid()
    head, _, *rows = cells(differences(runs, against="low"))
    assert head[3:] == ["high − low", "random − low"]
    found = stats.compare(runs, against="low")
    assert len(rows) == len(found) / 2
    stars = sum(row.p_holm < 0.05 for row in found)
    assert sum("*" in cell for row in rows for cell in row) == stars, "adjusted for this table"
    long = read_csv(differences(runs, against=Scored(mode="random"), format="csv"))
    assert {row["against"] for row in long} == {"random"}
    assert len(long) == len(stats.compare(runs, against="random"))
    with pytest.raises(ValueError, match="`against` .*'crest'"):
        differences(runs, against="crest")
    with pytest.raises(ValueError, match="`records` .*low.* only low"):
        differences([r for r in runs if r.mode == "low"], against="low")


def test_more_modes_than_the_papers_have_a_row_each() -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = grid()
    wide = cells(differences(runs))
    others = [replace(r, mode="el2n-high") for r in runs if r.mode == "high"]
    head, _, *rows = cells(differences([*others, *runs]))
    assert head == ["kept", "share", "removed", "n", "− base", "− random"]
    assert [row[0] for row in rows] == ["low", "high", "random", "el2n-high"] * 4
    assert rows[2][5] == ""
    # The numbers are those of the wide table; the stars may not be, for more are compared.
    for place, line in enumerate(wide[2:]):
        for mode in ("low", "high", "random"):
            row = rows[4 * place + ["low", "high", "random"].index(mode)]
            assert row[1:4] == line[:3]
            for column, other in ((4, "base"), (5, "random")):
                if mode != other:
                    expected = line[wide[0].index(f"{mode} − {other}")]
                    assert row[column].rstrip(" *") == expected.rstrip(" *")
        assert rows[4 * place + 3][4:] == rows[4 * place + 1][4:]
    equal = [replace(r, equal_steps=True) for r in others]
    head, _, *rows = cells(differences([*others, *equal, *runs]))
    assert head[:2] == ["steps", "kept"]
    assert sum(row[0] == "equal" for row in rows) == 4


def test_another_measure_and_leading_columns() -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = [*grid(), *grid(model="fcnet", modes=("baseline", "low"))]
    head, _, *rows = cells(differences(runs, measure="pruned_accuracy"))
    assert head[:2] == ["model", "share"]
    assert [row[0] for row in rows] == ["fcnet"] * 4 + ["lenet"] * 4
    assert rows[0][head.index("high − base")] == ""
    long = read_csv(differences(runs, measure="pruned_accuracy", format="csv"))
    assert {row["measure"] for row in long} == {"pruned_accuracy"}
    equal = cells(differences([*grid(), *grid(modes=("low", "random"), equal_steps=True)]))
    assert equal[0][0] == "steps"
    assert {row[0] for row in equal[2:]} == {"fewer", "equal"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: table(RUNS, format="html"), "`format`.*'text' or 'markdown' or 'csv'.*'html'"),
        (lambda: differences(RUNS, format="tex"), "`format`.*'tex'"),
        (lambda: differences(RUNS, "best"), "`measure`.*'trained_accuracy' or.*'best'"),
        (lambda: plot_ratios(RUNS, x="seed"), "`x`.*'keep_ratio' or 'prune_ratio'.*'seed'"),
        (lambda: plot_ratios(RUNS, measure="seed"), "`measure`.*'seed'"),
    ],
)
def test_an_unknown_word_is_named_beside_those_known(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()


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
    assert legend(axes) == ["lenet: high, 10% kept, 2 seeds", "lenet: baseline"]
    axes.get_figure().savefig(tmp_path / "figure.png")  # type: ignore[union-attr]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_labels_name_all_that_tells_groups_apart() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    runs = [
        one(),
        one(prune_ratio=0.4),
        one(protocol="released"),
        one(equal_steps=True),
        one(reinitialized=True),
    ]
    for plot in (plot_steps, plot_curves):
        labels = legend(plot(runs))
        assert len(set(labels)) == len(runs)
        assert all("removed" in label for label in labels)
        assert "weights new" in labels[-1]
        assert "removed" not in legend(plot(runs[:1]))[0]


def test_curves_begin_right_after_pruning() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = grid(keeps=(0.1,), prunes=(0.8,))
    axes = plot_curves(runs)
    assert len(axes.lines) == len(axes.collections) == 4  # lines and bands
    for line, mode in zip(axes.lines, ("baseline", "low", "high", "random"), strict=True):
        curves = [(r.pruned_accuracy, *r.finetune_curve) for r in runs if r.mode == mode]
        assert list(line.get_xdata()) == [0, 1, 2]
        means = [100 * mean(values) for values in zip(*curves, strict=True)]
        assert list(line.get_ydata()) == pytest.approx(means)
    band = axes.collections[1].get_paths()[0].vertices
    low, high = stats.estimate([r.finetuned_accuracy for r in runs if r.mode == "low"]).interval
    at_end = band[band[:, 0] == 2][:, 1]
    assert (min(at_end), max(at_end)) == pytest.approx((100 * low, 100 * high))


def test_curves_of_new_weights_begin_after_an_epoch() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    axes = plot_curves([one(reinitialized=True)])
    assert list(axes.lines[0].get_xdata()) == [1, 2]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([93, 95])


def test_curves_refuse_too_many_groups_and_draw_unequal_lengths_apart() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = grid()
    plot_curves([r for r in runs if r.prune_ratio == 0 or r.mode == "baseline"])
    with pytest.raises(ValueError, match="`records`.* 19 .* 28"):
        plot_curves([*runs, *(replace(r, prune_ratio=r.prune_ratio + 0.1) for r in runs)])
    lines = plot_curves([one(), one(seed=1, finetune_curve=(0.5,))]).lines
    assert [len(line.get_xdata()) for line in lines] == [3, 2]


def test_ratios_show_a_line_for_each_mode_and_the_baseline_as_a_level() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = [r for r in grid() if r.prune_ratio == 0.8]
    axes = plot_ratios(runs)
    assert set(legend(axes)) == {"low", "high", "random", "baseline"}
    assert list(axes.get_xticks()) == [10, 50]
    for bars, mode in zip(axes.containers, ("low", "high", "random"), strict=True):
        line, _, (spans,) = bars
        expected = [
            stats.estimate([r.finetuned_accuracy for r in runs if (r.mode, r.keep_ratio) == key])
            for key in ((mode, 0.1), (mode, 0.5))
        ]
        assert list(line.get_ydata()) == pytest.approx([100 * e.mean for e in expected])
        assert list(line.get_xdata()) == pytest.approx([10, 50], abs=1)
        for segment, e in zip(spans.get_segments(), expected, strict=True):
            assert segment[:, 1] == pytest.approx([100 * end for end in e.interval])
    level = next(line for line in axes.lines if line.get_label() == "baseline")
    every = stats.estimate([r.finetuned_accuracy for r in runs if r.mode == "baseline"])
    assert list(level.get_ydata()) == pytest.approx([100 * every.mean] * 2)
    (band,) = axes.patches
    edges = band.get_path().transformed(band.get_patch_transform()).vertices[:, 1]
    assert (min(edges), max(edges)) == pytest.approx([100 * end for end in every.interval])


def test_little_and_much_data_are_on_a_logarithmic_scale() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    keeps = (0.01, 0.02, 0.1, 0.2)
    runs = [r for r in grid(keeps=keeps) if r.prune_ratio == 0.8]
    axes = plot_ratios(runs)
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "10", "20"]
    assert not axes.get_xticks(minor=True).size
    places = np.array([bars[0].get_xdata() for bars in axes.containers])
    assert np.exp(np.log(places).mean(0)) == pytest.approx([1, 2, 10, 20], rel=0.03)
    narrow = [r for r in runs if r.keep_ratio != 0.01]
    assert plot_ratios(narrow).get_xscale() == "linear"
    weights = [r for r in grid(prunes=(0.01, 0.8)) if r.keep_ratio in (0.5, 1)]
    assert plot_ratios(weights, x="prune_ratio").get_xscale() == "linear"


@pytest.mark.parametrize("keeps", [(0.01, 0.02, 0.9), (0.1, 0.11, 0.9)])
def test_points_of_one_share_stay_apart_from_those_of_the_next(keeps: tuple[float, ...]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = [r for r in grid(keeps=keeps, modes=("low", "random")) if r.prune_ratio == 0.8]
    runs = [replace(r, mode=f"{r.mode}{n}") for r in runs for n in range(6)]
    axes = plot_ratios(runs)
    places = np.array([bars[0].get_xdata() for bars in axes.containers])
    assert places.shape == (12, 3)
    assert (np.diff(places, axis=0) > 0).all()
    assert (places[:, :-1].max(0) < places[:, 1:].min(0)).all()


def test_nineteen_modes_can_be_told_apart_without_markers_and_without_colours() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    runs = [one(mode=f"mode{n}") for n in range(19)]
    lines = plot_curves(runs).lines
    assert len({(line.get_linestyle(), line.get_color()) for line in lines}) == 19
    assert len({str(line.get_marker()) for line in lines}) == 19


def test_ratios_against_weights_have_the_baseline_as_a_line() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = [r for r in grid() if r.keep_ratio in (0.5, 1.0)]
    axes = plot_ratios(runs, x="prune_ratio", measure="pruned_accuracy")
    assert len(axes.containers) == 4
    assert list(axes.get_xticks()) == [0, 80]
    last = axes.containers[-1]
    values = [
        100 * mean(r.pruned_accuracy for r in runs if (r.mode, r.prune_ratio) == ("baseline", p))
        for p in (0, 0.8)
    ]
    assert list(last[0].get_ydata()) == pytest.approx(values)
    assert axes.get_xlabel() == "weights removed (%)"


@pytest.mark.parametrize(
    ("runs", "x", "message"),
    [
        (grid(), "keep_ratio", r"`records`.* prune_ratio.* 0\.0, 0\.8"),
        (grid(), "prune_ratio", r"`records`.* keep_ratio.* 0\.1, 0\.5"),
        ([one(), one(model="fcnet")], "keep_ratio", "`records`.* model.* 'lenet', 'fcnet'"),
        ([one(), one(protocol="released")], "keep_ratio", "`records`.* protocol"),
        ([one(), one(equal_steps=True)], "keep_ratio", "`records`.* equal_steps"),
        ([one(), one(reinitialized=True)], "prune_ratio", "`records`.* reinitialized"),
    ],
)
def test_ratios_refuse_what_they_would_not_show(runs: list[Record], x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_ratios(runs, x=x)


def test_the_baseline_goes_with_equal_steps() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    runs = [one(equal_steps=True), one(mode="baseline", keep_ratio=1.0)]
    assert set(legend(plot_ratios(runs))) == {"high", "baseline"}


@pytest.mark.parametrize("plot", PLOTS)
def test_a_mode_looks_the_same_in_every_figure(plot: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    runs = grid(keeps=(0.1,), prunes=(0.8,))
    for found in (runs, runs[::-1]):
        axes = plot(found)
        handles, labels = axes.get_legend_handles_labels()
        lines = [h[0] if hasattr(h, "has_yerr") else h for h in handles]
        for line, label in zip(lines, labels, strict=True):
            mode = next(m for m in ("low", "high", "random", "baseline") if m in label)
            colours = {"low": "#0072B2", "high": "#D55E00", "random": "#009E73"}
            assert line.get_color() == colours.get(mode, "#000000")
        assert len({line.get_linestyle() for line in lines}) == 4


@pytest.mark.parametrize("plot", PLOTS)
def test_a_figure_goes_where_it_is_told(plot: Callable[..., Any]) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    left, right = figure.subplots(1, 2)
    assert plot([replace(RUNS[0])], ax=right) is right
    assert not left.has_data()
    assert right.has_data()


@pytest.mark.parametrize("plot", PLOTS)
def test_one_seed_needs_no_statistics(plot: Callable[..., Any], monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    monkeypatch.setattr(stats, "estimate", None)
    assert plot(grid(keeps=(0.1,), prunes=(0.8,), seeds=1)).get_ylabel() == "test accuracy (%)"


@pytest.mark.parametrize("draw", [table, differences, *PLOTS])
def test_no_records_are_an_error(draw: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        draw([])


@pytest.mark.parametrize("plot", PLOTS)
def test_a_missing_matplotlib_names_the_pip_line(
    plot: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "drophot\[plot\]"'):
        plot(RUNS)
