"""Results that a user replaced between the steps, and objects that must not be mistaken."""

import copy
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import drop_hot
from torch import Tensor, nn

from drophot import Grid, Masks, Scored, evaluate, fit, report, stats
from drophot.coreset import Evidence
from drophot.models import fcnet
from drophot.pipeline import RunProtocol
from drophot.tracking import Spread


class First:
    """The first of the samples, in the order of the scores."""

    name = "first"
    needs = ("scores", "model")

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        assert evidence.scores is not None
        return evidence.scores.argsort(stable=True)[: round(ratio * evidence.num_samples)]


class Logit:
    hard_end = "high"

    def __init__(self, name: str, column: int = 0) -> None:
        self.name, self.column = name, column

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits[:, self.column]


def test_run_keeps_what_the_user_set_and_computes_what_is_missing() -> None:
    run = drop_hot(mode=First())
    mine = torch.arange(120.0).flip(0)
    run.scores = mine
    run.run()
    assert run.scores is mine
    assert run.scorer is not None
    assert run.indices.max() == 119
    other = drop_hot(mode=First())
    other.scorer = run.scorer
    other.run()
    assert other.scorer is run.scorer


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        (torch.zeros(60, dtype=torch.int64), ValueError, "`indices`.*59"),
        (torch.arange(-60, 0), ValueError, "`indices`.*-60"),
        (torch.arange(100, 160), ValueError, "`indices`.*120"),
        (torch.rand(60), TypeError, "`indices`"),
        (torch.ones(120, dtype=torch.bool), TypeError, "`indices`.*nonzero"),
        (torch.arange(0), (TypeError, ValueError), "`indices`"),
    ],
)
def test_replaced_indices_are_checked(indices: Tensor, error: Any, words: str) -> None:
    run = drop_hot(mode="random", data_ratio=0.5)
    run.indices = indices
    with pytest.raises(error, match=words):
        run.train()


def test_a_mode_that_selects_while_it_trains_takes_no_indices() -> None:
    run = drop_hot(mode="fresh_subset", data_ratio=0.5)
    run.indices = torch.arange(60)
    with pytest.raises(ValueError, match="`indices`.*120.*fresh_subset.*60"):
        run.train()


def test_equal_steps_counts_the_indices_that_there_are() -> None:
    steps: list[int] = []

    def counting(*args: Any, on_batch: Any = None, **rest: Any) -> None:
        fit(*args, on_batch=lambda *_: steps.append(1), **rest)

    run = drop_hot(mode="random", data_ratio=0.5, equal_steps=True, fit=counting)
    run.indices = torch.arange(20)
    run.train()
    size, epochs = run.batch_size, run.train_epochs
    assert len(steps) == epochs * -(-120 // size)


def test_an_importance_finds_no_gradients_as_in_a_grid() -> None:
    seen: list[bool] = []

    def importance(name: str, weight: Tensor) -> Tensor:
        seen.append(weight.grad is None)
        return weight.detach().abs()

    run = drop_hot(mode="random", importance=importance)
    run.run()
    assert seen
    assert all(seen)


def test_channels_of_a_network_that_is_pruned_twice_are_counted_from_the_dense_one() -> None:
    class Wide(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))

    run = drop_hot(model=Wide, mode="random", structured=True, prune_ratio=0.5)
    run.select()
    before = sum(p.numel() for p in run.train().parameters() if p.dim() > 1)
    run.prune()
    run.prune()
    record = run.finetune()
    after = sum(p.numel() for p in run.model.parameters() if p.dim() > 1)
    assert record.sparsity == 1 - after / before


def test_a_spread_is_no_built_in_score_whatever_its_name() -> None:
    with pytest.raises(ValueError, match="name.*'loss'"):
        drop_hot(mode=Scored(Spread(score=Logit("mine"), name="loss"))).score()
    one, other = (
        drop_hot(mode=Scored(Spread(score=Logit("mine", column), name="spread")))
        for column in (0, 1)
    )
    assert one.configuration["mode"] != other.configuration["mode"]


def grid(mode: Any) -> Grid:
    run = drop_hot(score_epochs=1, train_epochs=1, finetune_epochs=1)
    return Grid(run, data_ratios=[0.5], modes=[mode], prune_ratios=[0.5], seeds=[0])


class SameName(First):
    name = "el2n-high"


def test_an_own_object_has_no_name_of_a_built_in_one() -> None:
    with pytest.raises(ValueError, match="`mode`.*'el2n-high'"):
        drop_hot(mode=SameName())


def test_a_store_tells_objects_of_one_name_apart(tmp_path: Path) -> None:
    first, second = Scored(Logit("m", 0), "high", True), Scored(Logit("m", 1), "low", True)
    grid(first).run(tmp_path)
    with pytest.raises(ValueError, match="`store`.*`modes`"):
        grid(second).run(tmp_path)
    grid(first).run(tmp_path)


def test_a_network_of_ones_own_has_no_accuracy_of_another() -> None:
    run = drop_hot(mode="random")
    first = run.run()
    run.model = copy.deepcopy(run.model)
    assert isnan(run.trained_accuracy)
    assert isnan(run.pruned_accuracy)
    run.trained_accuracy = 0.75
    run.prune()
    record = run.finetune()
    assert record.trained_accuracy == 0.75
    assert record.fingerprint != first.fingerprint
    assert run.run() == first


def test_what_was_fine_tuned_twice_or_by_masks_of_ones_own_is_told_apart() -> None:
    run = drop_hot(mode="random")
    first = run.run()
    second = run.finetune()
    assert (second.fingerprint, second.cell) != (first.fingerprint, first.cell)
    run.select()
    run.train()
    run.prune()
    assert run.finetune() == first
    run.train()
    run.masks = run.prune()
    assert run.finetune().fingerprint not in (first.fingerprint, second.fingerprint)
    assert run.replace().run() == first


class BadEnd(Logit):
    hard_end = "hard"


@pytest.mark.parametrize(
    ("score", "words"), [(BadEnd("mine"), "`hard_end`.*'hard'"), (Logit("two words"), "two words")]
)
def test_a_score_is_checked_before_a_run_starts(score: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scored(score)


class Unscored(First):
    statistic = "entropy"


def test_the_score_that_a_selector_names_is_checked_before_a_run_starts() -> None:
    with pytest.raises(ValueError, match="`statistic`.*'entropy'"):
        drop_hot(mode=Unscored())


class Caching(First):
    """Keeps what it found, for the next call."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.by_seed: dict[int, Tensor] = {}

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        self.by_seed[seed] = evidence.scores
        return super().select(ratio, evidence, seed)


class Assigning(Caching):
    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        self.cache = evidence.scores
        return super().select(ratio, evidence, seed)


class Hiding(Assigning):
    def __getstate__(self) -> dict[str, Any]:
        return {}


def test_a_selector_that_changes_in_use_is_refused_and_one_that_caches_is_not(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="`mode`.*'first'.*`cache`.*__getstate__"):
        grid(Assigning()).run(tmp_path / "assigning")
    for number, selector in enumerate((Caching(), Hiding())):
        found = grid(selector).run(tmp_path / str(number))
        assert grid(selector).run(tmp_path / str(number)) == found


class LongName(First):
    name = "x" * 250


def test_a_long_name_makes_no_long_file_name(tmp_path: Path) -> None:
    found = grid(LongName()).run(tmp_path)
    assert found[-1].mode == LongName.name
    assert max(len(path.name) for path in (tmp_path / "stages").iterdir()) <= 220
    other = LongName()
    other.name = "x" * 249 + "y"
    assert grid(other).run(tmp_path)[-1].mode == other.name


class Column(First):
    def __init__(self, column: int) -> None:
        self.column = column


def test_a_reference_is_one_object_of_its_name() -> None:
    records = [drop_hot(mode=Column(column), score_epochs=1).run() for column in (0, 1)]
    records.append(drop_hot(mode="random", score_epochs=1).run())
    assert "column=0" in report.table(records)
    assert "column=1" in report.table(records)
    with pytest.raises(ValueError, match="`records`.*`mode`.*'first'"):
        stats.compare(records, against="first")
    (found,) = stats.compare([records[0], *records[2:]], against="first")
    assert found.mode == "random"


@pytest.mark.parametrize("name", ["seed", "batch_size", "on_epoch", "on_batch", "optimizer"])
def test_a_partial_of_fit_leaves_to_the_run_what_the_run_sets(name: str) -> None:
    with pytest.raises(ValueError, match=f"`fit`.*'{name}'"):
        drop_hot(fit=partial(partial(fit, **{name: 3}), cache=False))


def test_a_protocol_has_a_name_and_a_counter() -> None:
    with pytest.raises(ValueError, match="`protocol`.*'paper'"):
        drop_hot(protocol=RunProtocol(name="paper", holds_masks=False))
    with pytest.raises(TypeError, match="`counter`.*'mine'.*None"):
        drop_hot(protocol=RunProtocol(name="mine", counter=lambda *_: None)).score()


def test_logits_of_minus_infinity_are_never_right() -> None:
    class Nothing(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.full((len(inputs), 3), -torch.inf)

    data = torch.utils.data.TensorDataset(torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64))
    assert evaluate(Nothing(), data) == 0.0


def wide() -> nn.Module:
    return fcnet(in_features=2, hidden=64, num_classes=3)


def test_a_network_of_ones_own_has_no_masks_and_counts_of_another() -> None:
    run = drop_hot(mode="random", structured=True, finetune_epochs=1)
    run.run()
    run.model = wide()
    with pytest.raises(RuntimeError, match=r"run\.prune\(\)"):
        run.finetune()
    run.prune()
    found = run.finetune()
    alone = run.replace()
    alone.model, alone.indices = wide(), run.indices
    alone.prune()
    assert found.sparsity == alone.finetune().sparsity > 0


class StoppedOnce:
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *args: Any, on_epoch: Any, **kwargs: Any) -> None:
        def stop(epoch: int) -> None:
            on_epoch(epoch)
            self.left += -1
            if self.left == 0:
                raise KeyboardInterrupt

        fit(*args, on_epoch=stop, **kwargs)


def test_a_fine_tuning_that_was_interrupted_and_begun_again_is_told_apart() -> None:
    run = drop_hot(mode="random", fit=StoppedOnce(after=4))  # the first epoch of step 5
    run.select()
    run.train()
    run.prune()
    with pytest.raises(KeyboardInterrupt):
        run.finetune()
    again = run.finetune()
    whole = run.run()
    assert again.finetune_curve != whole.finetune_curve
    assert again.fingerprint != whole.fingerprint
    assert whole == run.replace().run()


def test_a_record_counts_the_samples_that_were_trained_on() -> None:
    run = drop_hot(mode="random")
    run.select()
    run.train()
    run.indices = torch.arange(5)
    run.prune()
    assert run.finetune().num_kept == 60


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("model", "net.pt", TypeError, "`model`.*'net.pt'"),
        ("scorer", {}, TypeError, r"`scorer`.*\{\}"),
        ("masks", {"0.weight": None}, TypeError, "`masks`.*from_zeros"),
        ("trained_accuracy", "0.8", TypeError, "`trained_accuracy`.*'0.8'"),
        ("pruned_accuracy", 80, ValueError, "`pruned_accuracy`.*80"),
    ],
)
def test_a_result_of_the_wrong_kind_is_refused_when_it_is_set(
    name: str, value: Any, error: type[Exception], words: str
) -> None:
    run = drop_hot(mode="random")
    with pytest.raises(error, match=words):
        setattr(run, name, value)


@pytest.mark.parametrize("scores", [3, "abc", iter(range(120))], ids=type)
def test_scores_of_the_wrong_kind_are_refused_by_name(scores: Any) -> None:
    run = drop_hot(mode="high")
    run.scores = scores
    with pytest.raises((TypeError, ValueError), match="`scores`"):
        run.select()


def test_a_model_of_the_users_own_has_its_own_number_of_weights() -> None:
    run = drop_hot(mode="random", structured=True, prune_ratio=0.5)
    run.run()
    run.model = copy.deepcopy(run.model)
    run.masks = Masks.from_zeros(run.model)
    assert run.num_prunable == 0, "of the model before"
    assert run.finetune().sparsity == 0.0
