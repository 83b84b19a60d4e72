"""The controls of a run, equal steps, new weights, everything; the same run with other settings."""

import json
from collections import Counter
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import SETTINGS, TRAIN, Normed, drop_hot, points
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset

from drophot import DropHot, evaluate, fit
from drophot.training import batches, in_memory


class Seen:
    """A training loop that keeps which samples each training step was made from."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def __call__(self, model: nn.Module, dataset: Dataset[Any], epochs: int, **rest: Any) -> None:
        asked = rest.pop("on_batch")

        def on_batch(index: Tensor, logits: Tensor, targets: Tensor) -> None:
            self.steps.append(index.tolist())
            if asked is not None:
                asked(index, logits, targets)

        fit(model, dataset, epochs, on_batch=on_batch, **rest)


def assert_same_weights(one: nn.Module | None, other: nn.Module | None) -> None:
    assert one is not None
    assert other is not None
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


# --- as many steps as the full training set takes ----------------------------------------------


@given(
    st.integers(20, 60),
    st.floats(0.15, 1.0),
    st.integers(2, 70),
    st.integers(0, 4),
    st.booleans(),
)
@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore:.*leave no sample of classes")
def test_equal_steps_are_equal(
    size: int, ratio: float, batch_size: int, epochs: int, equal: bool
) -> None:
    seen = Seen()
    run = drop_hot(
        train_set=points(size, 0),
        data_ratio=ratio,
        mode="random",
        batch_size=batch_size,
        train_epochs=epochs,
        equal_steps=equal,
        fit=seen,
    )
    kept = run.select().tolist()
    run.train()
    whole, each = ceil(size / batch_size), ceil(len(kept) / batch_size)
    assert len(seen.steps) == epochs * (whole if equal else each)
    times = Counter(index for step in seen.steps for index in step)
    assert set(times) == (set(kept) if epochs else set())
    rounds = epochs * whole // each if equal else epochs
    assert set(times.values()) <= {rounds, rounds + equal}, "as evenly as can be"


def test_of_everything_equal_steps_are_the_same_run() -> None:
    plain, equal = (drop_hot(data_ratio=1.0, equal_steps=e) for e in (False, True))
    for run in (plain, equal):
        run.run()
    assert_same_weights(plain.model, equal.model)
    assert plain.record is not None
    assert equal.record is not None
    assert equal.record.equal_steps
    assert not plain.record.equal_steps
    assert plain.record.finetune_curve == equal.record.finetune_curve


def test_more_steps_are_more_training() -> None:
    few, many = (drop_hot(data_ratio=0.2, equal_steps=e, mode="random") for e in (False, True))
    few.run()
    many.run()
    assert many.trained_accuracy > few.trained_accuracy


# --- new weights under the mask -------------------------------------------------------------------


def test_new_weights_under_the_mask() -> None:
    run = drop_hot(reinitialize=True, finetune_epochs=0)
    trained = drop_hot(finetune_epochs=0)
    record, other = run.run(), trained.run()
    assert record.reinitialized
    assert not other.reinitialized
    assert record.pruned_accuracy == other.pruned_accuracy, "pruned as it was trained"
    assert run.masks is not None
    assert trained.model is not None
    assert run.model is not None
    before = trained.model.state_dict()
    for name, tensor in run.model.state_dict().items():
        if name in run.masks:
            assert torch.equal(tensor == 0, ~run.masks[name]), "new, and zero where pruned"
            kept = run.masks[name]
            assert not torch.isin(tensor[kept], before[name][kept]).any()
        else:
            assert not torch.equal(tensor, before[name])
    # They are the factory's own, seeded: the same again, and others for another seed.
    again, others = (
        drop_hot(reinitialize=True, finetune_epochs=0),
        drop_hot(reinitialize=True, finetune_epochs=0, seed=1),
    )
    again.run()
    others.run()
    assert_same_weights(run.model, again.model)
    with pytest.raises(AssertionError):
        assert_same_weights(run.model, others.model)


def test_new_weights_keep_their_zeros_through_fine_tuning() -> None:
    run = drop_hot(reinitialize=True, optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9))
    record = run.run()
    assert run.masks is not None
    assert record.sparsity == run.masks.sparsity
    assert run.model is not None
    assert record.finetuned_accuracy == evaluate(run.model, points(60, 1))


# --- everything -----------------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


@pytest.mark.parametrize("model", [SETTINGS["model"], Normed, Dropped])
@pytest.mark.parametrize("forgetting", ["paper", "toneva"])
def test_the_scoring_network_is_the_baseline(model: Any, forgetting: str) -> None:
    """Bit for bit, although one was tracked: a grid computes it once."""
    run = drop_hot(model=model, forgetting=forgetting, score_epochs=3, train_epochs=3)
    run.score()
    baseline = run.replace(data_ratio=1.0)
    baseline.select()
    assert_same_weights(run.scorer, baseline.train())


def test_a_record_of_everything_is_a_baseline() -> None:
    assert drop_hot(data_ratio=1.0, mode="low").run().mode == "baseline"
    assert drop_hot(data_ratio=0.999, mode="low").run().mode == "baseline", "all 120 of 120"
    assert drop_hot(mode="low").run().mode == "low"


# --- other settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data_ratio": 0.3},
        {"mode": "random"},
        {"prune_ratio": 0},
        {"seed": 4},
        {"equal_steps": True},
        {"reinitialize": True},
        {"data_ratio": 0.4, "mode": "low", "seed": 2},
    ],
    ids=str,
)
def test_replace_is_the_run_with_those_settings(changes: dict[str, Any]) -> None:
    first = drop_hot()
    record = first.run()
    other = first.replace(**changes)
    for name in ("tracker", "scores", "scorer", "indices", "model", "masks", "record"):
        assert getattr(other, name) is None, "no results yet"
    assert dict(other.seconds) == {}
    assert other.train_set is first.train_set
    anew = drop_hot(**changes)
    assert other.configuration == anew.configuration
    assert other.run() == anew.run()
    assert (other.record == record) == (not changes)
    assert first.record is record
    assert first.run() == record, "the first one is as it was"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_size": 8}, TypeError, "`replace` should be given data_ratio, .*Found batch_size"),
        ({"data_ratio": 30}, ValueError, "`data_ratio` .*Found 30"),
        ({"data_ratio": 0.001}, ValueError, "should keep a sample of each class"),
        ({"mode": "best"}, ValueError, "`mode` .*Found 'best'"),
        ({"prune_ratio": 1}, ValueError, "`prune_ratio` .*Found 1"),
        ({"seed": -1}, ValueError, "`seed` .*Found -1"),
        ({"equal_steps": 1}, TypeError, "`equal_steps` should be True or False. Found 1"),
        ({"reinitialize": "no"}, TypeError, "`reinitialize` should be True or False. Found 'no'"),
    ],
    ids=str,
)
def test_replace_refuses_what_the_run_refuses(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        drop_hot().replace(**changes)
    if "batch_size" not in changes:
        with pytest.raises(error, match=words):
            drop_hot(**changes)


def test_settings_are_part_of_the_fingerprint() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"equal_steps": True},
        {"reinitialize": True},
        {"protocol": "released"},
        {"seed": 1},
        {"data_ratio": 0.4},
    ]
    found = {
        drop_hot(**change, train_epochs=0, finetune_epochs=0).run().fingerprint
        for change in changes
    }
    assert len(found) == len(changes)


def test_seen_sees_what_fit_does() -> None:
    """The helper of this file, or its tests could not fail."""
    seen = Seen()
    data = in_memory(drop_hot().train_set, "cpu")
    model = SETTINGS["model"]()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen(model, data, 2, optimizer=optimizer, batch_size=50, seed=1, on_batch=None, on_epoch=None)
    order = torch.Generator().manual_seed(1)
    wanted = [
        batch[2].tolist()
        for _ in range(2)
        for batch in batches(data, 50, torch.device("cpu"), shuffle=order)
    ]
    assert seen.steps == wanted
    assert isinstance(drop_hot(), DropHot)
    assert len(TRAIN) == 120


def test_numbers_of_numpy_are_numbers() -> None:
    run = drop_hot(
        data_ratio=np.float32(0.5),
        prune_ratio=np.float64(0.5),
        seed=np.int64(0),
        batch_size=np.int32(16),
        score_epochs=np.int64(6),
    )
    assert json.loads(json.dumps(run.configuration)) == drop_hot(prune_ratio=0.5).configuration
    assert run.run() == drop_hot(prune_ratio=0.5).run()
    assert run.replace(seed=np.int64(3)).configuration["seed"] == 3
