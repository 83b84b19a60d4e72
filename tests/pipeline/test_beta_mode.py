"""Beta sampling as a mode: the confidences are those of the step 1 of each run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.own_objects import Margin
from helpers.runs import TRAIN, drop_hot

from drophot import Adaptive, AdaptiveSubset, Grid, Scored, select
from drophot.coreset import Beta, Evidence
from drophot.models import fcnet
from drophot.pipeline import RunProtocol
from drophot.settings.names import needs_scoring
from drophot.tracking import DUAL

pytestmark = pytest.mark.filterwarnings("ignore:.*leave no sample of classes")
BY_DUAL = Scored(DUAL(window=2), Beta(exponent=2), balanced=True)
QUICK: dict[str, Any] = {"score_epochs": 2, "train_epochs": 1, "finetune_epochs": 1}


def test_a_run_draws_by_its_own_scores_and_confidences() -> None:
    run = drop_hot(mode=BY_DUAL, **QUICK)
    record = run.run()
    assert record.mode == BY_DUAL.name == "dual-beta-exponent2-balanced"
    confidence = run.tracker.scores("confidence")
    targets = TRAIN.tensors[1]
    expected = select(run.tracker.scores("dual"), 0.5, Beta(confidence, 2), targets=targets)
    assert torch.equal(run.indices, expected)
    assert needs_scoring(BY_DUAL)
    plain = drop_hot(mode=Beta(), **QUICK)
    scores = plain.score()
    expected = select(scores, 0.5, Beta(plain.statistic("confidence")))
    assert torch.equal(plain.select(), expected)
    assert not torch.equal(plain.select(), select(scores, 0.5))


def test_step_1_is_taken_for_the_confidences_alone() -> None:
    run = drop_hot(mode=Beta(), **QUICK)
    run.scores = own = torch.rand(120)
    with pytest.raises(RuntimeError, match=r"'beta'.*`run\.score\(\)`.*`run\.tracker`"):
        run.select()
    record = run.run()
    assert "score" in record.seconds
    assert run.scores is own
    assert torch.equal(run.indices, select(own, 0.5, Beta(run.statistic("confidence"))))
    given = drop_hot(mode=Beta(torch.rand(120)), **QUICK)
    given.scores = own
    record = given.run()
    assert (record.mode, "score" in record.seconds) == ("beta-given", False)


def test_a_cell_of_a_grid_is_a_run_of_its_own(tmp_path: Path) -> None:
    grid = Grid(
        drop_hot(**QUICK),
        modes=["random", BY_DUAL],
        data_ratios=[0.5],
        prune_ratios=[0.5],
        seeds=[0, 1],
    )
    found = [record for record in grid.run(tmp_path) if record.mode == BY_DUAL.name]
    assert [record.seed for record in found] == [0, 1]
    assert len({tuple(record.indices().tolist()) for record in found}) == 2
    for record in found:
        assert drop_hot(mode=BY_DUAL, prune_ratio=0.5, seed=record.seed, **QUICK).run() == record


@pytest.mark.parametrize("needs", [("confidence",), ("confidence", "scores")])
def test_a_selector_that_selects_again_receives_the_confidences(needs: tuple[str, ...]) -> None:
    seen: list[Evidence] = []

    class Sees(Named):
        statistic = "loss"

        def select(self, ratio: float, evidence: Evidence, seed: int) -> torch.Tensor:
            seen.append(evidence)
            return super().select(ratio, evidence, seed)

    selector, model = Sees("sees"), fcnet(2, 8, 3)
    selector.needs = needs
    sampler = AdaptiveSubset(TRAIN, model, 0.5, selector, every=1)
    list(sampler)  # the first selection is random
    list(sampler)
    inputs, targets = TRAIN.tensors
    expected = model(inputs).softmax(1)[torch.arange(120), targets]
    torch.testing.assert_close(seen[0].confidence, expected)
    assert (seen[0].scores is None) == ("scores" not in needs)


def test_it_is_the_mode_of_a_run_that_selects_again() -> None:
    record = drop_hot(
        mode=Adaptive(Scored("loss", Beta()), every=1), **(QUICK | {"train_epochs": 2})
    ).run()
    assert record.mode == "adaptive1-loss-beta"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: select(torch.rand(4), 0.5, Beta()), "`confidence`.*None.*Beta"),
        (lambda: select(torch.rand(4), 0.5, Beta(balanced=True)), "beta-balanced.*`confidence`"),
        (lambda: Scored("aum", Beta()), "`statistic`.*'aum'"),
        (lambda: Scored(Margin(), Beta()), "`statistic`.*'margin'"),
        (
            lambda: drop_hot(
                mode=Beta(), protocol=RunProtocol(name="own", counter=lambda *_: None)
            ),
            "'own'.*mode='beta'",
        ),
        (lambda: Evidence(num_samples=3, confidence=torch.rand(2)), r"`confidence`.* 3 .*\(2,\)"),
        (lambda: drop_hot(mode=Named("beta-exponent3")), "`mode`.*'beta-exponent3'"),
    ],
)
def test_wrong_arguments_are_named(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


class Named:
    needs: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def select(self, ratio: float, evidence: Evidence, seed: int) -> torch.Tensor:
        return torch.arange(max(1, int(ratio * evidence.num_samples + 0.5)))
