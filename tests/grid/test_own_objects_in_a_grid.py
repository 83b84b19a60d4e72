"""A score, a selector, an importance and a protocol of a user's own in a grid and its report."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.executors import quick_pool, stamps
from helpers.own_objects import Confident, Margin, Noise
from helpers.own_operators import linear_relu, network, rule, rule_of_inputs
from helpers.runs import drop_hot
from torch import Tensor, nn

from drophot import DropHot, Grid, Record, Scored, records
from drophot.pipeline import RunProtocol
from drophot.report import differences, html, table
from drophot.stats import compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*leave no sample of classes"),
]


@dataclass(frozen=True)
class Centred:
    """The distance of a weight from the mean of its layer."""

    power: int = 1

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        return (weight - weight.mean()).abs() ** self.power


REGROWN = RunProtocol(name="regrown", holds_masks=False)
MODES: list[Any] = ["random", Scored(Margin(), "low"), Confident()]
RATIOS: dict[str, Any] = {"data_ratios": [0.5], "prune_ratios": [0.5], "seeds": [0, 1]}


def run(**changes: Any) -> DropHot:
    settings = {"score_epochs": 2, "train_epochs": 2, "finetune_epochs": 1}
    own = {"importance": Centred(), "protocol": REGROWN}
    return drop_hot(**(settings | own | changes))


def grid(modes: list[Any] = MODES, **changes: Any) -> Grid:
    return Grid(run(**changes), modes=modes, **RATIOS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own") / "store"


@pytest.fixture(scope="module")
def found(store: Path) -> list[Record]:
    """Begun here, cut in the middle, and resumed in another process."""
    first = grid().run(store)
    stages = store / "stages"
    for number, path in enumerate(sorted(stages.glob("*-confident-*"))):
        path.unlink() if number % 2 else path.write_bytes(path.read_bytes()[:-9])
    for path in stages.glob("*seed1-margin-low*"):
        path.unlink()
    before = stamps(store)
    lost = [name for name in before if "confident" in name]
    with quick_pool(1) as pool:
        assert grid().run(store, pool) == first
    after = stamps(store)
    assert all(after[name] == before[name] for name in before if name not in lost)
    return first


def test_every_record_is_that_of_a_run_of_its_own(found: list[Record]) -> None:
    modes = {"baseline": "random", "random": "random", "margin-low": MODES[1]}
    modes["confident"] = MODES[2]
    for record in found:
        alone = run().replace(
            mode=modes[record.mode],
            data_ratio=record.keep_ratio,
            prune_ratio=record.prune_ratio,
            seed=record.seed,
            **({} if record.prune_ratio else {"importance": None}),
        )
        assert alone.run() == record
        assert (record.protocol, record.sparsity < 0.5) == ("regrown", True)
        assert ("Centred" in str(record.settings.get("importance"))) == (record.prune_ratio > 0)
    assert {record.mode for record in found} == set(modes)


def test_one_scoring_of_a_seed_follows_the_own_score_too(found: list[Record], store: Path) -> None:
    assert sorted(path.name for path in store.glob("stages/score*")) == [
        "score-seed0-margin.pt",
        "score-seed1-margin.pt",
    ]
    assert records.read(store / "records.jsonl") == found


@pytest.mark.parametrize(
    ("changed", "argument", "name"),
    [
        ({"modes": ["random", Scored(Margin(scale=2.0), "low")]}, "modes", "margin-low"),
        ({"modes": [Confident(offset=1)]}, "modes", "confident"),
        ({"importance": Centred(power=2)}, "importance", "1 there, 2 here"),
        ({"protocol": replace(REGROWN, baseline_in_eval_mode=True)}, "protocol", ""),
    ],
    ids=["score", "selector", "importance", "protocol"],
)
def test_a_store_of_another_object_of_the_same_name_is_refused(
    changed: dict[str, Any], argument: str, name: str, found: list[Record], store: Path
) -> None:
    before = stamps(store)
    with pytest.raises(ValueError, match=f"`store` .*another `{argument}` .*{name}"):
        grid(**changed).run(store)
    assert stamps(store) == before
    assert grid().run(store) == found


def test_a_store_can_be_extended_by_modes_of_ones_own(found: list[Record], tmp_path: Path) -> None:
    grid(["random"]).run(tmp_path)
    grid(["random", MODES[2]]).run(tmp_path)
    assert grid().run(tmp_path) == found
    assert grid(["random"]).run(tmp_path) == [r for r in found if r.mode in ("baseline", "random")]
    with pytest.raises(ValueError, match="`modes`"):
        grid([Confident(offset=1)]).run(tmp_path)


def test_random_numbers_of_a_score_change_nothing_in_other_cells(tmp_path: Path) -> None:
    class Dropout(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 16), nn.Dropout(), nn.Linear(16, 3))

    settings: dict[str, Any] = {"forgetting": "toneva", "model": Dropout}
    both = grid(["high", Scored(Noise())], **settings).run(tmp_path / "both")
    alone = grid(["high"], **settings).run(tmp_path / "alone")
    assert [record for record in both if record.mode in ("high", "baseline")] == alone


def test_rules_for_operators_in_a_run_and_a_resumed_grid(tmp_path: Path) -> None:
    own: dict[str, Any] = {"model": network, "structured": True, "importance": None}
    settings: dict[str, Any] = own | {"protocol": "paper", "rules": {linear_relu: rule}}
    alone = run(**settings).replace(mode="high", data_ratio=0.5, prune_ratio=0.5, seed=0)
    record = alone.run()
    assert alone.channels.layers == {"0.weight": (16, 8), "1.weight": (8, 4), "2.weight": (3, 3)}
    first = grid(["high"], **settings).run(tmp_path)
    assert record in first
    for path in (tmp_path / "stages").glob("*seed1*"):
        path.unlink()
    by_name = settings | {"rules": {"drophot_tests::linear_relu.default": rule}}
    with quick_pool(1) as pool:
        assert grid(["high"], **by_name).run(tmp_path, pool) == first
    assert "high" in table(first, "text")
    with pytest.raises(ValueError, match="`store` .*another `rules`.*linear_relu"):
        grid(["high"], **settings | {"rules": {linear_relu: rule_of_inputs}}).run(tmp_path)


@pytest.mark.parametrize(
    ("rules", "structured", "error", "words"),
    [
        ({linear_relu: rule}, False, ValueError, "`rules`.*structured=True.*linear_relu"),
        ({"no::such": rule}, True, ValueError, "`rules`.*'no::such'"),
        ({3: rule}, True, TypeError, "`rules`.*key 3"),
        ({linear_relu: nn.Linear}, True, TypeError, "`rules`.*Linear"),
        ({linear_relu: len}, True, TypeError, "`rules`.*linear_relu"),
        ([rule], True, TypeError, "`rules`.*dictionary"),
    ],
)
def test_rules_that_a_run_cannot_use(
    rules: Any, structured: bool, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        drop_hot(model=network, structured=structured, rules=rules, prune_ratio=0.5)


def test_two_scores_of_one_name_are_refused() -> None:
    modes = [Scored(Margin(), "low"), Scored(Margin(scale=2.0), "high")]
    with pytest.raises(ValueError, match="`modes` .*'margin'"):
        grid(modes)


def test_the_report_shows_them(found: list[Record], store: Path, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    text = table(found, "text")
    assert "margin-low" in text
    assert "confident" in text
    assert "protocol" not in text.splitlines()[0], "all have the same"
    assert {row.mode for row in compare(found)} == {"margin-low", "confident", "random"}
    (row, other) = compare(found, against=MODES[2])
    assert {row.mode, other.mode} == {"random", "margin-low"}
    assert row.n == 2
    assert "− confident" in differences(found, against=MODES[2])
    page = html(store, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "margin-low" in page
    assert "confident" in page


def test_objects_of_one_name_that_differ_make_rows_of_their_own(
    found: list[Record], tmp_path: Path
) -> None:
    other = grid(["random", Confident(offset=1)], importance=Centred(power=2)).run(tmp_path)
    lines = [line for line in table([*found, *other], "text").splitlines() if "confident" in line]
    assert len(set(lines)) == 2
    mine = [r for r in other if r.mode == "confident"]
    theirs = [r for r in found if r.mode == "confident"]
    assert {r.cell for r in mine}.isdisjoint({r.cell for r in theirs})


def test_a_comparison_does_not_choose_among_objects_of_one_name(
    found: list[Record], tmp_path: Path
) -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    other = grid(["random", Confident(offset=1)]).run(tmp_path)
    with pytest.raises(ValueError, match="`records` .*two of the `mode` 'confident'"):
        compare([*found, *other], against="confident")
    rows = [row for row in compare([*found, *other], against="random") if row.mode == "confident"]
    assert len(rows) == 2
    assert rows[0].settings["mode"] != rows[1].settings["mode"]
