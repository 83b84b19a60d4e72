"""A score, a selector, an importance and a protocol of a user's own in a run."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.own_objects import Confident, Margin
from helpers.runs import TRAIN, Normed, drop_hot
from torch import Tensor, nn

from drophot import (
    DynamicsTracker,
    ForgettingTracker,
    Masks,
    Scored,
    Stratified,
    magnitude_prune,
    select,
)
from drophot.coreset import Evidence
from drophot.pipeline import RunProtocol
from drophot.pipeline.provenance.own_objects import unknown_parts
from drophot.pipeline.released_protocol import PositionCounts, protocol_of
from drophot.structured import prune_channels
from drophot.tracking import Spread

pytestmark = pytest.mark.filterwarnings("ignore:.*leave no sample of classes")


# --- scores ---------------------------------------------------------------------------------------


def test_step_1_follows_an_own_score_and_the_mode_selects_by_it() -> None:
    run = drop_hot(mode=Scored(Margin(), "low"))
    record = run.run()
    aum = run.statistic("aum")
    torch.testing.assert_close(run.statistic("margin"), aum)
    assert torch.equal(run.scores, run.statistic("margin"))
    assert torch.equal(run.indices, select(run.scores, 0.5, "low"))
    assert record.mode == "margin-low"
    built_in = drop_hot(mode=Scored("aum", "low")).run()
    assert record.finetune_curve == built_in.finetune_curve
    assert record.trained_accuracy == built_in.trained_accuracy


def test_an_own_score_is_selected_class_by_class_and_by_strata() -> None:
    run = drop_hot(mode=Scored(Margin(), Stratified(hard="low"), balanced=True))
    record = run.run()
    assert record.mode == "margin-stratified-low-balanced"
    counts = TRAIN.tensors[1][run.indices].bincount()
    assert (counts - TRAIN.tensors[1].bincount() / 2).abs().max() < 1


def test_strata_have_to_know_the_hard_end_of_an_own_score() -> None:
    with pytest.raises(ValueError, match=r"`mode` .*hard='high'.*'margin'.*hard='low'"):
        Scored(Margin(), Stratified())


# --- selectors ------------------------------------------------------------------------------------


def test_an_own_selector_gets_what_it_needs() -> None:
    run = drop_hot(mode=Confident())
    record = run.run()
    assert (record.mode, record.num_kept) == ("confident", 60)
    evidence = Evidence(
        num_samples=120,
        scores=run.scores,
        model=run.scorer,
        targets=TRAIN.tensors[1],
        dataset=TRAIN,
    )
    assert torch.equal(run.indices, Confident().select(0.5, evidence, 0))
    assert record == drop_hot(mode=Confident()).run()


class ByMargin:
    name, needs, statistic = "by-margin", ("scores",), Margin()

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        assert isinstance(evidence.scores, Tensor)
        assert evidence.scores.shape == (evidence.num_samples,)
        return evidence.scores.argsort()[: int(ratio * evidence.num_samples)]


def test_an_own_selector_may_ask_for_a_score() -> None:
    run = drop_hot(mode=ByMargin())
    run.run()
    assert torch.equal(run.indices, select(run.statistic("margin"), 0.5, "low"))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (torch.full((120,), torch.nan), "`scores` .*NaN.* 120 of 120"),
        (torch.zeros(120, 1), r"`scores` .*\(120, 1\)"),
        (["a"] * 120, "`scores` .*"),
    ],
)
def test_scores_are_checked_before_an_own_selector_gets_them(scores: Any, words: str) -> None:
    run = drop_hot(mode=ByMargin())
    run.scores = scores
    with pytest.raises((TypeError, ValueError), match=words):
        run.select()


def test_an_own_selector_gets_a_list_of_scores_as_a_tensor() -> None:
    run = drop_hot(mode=ByMargin())
    run.scores = list(range(120))
    assert run.select().tolist() == list(range(60))


def test_a_selector_that_needs_nothing_takes_no_scoring() -> None:
    class First:
        name, needs = "first", ()

        def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
            assert (evidence.scores, evidence.model, evidence.targets) == (None, None, None)
            return torch.arange(int(ratio * evidence.num_samples))

    run = drop_hot(mode=First())
    assert "score" not in run.run().seconds
    assert run.indices.tolist() == list(range(60))


def test_what_an_own_selector_returns_is_checked() -> None:
    class Wrong:
        name, needs = "wrong", ()

        def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
            return torch.arange(7)

    with pytest.raises(ValueError, match="'wrong'.* 60 .* 7"):
        drop_hot(mode=Wrong()).select()


class Nameless:
    needs = ()


class Spaced:
    name, needs, select = "a b", (), select


class Taken:
    name, needs, select = "high", (), select


class Finer(Stratified):
    """A subclass that has the name of its base."""


class Partial:
    name, needs = "partial", ()


class NotCallable:
    name, needs, select = "not_callable", (), 3


class NoSeed:
    name, needs = "no_seed", ()

    def select(self, ratio: float, evidence: Evidence) -> Tensor:
        return torch.arange(60)


class NoNeeds:
    name, needs, select = "no_needs", None, Confident.select


class NeedsOnce:
    name, needs, select = "needs_once", iter(["scores"]), Confident.select  # empty when read again


class Unknown:
    name, needs, select = "unknown", ("gradients",), select


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (Nameless(), "`mode` .*Nameless"),
        (Confident, "`mode` .*Confident|`mode` .*selector"),
        (Spaced(), "`mode` .*'a b'"),
        (Taken(), "`mode` .*'high'"),
        (Confident(name="el2n-low-balanced"), "`mode` .*'el2n-low-balanced'"),
        (Finer(cutoff=0.1), "`mode` .*'stratified-cutoff0.1'"),
        (Partial(), "`mode` .*Partial"),
        (NotCallable(), "'not_callable'.*`?3"),
        (NoSeed(), "'no_seed'.*seed"),
        (NoNeeds(), "`needs`.*None"),
        (NeedsOnce(), "`needs`.*iterator"),
        (Unknown(), "'unknown'.*gradients"),
    ],
)
def test_objects_that_are_no_selectors_are_refused_before_any_work(mode: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        drop_hot(mode=mode)


# --- importances ----------------------------------------------------------------------------------


def large_is_unimportant(name: str, weight: Tensor) -> Tensor:
    return -weight.abs()


@pytest.mark.parametrize("schedule", ["one-shot", "iterative"])
def test_an_own_importance_decides_what_is_pruned(schedule: Any) -> None:
    settings = {"mode": "random", "importance": large_is_unimportant, "schedule": schedule}
    run, plain = drop_hot(**settings), drop_hot(mode="random", schedule=schedule)
    for one in (run, plain):
        one.select()
        one.train()
    twin = run.factory()
    twin.load_state_dict(run.model.state_dict())
    masks, ratio = run.prune(), 0.6 if schedule == "one-shot" else run.pruner.ratios[0]
    expected = magnitude_prune(twin, ratio, scope="layer", importance=large_is_unimportant)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    assert any(not torch.equal(mask, masks[name]) for name, mask in plain.prune().items())
    assert run.finetune().sparsity == pytest.approx(0.6, abs=0.02)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))


def last_channels_first(name: str, weight: Tensor) -> Tensor:
    return torch.arange(len(weight), 0, -1).float()


def test_an_own_importance_decides_which_channels_go() -> None:
    settings = {"model": wide, "structured": True, "prune_ratio": 0.5, "mode": "random"}
    run = drop_hot(**settings, importance=last_channels_first)
    run.select()
    twin = wide()
    twin.load_state_dict(run.train().state_dict())
    prune_channels(twin, 0.5, TRAIN.tensors[0][:1], importance=last_channels_first)
    before = run.model[0].weight.clone()
    run.prune()
    assert torch.equal(run.model[0].weight, twin[0].weight)
    assert torch.equal(run.model[0].weight, before[:8])


def saliency(name: str, weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return (weight * weight.grad).abs()


@pytest.mark.parametrize("structured", [False, True])
def test_an_importance_that_needs_gradients_is_refused_before_any_work(structured: bool) -> None:
    with pytest.raises(ValueError, match="`importance` .*`saliency`"):
        drop_hot(importance=saliency, model=wide, structured=structured)


@pytest.mark.parametrize("structured", [False, True])
def test_an_importance_may_use_gradients_if_there_are_any(structured: bool) -> None:
    def either(name: str, weight: Tensor) -> Tensor:
        return weight.abs() if weight.grad is None else saliency(name, weight)

    settings = {"model": wide, "structured": structured, "mode": "random"}
    plain = drop_hot(**settings, importance=lambda name, weight: weight.abs()).run()
    assert drop_hot(**settings, importance=either).run().finetune_curve == plain.finetune_curve


# --- protocols ------------------------------------------------------------------------------------


@dataclass
class Presentations:
    """Counts how often each sample was wrong."""

    scores: Tensor

    def observe(self, model: nn.Module, batches: Iterable[Any]) -> None:
        model.eval()
        with torch.no_grad():
            wrong = [model(x).argmax(1) != y for x, y, *_ in batches]
        model.train()
        self.scores += torch.cat(wrong)


def count_errors(num_samples: int, seed: int) -> Presentations:
    return Presentations(torch.zeros(num_samples, dtype=torch.int64))


def in_order(scores: Tensor, ratio: float, mode: Any) -> Tensor:
    order = scores.argsort(stable=True, descending=mode == "high")
    return order[: int(ratio * len(scores))]


OWN = RunProtocol(name="errors", counter=count_errors, select=in_order, holds_masks=False)


def test_an_own_protocol_counts_selects_and_drops_masks() -> None:
    run = drop_hot(protocol=OWN, model=Normed, mode="high")
    record = run.run()
    assert record.protocol == "errors"
    assert run.tracker is None
    assert 0 < int(run.scores.sum()) <= 6 * 120
    assert torch.equal(run.indices, in_order(run.scores, 0.5, "high").sort().values)
    assert record.sparsity < 0.3 < Masks.sparsity.fget(run.masks)
    assert record == drop_hot(protocol=OWN, model=Normed, mode="high").run()


@pytest.mark.parametrize("name", ["scores", "masks", "baseline"])
def test_each_fault_of_the_released_code_can_be_named_alone(name: str) -> None:
    protocol = protocol_of(f"released-{name}")
    paper, released = protocol_of("paper"), protocol_of("released")
    hooks = {"scores": ("counter", "select"), "masks": ("holds_masks",)}.get(
        name, ("baseline_in_eval_mode",)
    )
    for hook in ("counter", "select", "holds_masks", "baseline_in_eval_mode"):
        assert getattr(paper, hook) != getattr(released, hook)
        wanted = released if hook in hooks else paper
        assert getattr(protocol, hook) == getattr(wanted, hook)
    run = drop_hot(protocol=f"released-{name}", score_epochs=2)
    record = run.run()
    assert record.protocol == f"released-{name}"
    assert (run.tracker is None) == (name == "scores")
    assert (record.sparsity < 0.5) == (name == "masks")


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "running" in name]


@pytest.mark.parametrize("protocol", ["paper", "released-masks", "released-baseline", "released"])
def test_the_released_baseline_is_trained_in_evaluation_mode(protocol: Any) -> None:
    """Its BatchNorm keeps its first statistics; that of a coreset does not."""
    run = drop_hot(protocol=protocol, model=Normed)
    run.run()
    first = statistics(Normed())
    faulty = protocol in ("released-baseline", "released")
    same = all(map(torch.equal, statistics(run.scorer), first))
    assert same == faulty
    assert run.scorer.training
    assert not all(map(torch.equal, statistics(run.model), first))
    whole = run.replace(data_ratio=1.0, seed=run.seed)
    whole.select()
    assert all(map(torch.equal, statistics(whole.train()), first)) == faulty


def test_the_network_of_step_1_is_the_released_baseline_too() -> None:
    run = drop_hot(protocol="released", model=Normed, score_epochs=3)
    run.score()
    whole = run.replace(data_ratio=1.0)
    whole.select()
    theirs = whole.train().state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in run.scorer.state_dict().items())


@pytest.mark.parametrize(
    ("hooks", "settings", "words"),
    [
        ({"counter": count_errors}, {"forgetting": "toneva"}, "'own'.*forgetting='toneva'"),
        ({"counter": count_errors}, {"mode": Scored("el2n")}, "'own'.*mode='el2n-high'"),
        ({"select": in_order}, {"mode": "k_center"}, "'own'.*mode='k_center'"),
        ({"holds_masks": False}, {"schedule": "gradual"}, "'own'.*schedule='gradual'"),
        ({"holds_masks": False}, {"structured": True}, "'own'.*structured=True"),
    ],
)
def test_settings_that_do_not_go_with_a_hook_are_refused(
    hooks: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        drop_hot(protocol=RunProtocol(name="own", **hooks), **settings)


@pytest.mark.parametrize("name", ["paper", "released", "baseline"])
def test_a_protocol_does_not_take_the_name_of_a_built_in_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"`protocol` .*'{name}'"):
        drop_hot(protocol=RunProtocol(name=name, counter=count_errors))


def test_a_built_in_score_goes_by_its_name() -> None:
    for name, score in DynamicsTracker(1).statistics.items():
        run = drop_hot(mode=Scored(score))
        assert run.configuration == drop_hot(mode=Scored(name)).configuration


def test_hooks_are_checked() -> None:
    with pytest.raises(TypeError, match="`counter` .* 3"):
        RunProtocol(name="own", counter=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`holds_masks` .* 1"):
        RunProtocol(name="own", holds_masks=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`protocol` .*RunProtocol"):
        drop_hot(protocol=Margin())


def test_position_counts_are_of_the_released_code() -> None:
    counter = protocol_of("released").counter(4, 0)
    assert isinstance(counter, PositionCounts)
    assert not isinstance(counter, ForgettingTracker)


# --- identity -------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Any, Any]] = {
    "mode": (Confident(), Confident(offset=1)),
    "score": (Scored(Margin(), "low"), Scored(Margin(scale=2.0), "low")),
    "importance": (large_is_unimportant, last_channels_first),
    "protocol": (OWN, RunProtocol(name="errors", counter=count_errors, holds_masks=False)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_object_is_another_configuration(kind: str) -> None:
    name = "mode" if kind == "score" else kind
    one, other = (drop_hot(**{name: value}).configuration for value in CHANGES[kind])
    assert {key for key in one if one[key] != other[key]} == {name}
    assert json.dumps(one) == json.dumps(drop_hot(**{name: CHANGES[kind][0]}).configuration)
    if kind != "importance":
        assert one[name]["name"] == other[name]["name"]


def test_the_library_s_own_objects_go_by_their_names() -> None:
    for mode in (Stratified(bins=4), Scored("el2n", Stratified(cutoff=0.1), balanced=True)):
        assert drop_hot(mode=mode).configuration["mode"] == mode.name
    assert drop_hot().configuration["protocol"] == "paper"
    assert "importance" not in drop_hot().configuration


def test_what_no_other_process_can_compare_is_named() -> None:
    mode = Confident(offset=0)
    assert unknown_parts(drop_hot(mode=mode).config.settings) == []
    object.__setattr__(mode, "log", (i for i in "ab"))
    assert any("`mode`" in part for part in unknown_parts(drop_hot(mode=mode).config.settings))


def test_the_settings_of_a_run_are_fixed() -> None:
    run = drop_hot()
    assert (run.prune_ratio, run.batch_size, run.config.settings.seed) == (0.6, 16, 0)
    with pytest.raises(AttributeError, match=r"`mode` .*replace\(mode=...\)"):
        run.mode = "low"
    with pytest.raises(AttributeError, match="`fit` "):
        run.fit = None
    with pytest.raises(AttributeError, match="'modes'"):
        _ = run.modes
    with pytest.raises(TypeError, match="`batch_size`"):
        run.replace(batch_size=3)


@pytest.mark.parametrize(
    "score", [Margin(name="aum"), Spread(score=Margin(), name="loss")], ids=["score", "spread"]
)
def test_a_score_with_the_name_of_a_built_in_one_is_refused(score: Any) -> None:
    with pytest.raises(ValueError, match=f"`name`.*'{score.name}'"):
        Scored(score)


class Overwriting:
    name, needs, statistic = "overwriting", ("scores", "targets"), "aum"

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        assert evidence.scores is not None
        assert evidence.targets is not None
        evidence.scores.zero_()
        evidence.targets.zero_()
        return torch.arange(round(ratio * evidence.num_samples))


def test_a_selector_cannot_change_the_scores_and_targets_of_its_caller() -> None:
    run = drop_hot(mode=Overwriting())
    found = run.score().clone()
    run.select()
    assert torch.equal(run.scores, found)
    scores, targets = torch.rand(10), torch.ones(10, dtype=torch.int64)
    select(scores, 0.5, Overwriting(), targets=targets)
    assert scores.all()
    assert targets.all()


class Remembering:
    """Changes what identifies it."""

    name, hard_end = "remembering", "high"

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, first: Any, second: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1
        return first[:, 0] if isinstance(first, Tensor) else second.abs() + self.mean


def test_a_score_or_an_importance_that_changes_its_attributes_is_refused() -> None:
    with pytest.raises(ValueError, match="'remembering'.*`mean`"):
        drop_hot(mode=Scored(Remembering())).score()
    run = drop_hot(mode="random", importance=Remembering())
    run.select()
    run.train()
    with pytest.raises(ValueError, match="`importance`.*`mean`"):
        run.prune()


@pytest.mark.parametrize("hook", ["counter", "select"])
def test_a_hook_that_cannot_take_its_arguments_is_refused_when_it_is_passed(hook: str) -> None:
    hooks: Any = {hook: lambda: None}
    with pytest.raises(TypeError, match=f"`{hook}`.*arguments"):
        RunProtocol(name="mine", **hooks)
