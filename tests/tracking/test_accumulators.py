"""Scores that keep more than a mean, against the definitions of their papers."""

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from helpers import references
from helpers.own_score import Entropy, Power
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drophot import DropHot, DynamicsTracker, Scored, select
from drophot.models import fcnet
from drophot.tracking import DUAL, TDDS, FirstLearned, Last, MovingAverage, Spread, WindowSpread

N, C = 4, 3
Batch = tuple[list[int], int]  # the samples and a seed of the logits


@dataclass
class Other:
    """A score with the name of another one, which counts its calls in a field."""

    name: str
    hard_end: Literal["high", "low"] = "high"
    calls: int = 0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return logits[:, 0]


def statistics(window: int = 3, until: int | None = None) -> list[Any]:
    return [
        WindowSpread(window=window, until=until),
        WindowSpread(score="loss", window=window, until=until, name="loss_spread"),
        DUAL(window=window, until=until),
        TDDS(num_classes=C, window=window, until=until, decay=0.7),
        Last(),
        Last(score=Entropy()),
        MovingAverage(decay=0.8),
        FirstLearned(),
        FirstLearned(for_good=True),
    ]


def expected(shown: list[list[np.ndarray]], window: int, until: int | None) -> dict[str, Any]:
    """The definitions, of the logits of each sample in turn; its target is `sample % C`."""
    found: dict[str, list[float]] = {}
    for sample, logits in enumerate(shown):
        target = sample % C
        p = [references.softmax(row) for row in logits]
        own = [row[target] for row in p]
        loss = [-np.log(value) for value in own]
        right = [int(row.argmax()) == target for row in logits]
        weights = [0.8 ** (len(loss) - 1 - t) for t in range(len(loss))]
        for name, value in {
            "dyn_unc": references.window_spread(own[:until], window),
            "loss_spread": references.window_spread(loss[:until], window),
            "dual": references.dual(own[:until], window),
            "tdds": references.tdds(p[:until], window, 0.7),
            "last_loss": loss[-1] if loss else np.nan,
            "last_entropy": -(p[-1] * np.log(p[-1])).sum() if loss else np.nan,
            "loss_average": np.average(loss, weights=weights) if loss else np.nan,
            "first_learned": references.first_learned(right),
            "learned_for_good": references.learned_for_good(right),
        }.items():
            found.setdefault(name, []).append(value)
    for name in ("first_learned", "learned_for_good"):
        learned = [value for value in found[name] if np.isfinite(value)]
        for sample, logits in enumerate(shown):  # never: after all others
            if found[name][sample] == np.inf:
                found[name][sample] = max([len(logits), *learned]) + 1
    return found


def logits_of(batch: Batch) -> torch.Tensor:
    index, seed = batch
    return 2 * torch.randn(len(index), C, generator=torch.Generator().manual_seed(seed))


def fed(tracker: DynamicsTracker, batches: list[Batch]) -> DynamicsTracker:
    for batch in batches:
        index = torch.tensor(batch[0], dtype=torch.int64)
        tracker.update(index, logits_of(batch), index % C)
    return tracker


def shown(batches: list[Batch]) -> list[list[np.ndarray]]:
    found: list[list[np.ndarray]] = [[] for _ in range(N)]
    for batch in batches:
        for sample, row in zip(batch[0], logits_of(batch).double().numpy(), strict=True):
            found[sample].append(row)
    return found


def assert_defined(tracker: DynamicsTracker, wanted: dict[str, Any]) -> None:
    for name, values in wanted.items():
        scores = tracker.scores(name, missing="nan")
        assert scores.dtype == torch.float32
        np.testing.assert_allclose(scores, values, rtol=2e-4, atol=2e-5, err_msg=name)


batches = st.lists(st.tuples(st.lists(st.integers(0, N - 1), max_size=12), st.integers(0, 9999)))


@settings(max_examples=25)
@given(batches, st.integers(3, 5), st.none() | st.integers(5, 9))
def test_scores_are_those_of_the_papers(seen: list[Batch], window: int, until: int | None) -> None:
    """With repeats in a batch, more of them than a window has places."""
    tracker = fed(DynamicsTracker(N, statistics=statistics(window, until)), seen)
    assert_defined(tracker, expected(shown(seen), window, until))


once = st.lists(st.tuples(st.permutations(range(N)), st.integers(0, 9999)), max_size=8)


@pytest.mark.slow
@settings(max_examples=25)
@given(once, once, batches, st.none() | st.integers(5, 9))
def test_merged_ranks_equal_one_process(
    start: list[Batch],
    others: list[Batch],
    mine: list[Batch],
    until: int | None,
) -> None:
    """The rows of a rank are joined to what the earlier ranks have seen from the same start."""
    window = 4
    some = list(statistics(window, until))
    times = [sum(batch[0].count(sample) for batch in mine) for sample in range(N)]
    if max(times) > 1:
        some = [score for score in some if score.name != "tdds"]
    if max(times) > window:
        some = [score for score in some if "window" not in dir(score)]
    rank = [sample for sample in range(N) if times[sample]]
    if not rank:
        return

    def columns(*parts: list[Batch]) -> dict[str, torch.Tensor]:
        tracker = DynamicsTracker(N, statistics=some)
        base = fed(tracker, parts[0])._state
        base.columns["history"].bitwise_and_(~6)  # as after `sync`: nothing seen since then
        for part in parts[1:]:
            fed(tracker, part)
        return {name: column[rank] for name, column in tracker._state.columns.items()}

    kept = DynamicsTracker(N, statistics=some)._kept
    joined = kept.join(columns(start, others), columns(start), columns(start, mine))
    whole = columns(start, others, mine)
    for name, column in joined.items():
        if name not in ("tails", "tdds.probabilities", "tdds.changes"):
            np.testing.assert_allclose(column, whole[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_rank_that_shows_a_sample_too_often_between_two_merges_is_an_error() -> None:
    window = DUAL(window=2, until=None)
    first, second = (DynamicsTracker(N, statistics=[window]) for _ in range(2))
    seen = fed(first, [([0], 1)])._state.columns
    often = fed(second, [([0, 0, 0], 2)])._state.columns
    base = DynamicsTracker(N, statistics=[window])._state.columns
    with pytest.raises(ValueError, match=r"`sync`.* 2 times.*'dual'.* 3 times"):
        first._kept.join(seen, base, often)


def test_a_saved_state_continues_as_if_nothing_had_happened() -> None:
    seen = [(list(range(N)), seed) for seed in range(9)]
    whole = fed(DynamicsTracker(N, statistics=[*statistics(), "aum"]), seen)
    part = fed(DynamicsTracker(N, statistics=[*statistics(), "aum"]), seen[:5])
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    again = DynamicsTracker(N, statistics=[*statistics(), "aum"])
    again.load_state_dict(torch.load(file, weights_only=True))
    fed(again, seen[5:])
    for name in whole.statistics:
        assert torch.equal(again.scores(name), whole.scores(name)), name
    with pytest.raises(ValueError, match="`state_dict`.*dual"):
        DynamicsTracker(N, statistics=["aum"]).load_state_dict(whole.state_dict())
    again.reset()
    assert np.isnan(again.columns()["dual"]).all()


def test_the_state_has_the_documented_bytes() -> None:
    def size(*scores: Any) -> int:
        state = DynamicsTracker(100, statistics=scores).state_dict()
        return sum(v.nbytes for v in state.values() if torch.is_tensor(v)) // 100

    assert size(DUAL()) == size(WindowSpread()) == 12 + 4 * 11
    assert size(TDDS(num_classes=7)) == 12 + 4 * (7 + 10)
    assert size(Last()) == size(MovingAverage()) == size(FirstLearned()) == 12 + 4
    assert size("aum", Last()) == 12 + 5 + 4


def test_too_few_presentations_are_an_error_or_nan() -> None:
    tracker = fed(DynamicsTracker(N, statistics=[DUAL(window=3)]), [(list(range(N)), 0)] * 2)
    with pytest.raises(ValueError, match=r"'dual'.*at least 3 times.* 4 of 4.* 2 presentations"):
        tracker.scores("dual")
    assert tracker.scores("dual", missing="nan").isnan().all()
    assert np.isnan(tracker.columns()["dual"]).all()
    fed(tracker, [(list(range(N)), 1)])
    assert len(select(tracker.scores("dual"), 0.5)) == 2


def test_wrong_arguments_are_named() -> None:
    for error, match, make in [
        (ValueError, "`window`.* 1", lambda: DUAL(window=1)),
        (ValueError, "`window`.* 2", lambda: TDDS(num_classes=3, window=2)),
        (ValueError, "`until`.* 4", lambda: WindowSpread(until=4)),
        (ValueError, "`decay`.* 1", lambda: MovingAverage(decay=1)),
        (ValueError, "`decay`.* 0", lambda: TDDS(num_classes=3, decay=0)),
        (ValueError, "`score`.*'variability'", lambda: Last(score="variability")),
        (TypeError, "`score`.*Last", lambda: MovingAverage(score=Last())),
        (TypeError, "`score`.*Spread", lambda: Last(score=Spread(score=Entropy(), name="s"))),
        (ValueError, "'s'", lambda: DynamicsTracker(2, statistics=[DUAL(name="s")] * 2)),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            make()
    tracker = DynamicsTracker(2, statistics=[TDDS(num_classes=4)])
    with pytest.raises(ValueError, match="`logits`.* 4 .* 3"):
        tracker.update(torch.arange(2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("saved", "loading", "named"),
    [
        (DUAL(until=20), DUAL(until=30), "until=30.*until=20"),
        (DUAL(window=5), DUAL(window=10), "window=10.*window=5"),
        (TDDS(num_classes=C), TDDS(num_classes=C, decay=0.5), r"decay=0\.5.*decay=0\.9"),
        (MovingAverage(decay=0.5), MovingAverage(), r"decay=0\.9.*decay=0\.5"),
        (FirstLearned(name="at"), FirstLearned(name="at", for_good=True), "True.*False"),
        (Last(name="last"), Last(name="last", score="aum"), "aum.*loss"),
        (Last(name="last"), MovingAverage(name="last"), r"MovingAverage.*Last\("),
        (Last(score=Power(2)), Last(score=Power(3)), "exponent=3.*exponent=2"),
        (Last(score=Power(2)), Last(score=Other("power")), "Other.*Power"),
        (Power(2), Power(3), "exponent=3.*exponent=2"),
        (Other("entropy"), Entropy(), "=Entropy.*=Other"),
        (
            Spread(score=Power(2), name="spread"),
            Spread(score=Power(3), name="spread"),
            "exponent=3.*exponent=2",
        ),
        (WindowSpread(), WindowSpread(score="loss"), "loss.*confidence"),
    ],
)
def test_the_state_of_other_arguments_is_an_error_that_names_both(
    saved: Any, loading: Any, named: str
) -> None:
    for others in ([], ["aum"]):  # without means, too
        part = fed(DynamicsTracker(N, statistics=[*others, saved]), [([0, 1], 0)]).state_dict()
        tracker = DynamicsTracker(N, statistics=[*others, loading])
        with pytest.raises(ValueError, match=f"`state_dict`.*{named}"):
            tracker.load_state_dict(part)
        assert tracker.presentations.sum() == 0
        DynamicsTracker(N, statistics=[*others, saved]).load_state_dict(part)


def test_numbers_of_any_type_are_the_same_arguments() -> None:
    saved = DUAL(window=np.int64(5), until=torch.tensor(30))  # pyright: ignore[reportArgumentType]
    state = DynamicsTracker(2, statistics=[saved]).state_dict()
    DynamicsTracker(2, statistics=[DUAL(window=5)]).load_state_dict(state)


def test_what_a_score_counts_is_no_argument() -> None:
    scores = Other("told"), Other("told")
    trackers = [DynamicsTracker(N, statistics=[score]) for score in scores]
    fed(trackers[0], [([0, 1], 0)])
    trackers[1].load_state_dict(trackers[0].state_dict())
    assert scores[0].calls != scores[1].calls


def test_an_older_state_has_only_names() -> None:
    saved = DynamicsTracker(2, statistics=["aum", DUAL(window=5)]).state_dict()
    saved["statistics"] = ["aum", "dual"]
    DynamicsTracker(2, statistics=["aum", DUAL(window=5, until=20)]).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"10\).*\(2, 5\).*'dual'.*`window`"):
        DynamicsTracker(2, statistics=["aum", DUAL(window=10)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="number of samples"):
        DynamicsTracker(3, statistics=["aum", DUAL(window=5)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="`state_dict`.*aum, first.*aum, dual"):
        DynamicsTracker(2, statistics=["aum", DUAL(window=5, name="first")]).load_state_dict(saved)


def test_a_sample_is_learned_in_the_precision_of_its_logits() -> None:
    tracker = DynamicsTracker(1, statistics=[FirstLearned()])
    logits = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)  # equal in float32
    tracker.update(torch.tensor([0]), logits, torch.tensor([1]))
    assert tracker.learned.tolist() == [True]
    assert tracker.scores("first_learned").tolist() == [1]


def test_a_score_that_is_not_finite_is_an_error_that_names_the_statistic() -> None:
    class Bad(Entropy):
        def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return torch.full((len(logits),), torch.inf)

    tracker = DynamicsTracker(2, statistics=["loss", Last(score=Bad())])
    with pytest.raises(ValueError, match="'last_entropy'.*finite"):
        tracker.update(torch.arange(2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


def test_a_run_selects_by_such_a_score() -> None:
    inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    run = DropHot(
        lambda: fcnet(in_features=4, hidden=8, num_classes=2),
        data,
        data,
        data_ratio=0.5,
        mode=Scored(DUAL(window=2)),
        prune_ratio=0.5,
        score_epochs=3,
        train_epochs=1,
        finetune_epochs=1,
    )
    assert run.run().mode == "dual-high"
    assert len(run.scores) == 60


@pytest.mark.parametrize("row", [[-np.inf, 1.0, 1.0], [np.inf, 1.0, 0.0], [0.0, np.inf, 2.0]])
def test_windows_take_infinite_logits_as_limits(row: list[float]) -> None:
    """Sample 0 has an infinite logit once; sample 1 has a very large one in its place."""
    both = ("aum", "loss")
    spreads = [WindowSpread(score=score, window=2, name=f"{score}_spread") for score in both]
    some = [WindowSpread(window=2), DUAL(window=2), TDDS(num_classes=C, window=3)]
    tracker, index = DynamicsTracker(3, statistics=[*spreads, *some]), torch.arange(3)
    usual, large = [0.3, 1.0, -0.5], [float(np.clip(value, -500, 500)) for value in row]
    for rows in ([usual] * 3, [row, large, [1.0, 0.0, 2.0]], [usual] * 3, [usual] * 3):
        tracker.update(index, torch.tensor(rows), torch.zeros(3, dtype=torch.int64))
    for name in ("dyn_unc", "dual", "tdds"):
        found = tracker.scores(name)
        torch.testing.assert_close(found[0], found[1])
    infinite = {"aum": True, "loss": row[0] == -np.inf or row[1] == np.inf}
    for name in both:
        found = tracker.scores(f"{name}_spread")
        assert found.isinf().tolist() == [infinite[name], False, False]
        assert (found > 0).all()
    tracker.update(index[:1], torch.tensor([[np.nan, 0.0, 0.0]]), torch.tensor([0]))
    for statistic in (*spreads, *some):
        assert tracker.scores(statistic.name).isnan().tolist() == [True, False, False]
