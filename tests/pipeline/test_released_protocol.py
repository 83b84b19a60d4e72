"""The released protocol: noise for scores, ties by index, no mask."""

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from helpers.runs import drop_hot, points
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drophot import ForgettingTracker, Masks, coreset, evaluate, fit, magnitude_prune
from drophot.models import fcnet, lenet
from drophot.pipeline.released_protocol import PositionCounts, select


def perfect(size: int, classes: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A classifier that is always right, and its data, balanced."""
    targets = torch.arange(size) % classes
    return nn.Identity(), (nn.functional.one_hot(targets, classes).float(), targets)


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_a_perfect_frozen_classifier_forgets_nothing_and_gets_8_events(seed: int) -> None:
    """In 10 epochs of 10 classes; by the authors' code, 8.07."""
    model, batch = perfect(5000, 10)
    counts, tracker = PositionCounts(5000, seed=seed), ForgettingTracker(5000)
    for _ in range(10):
        counts.observe(model, [batch])
        tracker.observe(model, [(*batch, torch.arange(5000))])
    assert tracker.counts.sum() == 0
    assert counts.scores.float().mean().item() == pytest.approx(9 * (1 - 1 / 10), abs=0.1)
    # As of independent coin tosses: 9 of them, with 0.9.
    assert counts.scores.float().var().item() == pytest.approx(9 * 0.9 * 0.1, rel=0.1)


def test_what_is_counted_is_the_position_not_the_sample() -> None:
    model, batch = perfect(5000, 10)
    counts = PositionCounts(5000, seed=3)
    epochs = []
    for _ in range(10):
        counts.observe(model, [batch])
        epochs.append(counts.scores.clone())
    assert not epochs[0].any(), "nothing to compare with yet"
    events = [(b - a).float() for a, b in pairwise(epochs)]
    for one in events:
        assert one.unique().tolist() == [0, 1]
        assert one.mean().item() == pytest.approx(1 - 1 / 10, abs=0.02)
    for before, after in pairwise(events):
        assert abs(np.corrcoef(before, after)[0, 1]) < 0.05, "consecutive epochs know no other"


@given(st.integers(1, 30), st.integers(2, 5), st.integers(1, 6), st.integers(0, 99))
def test_events_are_those_of_the_walks(size: int, classes: int, epochs: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    logits = [torch.randn(size, classes, generator=chance) for _ in range(epochs)]
    targets = torch.zeros(size, dtype=torch.int64)
    counts = PositionCounts(size, seed=seed)
    for step in logits:
        counts.observe(nn.Identity(), [(part, targets) for part in step.split(7)])
    order, walks = torch.Generator().manual_seed(seed), []
    for step in logits:
        walk = torch.randperm(size, generator=order)
        walks.append(step.argmax(1)[walk].tolist())
    assert counts.scores.tolist() == references.position_counts(walks)


def test_no_label_enters() -> None:
    model, (inputs, targets) = perfect(50, 5)
    found = []
    for labels in (targets, 4 - targets):
        counts = PositionCounts(50, seed=0)
        for _ in range(3):
            counts.observe(model, [(inputs, labels)])
        found.append(counts.scores)
    assert torch.equal(*found)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PositionCounts(4, seed=0).observe(model, [(torch.randn(4, 2), None)])
    assert model.training
    model[1].eval()  # a frozen BatchNorm stays frozen
    PositionCounts(4, seed=0).observe(model, [(torch.randn(4, 2), None)])
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- selection ------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.sampled_from(["low", "high"]),
)
def test_ties_go_by_index(scores: list[int], ratio: float, mode: Any) -> None:
    found = select(torch.tensor(scores), ratio, mode)
    size = len(coreset.select(torch.tensor(scores), ratio, mode))
    sign = 1 if mode == "low" else -1
    ranked = sorted(range(len(scores)), key=lambda i: (sign * scores[i], i))
    assert found.tolist() == sorted(ranked[:size])
    assert found.dtype == torch.int64


def test_the_papers_ties_do_not() -> None:
    scores = torch.zeros(1000)
    assert select(scores, 0.1, "high").tolist() == list(range(100))
    assert coreset.select(scores, 0.1, "high").tolist() != list(range(100))


small_fcnet = partial(fcnet, hidden=8)


# --- the run --------------------------------------------------------------------------------------


def smooth() -> nn.Module:
    """No unit that is dead, whose weights could not grow back."""
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))


def test_weights_grow_back() -> None:
    released = drop_hot(model=smooth, protocol="released", prune_ratio=0.8)
    record, paper = released.run(), drop_hot(model=smooth, prune_ratio=0.8).run()
    assert (record.protocol, paper.protocol) == ("released", "paper")
    assert paper.sparsity == pytest.approx(0.8, abs=0.02)
    assert record.sparsity < 0.05
    assert released.model is not None
    assert Masks.from_zeros(released.model).sparsity == record.sparsity
    assert record == drop_hot(model=smooth, protocol="released", prune_ratio=0.8).run()


def test_before_fine_tuning_the_mask_is_there_layer_by_layer() -> None:
    run = drop_hot(protocol="released", prune_ratio=0.8)
    run.score()
    run.select()
    model = run.train()
    twin = run.factory()
    twin.load_state_dict(model.state_dict())
    run.prune()
    magnitude_prune(twin, 0.8, scope="layer")
    theirs = twin.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in model.state_dict().items())


def test_pruning_is_the_papers_and_fine_tuning_is_not() -> None:
    """A random coreset is the same in both protocols, and so is what is trained on it."""
    released = drop_hot(protocol="released", mode="random", prune_ratio=0.8)
    paper = drop_hot(mode="random", prune_ratio=0.8)
    first, second = released.run(), paper.run()
    assert released.scores is None
    assert released.indices is not None
    assert paper.indices is not None
    assert torch.equal(released.indices, paper.indices)
    assert first.trained_accuracy == second.trained_accuracy
    assert first.pruned_accuracy == second.pruned_accuracy != first.trained_accuracy
    assert first.finetune_curve != second.finetune_curve
    assert first.sparsity < second.sparsity
    assert first == drop_hot(protocol="released", mode="random", prune_ratio=0.8).run()


@pytest.mark.parametrize("seed", [0, 3])
def test_scores_are_the_scrambled_ones_and_the_coreset_goes_by_index(seed: int) -> None:
    """Replayed from the predictions after each epoch of step 1, which the labels do not enter."""
    inputs = points(120, 0).tensors[0]
    walks: list[list[int]] = []
    order = torch.Generator().manual_seed(seed)

    def watched(model: nn.Module, dataset: Any, epochs: int, **rest: Any) -> None:
        asked = rest.pop("on_epoch")

        def on_epoch(epoch: int) -> None:
            with torch.no_grad():
                predictions = model(inputs).argmax(1)
            walks.append(predictions[torch.randperm(120, generator=order)].tolist())
            asked(epoch)

        fit(model, dataset, epochs, on_epoch=on_epoch, **rest)

    run = drop_hot(protocol="released", fit=watched, seed=seed)
    scores = run.score()
    assert scores.tolist() == references.position_counts(walks)
    assert len(walks) == 6
    assert run.scores is scores
    assert run.tracker is None
    assert run.scorer is not None
    assert run.scorer.training, "as fit left it"
    assert not torch.equal(scores, drop_hot(seed=seed).score())
    assert torch.equal(run.select(), select(scores, 0.5, "high"))
    low = run.replace(mode="low")
    low.scores = scores
    assert torch.equal(low.select(), select(scores, 0.5, "low"))


def test_random_and_everything_work_too() -> None:
    assert drop_hot(protocol="released", mode="random").run().mode == "random"
    assert drop_hot(protocol="released", data_ratio=1.0).run().mode == "baseline"


def test_equal_scores_keep_the_order_of_the_data() -> None:
    first, last = list(range(60)), list(range(60, 120))
    for mode in ("high", "low"):
        released, paper = drop_hot(protocol="released", mode=mode), drop_hot(mode=mode)
        released.scores = paper.scores = torch.zeros(120)
        assert released.select().tolist() == first
        assert paper.select().tolist() not in (first, last)


@pytest.mark.parametrize("network", [small_fcnet, lenet])
def test_a_baseline_without_batchnorm_does_not_change_by_a_bit(network: Any) -> None:
    """The paper's networks for MNIST are the same in evaluation mode."""
    chance = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(12, 1, 28, 28, generator=chance),
        torch.randint(0, 10, (12,), generator=chance),
    )
    states = []
    for protocol in ("paper", "released-baseline"):
        run = drop_hot(
            model=network,
            train_set=data,
            test_set=data,
            protocol=protocol,
            data_ratio=1.0,
            score_epochs=2,
            train_epochs=2,
        )
        record = run.run()
        assert (record.mode, record.protocol) == ("baseline", protocol)
        states.append(run.model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_controls_go_with_it() -> None:
    run = drop_hot(model=smooth, protocol="released", equal_steps=True, reinitialize=True)
    record = run.run()
    assert (record.protocol, record.equal_steps, record.reinitialized) == ("released", True, True)
    assert record.sparsity < 0.05, "new weights grow back too"
    assert run.model is not None
    assert record.finetuned_accuracy == evaluate(run.model, points(60, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "authors"}, "`protocol` .*paper.*released.*'authors'"),
        ({"protocol": "released", "forgetting": "toneva"}, "released.*forgetting='toneva'"),
        ({"protocol": "released", "scope": "global"}, "released.*scope='global'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        drop_hot(**changes)


def test_a_loop_that_does_not_call_back_is_refused() -> None:
    """Or all scores would be zero, and the coreset the first samples of the file."""

    def silent(model: nn.Module, dataset: Any, epochs: int, **rest: Any) -> None:
        pass

    with pytest.raises(RuntimeError, match="`fit` .*`on_epoch`.* 6 times.* 0 calls"):
        drop_hot(protocol="released", fit=silent).score()


@pytest.mark.parametrize(
    ("scores", "ratio", "mode", "words"),
    [
        (torch.zeros(4), 7, "high", "`ratio`"),
        (torch.zeros(4), 0.5, "random", "`mode` .*'random'"),
        (torch.zeros(4), 0.5, "Low", "`mode` .*'Low'"),
        (torch.tensor([0.0, float("nan")]), 0.5, "low", "NaN"),
        (torch.zeros(4, 2), 0.5, "low", "`scores`"),
    ],
)
def test_select_refuses_what_the_papers_does(
    scores: torch.Tensor, ratio: Any, mode: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        select(scores, ratio, mode)
