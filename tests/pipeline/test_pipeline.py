import builtins
import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from helpers.runs import TEST, TRAIN, Normed, drop_hot, points, small
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import Dataset, TensorDataset

from drophot import IndexedDataset, Masks, Record, evaluate, fit, magnitude_prune, select
from drophot.models import fcnet

# --- the five steps ----------------------------------------------------------------------------


def test_the_record_says_what_happened() -> None:
    run = drop_hot()
    record = run.run()
    assert isinstance(record, Record)
    assert run.record is record
    assert record.model == "fcnet"
    assert (record.mode, record.keep_ratio, record.num_kept) == ("high", 0.5, 60)
    assert (record.prune_ratio, record.seed, record.device) == (0.6, 0, "cpu")
    assert record.finetuned_accuracy == record.finetune_curve[-1]
    assert len(record.finetune_curve) == 2
    assert list(record.seconds) == ["score", "select", "train", "prune", "finetune"]
    assert all(seconds > 0 for seconds in record.seconds.values())
    assert run.model is not None
    assert record.finetuned_accuracy == evaluate(run.model, TEST)
    assert record.sparsity == Masks.from_zeros(run.model).sparsity
    assert record.sparsity == pytest.approx(0.6, abs=0.02)
    assert run.masks is not None
    assert record.sparsity == run.masks.sparsity
    assert run.indices is not None
    assert len(run.indices) == 60


def test_one_seed_gives_one_record_and_another_another() -> None:
    first, second, third = (drop_hot(seed=seed).run() for seed in (5, 5, 6))
    assert first == second
    assert first.finetune_curve != third.finetune_curve
    assert first.fingerprint != third.fingerprint


def test_steps_one_by_one_equal_run() -> None:
    run = drop_hot()
    scores, indices = run.score(), run.select()
    assert run.scores is scores
    assert torch.equal(indices, select(scores, 0.5, "high", seed=0))
    assert run.train() is run.model
    assert run.prune() is run.masks
    assert run.finetune() == drop_hot().run()
    assert run.run() == run.record, "and again from the start"


def test_the_world_outside_is_left_alone() -> None:
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    deterministic = torch.backends.cudnn.deterministic
    drop_hot().run()
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert torch.backends.cudnn.deterministic is deterministic
    torch.manual_seed(99)
    assert drop_hot().run() == drop_hot().run()


@pytest.mark.parametrize("forgetting", ["paper", "toneva"])
def test_tracking_leaves_the_trained_weights_bit_for_bit_the_same(forgetting: Any) -> None:
    weights: list[Tensor] = []

    def watched(model: nn.Module, dataset: Any, epochs: int, **options: Any) -> None:
        fit(model, dataset, epochs, **options)
        weights.extend(p.detach().clone() for p in model.parameters())

    run = drop_hot(forgetting=forgetting, fit=watched, model=Normed)
    run.score()
    torch.manual_seed(0)
    model = Normed()
    fit(
        model,
        TRAIN,
        6,
        optimizer=Adam(model.parameters(), lr=0.02),
        batch_size=16,
        seed=0,
    )
    for one, other in zip(weights, model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("forgetting", ["paper", "toneva"])
def test_scores_follow_their_definition(forgetting: Any) -> None:
    """Replayed with a plain loop and the reference."""
    shown: list[tuple[int, bool]] = []
    inputs, targets = TRAIN.tensors
    torch.manual_seed(0)
    model = small()
    optimizer = Adam(model.parameters(), lr=0.02)
    order = torch.Generator().manual_seed(0)
    for _ in range(6):
        for part in torch.randperm(120, generator=order).split(16):
            logits = model(inputs[part])
            if forgetting == "toneva":
                right = logits.argmax(1) == targets[part]
                shown += zip(part.tolist(), right.tolist(), strict=True)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, targets[part]).backward()
            optimizer.step()
        if forgetting == "paper":
            shown += enumerate((model(inputs).argmax(1) == targets).tolist())
    counts, learned, presented = references.forgetting(120, shown)
    assert sum(counts) > 5, "the case should have events"
    assert not all(learned), "and samples that were never right"
    expected = counts
    if forgetting == "toneva":
        expected = [c if l else p for c, l, p in zip(counts, learned, presented, strict=True)]  # noqa: E741
    run = drop_hot(forgetting=forgetting)
    assert run.score().tolist() == expected
    assert run.tracker is not None
    assert run.tracker.counts.tolist() == counts


def test_run_takes_scores_and_the_record_takes_indices_that_are_there() -> None:
    run = drop_hot()
    run.scores = given = torch.arange(120)
    record = run.run()
    assert run.scores is given
    assert run.indices is not None
    assert run.indices.tolist() == list(range(60, 120))
    assert "score" not in record.seconds
    run.indices = torch.arange(50)
    run.train()
    run.prune()
    assert run.finetune().num_kept == 50


def test_the_coreset_is_made_of_the_samples_that_were_scored() -> None:
    """One sample's index from the data set through the scores into the coreset."""
    seen: list[int] = []

    def watched(model: nn.Module, dataset: Dataset[Any], epochs: int, **options: Any) -> None:
        seen.extend(int(sample[2]) for sample in dataset)  # type: ignore[attr-defined]
        fit(model, dataset, epochs, **options)

    run = drop_hot(fit=watched)
    run.scores = torch.arange(120) % 7
    run.select()
    run.train()
    assert run.indices is not None
    assert seen == run.indices.tolist()
    assert all(int(run.scores[i]) >= 3 for i in seen)


@pytest.mark.parametrize(("mode", "ratio"), [("random", 0.5), ("high", 1), ("low", 1.0)])
def test_scores_are_not_computed_where_nothing_depends_on_them(mode: Any, ratio: float) -> None:
    run = drop_hot(mode=mode, data_ratio=ratio)
    record = run.run()
    assert run.scores is None
    assert "score" not in record.seconds
    assert record.num_kept == 120 * ratio


def test_everything_kept_is_the_same_baseline_in_every_mode() -> None:
    baselines = [drop_hot(mode=mode, data_ratio=1.0).run() for mode in ("high", "low", "random")]
    assert len({record.finetune_curve for record in baselines}) == 1
    assert len({record.trained_accuracy for record in baselines}) == 1


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_weights_stay_zero_through_finetuning(scope: Any) -> None:
    run = drop_hot(scope=scope, finetune_epochs=5, optimizer=partial(torch.optim.AdamW, lr=0.05))
    run.score()
    run.select()
    run.train()
    masks = run.prune()
    before = {name: mask.clone() for name, mask in masks.items()}
    run.finetune()
    assert run.model is not None
    for name, mask in Masks.from_zeros(run.model).items():
        assert torch.equal(mask, before[name])
    shares = [float((~mask).float().mean()) for mask in before.values()]
    if scope == "layer":
        assert shares == pytest.approx([0.6, 0.6], abs=0.02)
    else:
        assert abs(shares[0] - shares[1]) > 0.05


def test_a_loop_that_brings_removed_weights_back_is_an_error() -> None:
    def leaky(model: nn.Module, dataset: Any, epochs: int, *, optimizer: Any, **rest: Any) -> None:
        fit(model, dataset, epochs, optimizer=optimizer, **rest)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1

    with pytest.raises(RuntimeError, match="removed weights are no longer zero"):
        drop_hot(fit=leaky).run()


def test_a_loop_that_steps_another_optimizer_has_masked_gradients() -> None:
    def other(model: nn.Module, dataset: Any, epochs: int, *, optimizer: Any, **rest: Any) -> None:
        fit(model, dataset, epochs, optimizer=SGD(model.parameters(), lr=0.1), **rest)

    run = drop_hot(fit=other)
    assert run.run().sparsity == Masks.from_zeros(run.model).sparsity == run.masks.sparsity


def test_masks_of_the_users_own_take_the_place_of_step_4() -> None:
    run = drop_hot(finetune_epochs=1)
    run.score()
    run.select()
    model = run.train()
    run.masks = magnitude_prune(model, 0.3, scope="global")
    record = run.finetune()
    assert record.sparsity == pytest.approx(0.3, abs=0.01)
    assert record.sparsity == pytest.approx(run.masks.sparsity)


def test_no_epochs_of_finetuning_leave_the_pruned_accuracy() -> None:
    record = drop_hot(finetune_epochs=0).run()
    assert record.finetune_curve == ()
    assert record.finetuned_accuracy == record.pruned_accuracy


def test_random_augmentation_goes_through_a_loader_and_stays_reproducible() -> None:
    class Noisy(Dataset):
        def __len__(self) -> int:
            return len(TRAIN)

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            inputs, target = TRAIN[i]
            return inputs + 0.1 * torch.randn(2) + 0.01 * random.random(), target

    settings: dict[str, Any] = {"train_set": Noisy(), "score_epochs": 2}
    first, second = drop_hot(**settings).run(), drop_hot(**settings).run()
    assert first == second
    assert first.finetune_curve != drop_hot(score_epochs=2).run().finetune_curve


def test_a_loop_of_the_users_own() -> None:
    calls: list[int] = []

    def mine(
        model: nn.Module,
        dataset: Any,
        epochs: int,
        *,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        seed: int,
        on_batch: Callable[[Tensor, Tensor, Tensor], object] | None,
        on_epoch: Callable[[int], object] | None,
    ) -> None:
        calls.append(epochs)
        generator = torch.Generator().manual_seed(seed)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=batch_size, shuffle=True, generator=generator
        )
        for epoch in range(epochs):
            for inputs, targets, index in loader:
                logits = model(inputs)
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, targets).backward()
                optimizer.step()
                if on_batch is not None:
                    on_batch(index, logits, targets)
            if on_epoch is not None:
                on_epoch(epoch)

    for forgetting in ("paper", "toneva"):
        record = drop_hot(fit=mine, forgetting=forgetting).run()
        assert record.sparsity == pytest.approx(0.6, abs=0.02)
        assert record == drop_hot(fit=mine, forgetting=forgetting).run()
    assert calls == 4 * [6, 3, 2]


class Odd:
    """Trains as `fit` does, but for what it does not call, and notes its epochs."""

    def __init__(self, *lacks: str) -> None:
        self.lacks = lacks
        self.epochs = 0

    def __call__(self, model: nn.Module, data: Any, epochs: int, **how: Any) -> None:
        for name in self.lacks:
            how[name] = None
        for epoch in range(epochs):
            self.epochs += 1
            fit(model, data, 1, **(how | {"on_epoch": None}))
            if how["on_epoch"] is not None:
                how["on_epoch"](epoch)


@pytest.mark.parametrize(
    ("settings", "lacks", "epochs"),
    [
        ({}, ["on_epoch"], 6),  # the first training
        ({"mode": "random"}, ["on_epoch"], 3),
        ({"protocol": "released"}, ["on_epoch"], 6),
        ({"forgetting": "toneva"}, ["on_epoch", "on_batch"], 6),
        ({"forgetting": "toneva"}, ["on_batch"], 1),  # the first epoch
    ],
)
def test_a_loop_that_does_not_call_back_is_found_out_as_soon_as_it_shows(
    settings: dict[str, Any], lacks: list[str], epochs: int
) -> None:
    odd = Odd(*lacks)
    with pytest.raises(RuntimeError, match="`fit` .*call"):
        drop_hot(fit=odd, **settings).run()
    assert odd.epochs == epochs


@pytest.mark.parametrize("step", ["score", "train", "finetune"])
def test_a_training_that_diverges_is_an_error_in_the_epoch_in_which_it_does(step: str) -> None:
    seen: list[int] = []
    steps = iter(["score", "train", "finetune"])

    def diverging(model: nn.Module, data: Any, epochs: int, **how: Any) -> None:
        now = next(steps)
        for epoch in range(epochs):
            fit(model, data, 1, **(how | {"on_epoch": None}))
            if now == step and epoch == 1:
                with torch.no_grad():
                    list(model.parameters())[-1][0] = torch.inf
            seen.append(epoch)
            how["on_epoch"](epoch)

    with pytest.raises(ValueError, match=f"`{step}` .* after epoch 2 of 3"):
        drop_hot(score_epochs=3, train_epochs=3, finetune_epochs=3, fit=diverging).run()
    assert seen[-2:] == [0, 1]


class Bare(nn.Module):
    """Weights that are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


class Scaled(nn.Module):
    """Ends in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model": Scaled, "mode": "k_center"}, "model"),
        ({"model": lambda: weight_norm(nn.Linear(2, 3))}, "model"),
        ({"model": lambda: spectral_norm(nn.Linear(2, 3))}, "model"),
        ({"model": lambda: torch_prune.identity(nn.Linear(2, 3), "weight")}, "model"),
        ({"model": Bare}, "model"),
        ({"optimizer": LBFGS}, "optimizer"),
        ({"optimizer": partial(LBFGS, max_iter=2)}, "optimizer"),
    ],
)
def test_what_a_later_step_could_not_do_is_refused_before_the_first(
    changes: dict[str, Any], name: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=f"`{name}` "):
        drop_hot(**changes)


def test_a_loop_of_ones_own_may_have_an_optimiser_with_a_closure() -> None:
    def mine(*_: Any, **__: Any) -> None: ...

    drop_hot(optimizer=LBFGS, fit=mine)


def test_steps_out_of_order_say_what_is_missing() -> None:
    run = drop_hot()
    for step, message in (
        (run.select, r"call `run.score\(\)` first, or set `run.scores`"),
        (run.train, r"call `run.select\(\)` first"),
        (run.prune, r"call `run.train\(\)` first"),
        (run.finetune, r"call `run.prune\(\)` first"),
    ):
        with pytest.raises(RuntimeError, match=message):
            step()
    run.scores = torch.zeros(7)
    with pytest.raises(ValueError, match="`scores` .*120.* 7"):
        run.select()


def test_a_coreset_without_a_class_is_warned_about() -> None:
    run = drop_hot(data_ratio=0.1)
    run.scores = (TRAIN.tensors[1] == 1).long()
    with pytest.warns(UserWarning, match=r"`data_ratio=0.1`.*`mode='high'`.* \[0, 2\]"):
        run.select()


def test_training_anew_takes_the_old_masks_away() -> None:
    run = drop_hot(mode="random")
    run.run()
    run.train()
    with pytest.raises(RuntimeError, match=r"call `run.prune\(\)` first"):
        run.finetune()


def test_the_fingerprint_tells_configurations_apart() -> None:
    base = drop_hot(mode="random").run().fingerprint
    changes: list[dict[str, Any]] = [
        {"data_ratio": 0.4},
        {"prune_ratio": 0.5},
        {"scope": "global"},
        {"optimizer": partial(Adam, lr=0.03)},
        {"finetune_epochs": 1},
        {"model": partial(small, hidden=8)},
        {"train_set": points(121, 0)},
        {"batch_size": 17},
    ]
    found = {drop_hot(**{"mode": "random", **change}).run().fingerprint for change in changes}
    assert len(found | {base}) == len(changes) + 1
    assert drop_hot(mode="random").run().fingerprint == base


def test_progress_shows_each_training(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    drop_hot().run()
    assert capsys.readouterr() == ("", "")
    drop_hot(progress=True).run()
    shown = capsys.readouterr().err
    for step in ("score", "train", "finetune"):
        assert step in shown


def test_progress_without_tqdm_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "drophot\[progress\]"'):
        drop_hot(progress=True)


# --- wrong use, before anything is trained -----------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield torch.zeros(2), 0


shared = small()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data_ratio": 0}, ValueError, r"`data_ratio` .*\(0, 1\].* 0"),
        ({"data_ratio": 25}, ValueError, "`data_ratio` .* 25[.] .*0.25"),
        ({"data_ratio": 0}, ValueError, "`data_ratio` .* 0[.] .*%"),
        ({"prune_ratio": 12.5}, ValueError, "`prune_ratio` .* 12.5.*0.125"),
        ({"prune_ratio": 1}, ValueError, "`prune_ratio` .* 1[.] .*0.8"),
        ({"data_ratio": float("nan")}, ValueError, "`data_ratio` .* nan"),
        ({"data_ratio": "a"}, TypeError, "`data_ratio` .* str"),
        ({"data_ratio": 0.01}, ValueError, r"`data_ratio` .*0.01.* 1 of 120 .* 0\.025"),
        ({"prune_ratio": 1}, ValueError, r"`prune_ratio` .*\[0, 1\).* 1"),
        ({"prune_ratio": -0.2}, ValueError, "`prune_ratio` .* -0.2"),
        ({"mode": "hard"}, ValueError, "`mode` .* 'hard'"),
        ({"scope": "all"}, ValueError, "`scope` .* 'all'"),
        ({"forgetting": "epoch"}, ValueError, "`forgetting` .* 'epoch'"),
        ({"score_epochs": 0}, ValueError, "`score_epochs` .*0"),
        ({"train_epochs": -1}, ValueError, "`train_epochs` .*-1"),
        ({"finetune_epochs": 1.5}, TypeError, "`finetune_epochs` .*1.5"),
        ({"batch_size": 0}, ValueError, "`batch_size` .*0"),
        ({"seed": -1}, ValueError, "`seed` .*-1"),
        ({"seed": "x"}, TypeError, "`seed` .*'x'"),
        ({"model": shared}, TypeError, "`model` .*factory"),
        ({"model": 3}, TypeError, "`model` .*factory"),
        ({"model": lambda: 3}, TypeError, "`model` .*Module.* int"),
        ({"model": lambda: shared}, ValueError, "the same object twice"),
        ({"model": fcnet}, ValueError, r"`model` .*\(B, 2\).* RuntimeError"),
        ({"model": partial(fcnet, 2, 4, 1)}, ValueError, r"`model` .* \(2, 1\)"),
        ({"model": partial(small, num_classes=2)}, ValueError, r"`t.*_set` .*\[0, 2\), .* 2"),
        ({"optimizer": SGD(shared.parameters(), lr=1)}, TypeError, "`optimizer` .* factory"),
        ({"optimizer": list}, TypeError, "`optimizer` .*Optimizer.* list"),
        (
            {"train_set": TensorDataset(torch.zeros(0, 2), torch.zeros(0))},
            ValueError,
            "`train_set`",
        ),
        ({"test_set": []}, ValueError, "`test_set` "),
        (
            {"train_set": IndexedDataset(TRAIN)},
            ValueError,
            "`train_set` .* 3 parts.*Indexed",
        ),
        ({"test_set": IndexedDataset(TEST)}, ValueError, "`test_set` .* 3 parts"),
        ({"train_set": Stream()}, TypeError, "`train_set` .* without a length"),
        ({"test_set": [("x", 0)]}, TypeError, r"`test_set` .*\(str, int\)"),
        (
            {"test_set": TensorDataset(torch.zeros(5, 3), torch.zeros(5).long())},
            ValueError,
            r"`test_set` .* \(2,\) of torch.float32.* \(3,\)",
        ),
        (
            {"test_set": TensorDataset(torch.zeros(5, 2).byte(), torch.zeros(5).long())},
            ValueError,
            "`test_set` .*torch.float32.*torch.uint8",
        ),
        (
            {"train_set": TensorDataset(torch.zeros(9, 2), torch.tensor(8 * [0] + [3]))},
            ValueError,
            r"`train_set` .* \[0, 3\).* 3 at position 8",
        ),
        (
            {"test_set": TensorDataset(torch.zeros(9, 2), torch.tensor(8 * [0] + [-1]))},
            ValueError,
            r"`test_set` .* -1 at position 8",
        ),
        (
            {"train_set": TensorDataset(torch.zeros(9, 2), torch.zeros(9))},
            ValueError,
            "`train_set` .* torch.float32",
        ),
        (
            {"model": Normed, "batch_size": 59},
            ValueError,
            "`batch_size` .* 59.* `data_ratio=0.5` keeps 60",
        ),
        (
            {"model": Normed, "batch_size": 17, "data_ratio": 0.9},
            ValueError,
            "`batch_size` .* 17.* `train_set` has 120",
        ),
    ],
)
def test_wrong_arguments_are_named_before_any_training(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    with pytest.raises(error, match=message):
        drop_hot(**change, fit=never)


def test_a_batch_of_one_is_fine_where_the_model_can_train_on_it() -> None:
    assert drop_hot(batch_size=59).run().num_kept == 60


def test_a_model_that_is_its_own_class_is_a_factory() -> None:
    assert drop_hot(model=Normed).run().model == "Normed"
    assert drop_hot(model=lambda: copy.deepcopy(shared)).run().model == "Sequential"
