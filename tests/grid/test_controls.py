"""The controls of a run, equal steps, new weights, everything; the same run with other settings."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from helpers.controls import assert_same_weights
from helpers.runs import SETTINGS, TEST, TRAIN, Normed, drop_hot, points
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset

from drophot import DropHot, Masks, evaluate, fit
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


# --- as many steps as the full training set takes ----------------------------------------------


@pytest.mark.slow
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
    epoch = [len(part) for part in torch.arange(len(kept)).split(batch_size)]
    part = len(seen.steps) - rounds * each
    sizes = rounds * epoch + part * [batch_size]
    assert [len(step) for step in seen.steps] == sizes, "whole epochs, then full batches"


class Counted(SGD):
    made: list["Counted"] = []  # noqa: RUF012 - of one test

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.05, momentum=0.9)
        self.taken = 0
        Counted.made.append(self)

    def step(self, closure: Any = None) -> None:
        self.taken += 1
        super().step(closure)


@pytest.mark.parametrize(("equal", "steps"), [(False, 3 * 5), (True, 3 * 8)])
def test_one_optimiser_takes_all_the_steps(
    equal: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its momentum goes on into the epoch that is not whole."""
    run = drop_hot(mode="random", data_ratio=0.6, equal_steps=equal, optimizer=Counted)
    run.select()
    monkeypatch.setattr(Counted, "made", [])
    run.train()
    assert [optimizer.taken for optimizer in Counted.made] == [steps]


def test_the_epoch_that_is_not_whole_is_of_random_samples() -> None:
    """24 steps of 7 an epoch: 3 epochs and 48 of 108 samples."""
    more = []
    for seed in (0, 0, 1):
        seen = Seen()
        run = drop_hot(mode="low", data_ratio=0.9, equal_steps=True, fit=seen, seed=seed)
        run.scores = torch.arange(120)  # the same coreset for each seed
        kept = run.select().tolist()
        run.train()
        assert len(seen.steps) == 24
        more.append(sorted(index for step in seen.steps[21:] for index in step))
        assert len(set(more[-1])) == 48
        assert more[-1] not in (kept[:48], kept[-48:])
    assert more[0] == more[1]
    assert more[0] != more[2]


def test_of_everything_equal_steps_are_the_same_run() -> None:
    plain, equal = (drop_hot(data_ratio=1.0, equal_steps=e) for e in (False, True))
    first, second = plain.run(), equal.run()
    assert_same_weights(plain.model, equal.model)
    assert not first.equal_steps
    assert second == replace(first, equal_steps=True, fingerprint=second.fingerprint)


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


@pytest.mark.parametrize("model", [SETTINGS["model"], Normed])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_new_weights_are_those_of_a_network_just_made(model: Any, scope: Any) -> None:
    """BatchNorm's statistics too, and not those that the training began with."""
    made: list[dict[str, Tensor]] = []

    def factory() -> nn.Module:
        network = model()
        made.append(copy.deepcopy(network.state_dict()))
        return network

    run = drop_hot(model=factory, scope=scope, reinitialize=True, finetune_epochs=0)
    run.run()
    start, new = made[-2:]
    assert run.model is not None
    assert run.masks is not None
    for name, tensor in run.model.state_dict().items():
        wanted = new[name]
        if name in run.masks:
            wanted = torch.where(run.masks[name], wanted, torch.zeros(()))
            assert not torch.equal(new[name], start[name])
        assert torch.equal(tensor, wanted), name


def test_new_weights_keep_their_zeros_through_fine_tuning() -> None:
    settings: dict[str, Any] = {"optimizer": lambda p: SGD(p, lr=0.1, momentum=0.9)}
    run, trained = drop_hot(**settings, reinitialize=True), drop_hot(**settings)
    record, other = run.run(), trained.run()
    assert run.masks is not None
    assert trained.masks is not None
    assert run.model is not None
    for name, mask in Masks.from_zeros(run.model).items():
        assert torch.equal(mask, run.masks[name])
        assert torch.equal(mask, trained.masks[name]), "only the weights are new"
    assert record.sparsity == run.masks.sparsity
    assert record.finetuned_accuracy == evaluate(run.model, TEST)
    assert record.pruned_accuracy == other.pruned_accuracy
    assert record.finetune_curve != other.finetune_curve
    assert record.fingerprint != other.fingerprint


# --- everything -----------------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class Noisy(Dataset):
    """Samples that draw random numbers, so that they are not kept in memory."""

    def __len__(self) -> int:
        return len(TRAIN)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        inputs, target = TRAIN[i]
        return inputs + 0.1 * torch.randn(2), target


@pytest.mark.parametrize("model", [SETTINGS["model"], Normed, Dropped])
@pytest.mark.parametrize(
    "how", [{"forgetting": "paper"}, {"forgetting": "toneva"}, {"protocol": "released"}], ids=str
)
@pytest.mark.parametrize("data", [TRAIN, Noisy()], ids=["kept", "noisy"])
def test_the_scoring_network_is_the_baseline(model: Any, how: Any, data: Any) -> None:
    """Bit for bit, although one was tracked: a grid computes it once."""
    run = drop_hot(model=model, train_set=data, **how, score_epochs=3, train_epochs=3, seed=2)
    run.score()
    baseline = run.replace(data_ratio=1.0)
    baseline.select()
    assert_same_weights(run.scorer, baseline.train())


@pytest.mark.parametrize("how", [{"score_epochs": 4}, {"seed": 1}], ids=str)
def test_with_other_epochs_or_another_seed_it_is_not(how: dict[str, int]) -> None:
    run = drop_hot(**({"score_epochs": 3, "seed": 0} | how))
    run.score()
    baseline = drop_hot(data_ratio=1.0)
    baseline.select()
    with pytest.raises(AssertionError):
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
    assert other.test_set is first.test_set
    anew = drop_hot(**changes)
    assert other.configuration == anew.configuration
    assert other.run() == anew.run()
    assert (other.record == record) == (not changes)
    assert first.record is record
    assert first.run() == record, "the first one is as it was"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_size": 8}, TypeError, "`replace` .*data_ratio.*`batch_size`"),
        ({"scope": "global", "device": "cpu"}, TypeError, "`replace` .*schedule.*`device`"),
        ({"scores": None, "seed": 1}, TypeError, "`replace` .*schedule.*`scores`"),
        ({"data_ratio": "a"}, TypeError, "`data_ratio` .*str"),
        ({"data_ratio": 30}, ValueError, "`data_ratio` .*30"),
        ({"data_ratio": 0.001}, ValueError, "`data_ratio` .*each class.*0.001"),
        ({"mode": "best"}, ValueError, "`mode` .*'best'"),
        ({"prune_ratio": 1}, ValueError, "`prune_ratio` .* 1[,.]"),
        ({"seed": -1}, ValueError, "`seed` .*-1"),
        ({"seed": 1.5}, TypeError, "`seed` .*1.5"),
        ({"equal_steps": 1}, TypeError, "`equal_steps` .* 1[,.]"),
        ({"reinitialize": "no"}, TypeError, "`reinitialize` .*'no'"),
    ],
    ids=str,
)
def test_replace_refuses_what_the_run_refuses(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    run = drop_hot()
    before = run.configuration
    with pytest.raises(error, match=words) as found:
        run.replace(**changes)
    assert run.configuration == before
    if "`replace`" not in words:
        with pytest.raises(error) as anew:
            drop_hot(**changes)
        assert str(found.value) == str(anew.value)


def test_replace_refuses_a_batch_of_one_that_the_model_cannot_train_on() -> None:
    assert drop_hot(data_ratio=49 / 120).replace().run().num_kept == 49, "3 batches and 1 sample"
    with pytest.raises(ValueError, match="`batch_size` .*16.* 49 samples"):
        drop_hot(model=Normed).replace(data_ratio=49 / 120)


def test_settings_are_part_of_the_fingerprint() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"equal_steps": True},
        {"reinitialize": True},
        {"protocol": "released"},
        {"forgetting": "toneva"},
        {"scope": "global"},
        {"seed": 1},
        {"mode": "low"},
        {"data_ratio": 0.4},
        {"prune_ratio": 0.5},
        {"score_epochs": 2},
        {"train_epochs": 1},
        {"finetune_epochs": 1},
        {"batch_size": 17},
    ]
    short = {"score_epochs": 1, "train_epochs": 0, "finetune_epochs": 0}
    found = {drop_hot(**(short | change)).run().fingerprint for change in changes}
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


def test_new_weights_are_masked_once_where_the_mask_is_dropped() -> None:
    """The released protocol holds no mask, and so nothing else would apply it."""
    record = drop_hot(protocol="released", reinitialize=True, finetune_epochs=0).run()
    assert record.sparsity == drop_hot(protocol="released", finetune_epochs=0).run().sparsity > 0.5


def test_without_fine_tuning_the_accuracy_is_that_of_the_network_that_is_left() -> None:
    run = drop_hot(reinitialize=True, finetune_epochs=0)
    record = run.run()
    assert run.model is not None
    assert record.finetuned_accuracy == evaluate(run.model, run.test_set)
    assert record.finetuned_accuracy != record.pruned_accuracy
    plain = drop_hot(finetune_epochs=0).run()
    assert plain.finetuned_accuracy == plain.pruned_accuracy
