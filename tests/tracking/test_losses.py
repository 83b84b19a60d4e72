"""Scores from losses, for models without logits (B, C)."""

import numpy as np
import pytest
import torch
from helpers import references
from torch.nn import functional as F

from drophot import DynamicsTracker, ForgettingTracker
from drophot.tracking import (
    DUAL,
    FirstLearned,
    Last,
    MovingAverage,
    Spread,
    WindowSpread,
    sequence_losses,
)
from drophot.tracking.presenter import Presenter
from drophot.tracking.state import State
from drophot.tracking.statistics import LOSS


def tracker() -> DynamicsTracker:
    spread = WindowSpread(score="loss", window=3, name="loss_spread")
    scores = [Last(), MovingAverage(decay=0.5), spread, Spread(score=LOSS, name="loss_std")]
    return DynamicsTracker(3, statistics=["loss", *scores])


def test_scores_are_those_of_the_losses_that_were_shown() -> None:
    chance = np.random.default_rng(0)
    shown: list[list[float]] = [[], [], []]
    found = tracker()
    for _ in range(6):
        index, losses = chance.integers(0, 3, 5), chance.random(5)
        found.update_loss(torch.from_numpy(index), torch.from_numpy(losses).requires_grad_())
        for sample, loss in zip(index, losses, strict=True):
            shown[sample].append(loss)
    for name, definition in {
        "loss": np.mean,
        "loss_std": np.std,
        "last_loss": lambda v: v[-1],
        "loss_average": lambda v: np.average(v, weights=2.0 ** np.arange(len(v))),
        "loss_spread": lambda v: references.window_spread(v, 3),
    }.items():
        expected = [definition(values) for values in shown]
        np.testing.assert_allclose(found.scores(name), expected, rtol=1e-4, err_msg=name)
    assert found.presentations.tolist() == [len(values) for values in shown]


def test_losses_of_logits_give_what_the_logits_give() -> None:
    logits, targets = torch.randn(3, 4), torch.tensor([0, 3, 1])
    one, other = tracker(), tracker()
    for _ in range(3):
        one.update(torch.arange(3), logits, targets)
        other.update_loss(torch.arange(3), F.cross_entropy(logits, targets, reduction="none"))
    for name in one.statistics:
        assert torch.allclose(one.scores(name), other.scores(name), atol=1e-6), name


INDEX, ONE_LOSS = torch.tensor([1, 2]), torch.tensor([1.0, 2.0])
WITH_LOGITS = (INDEX, torch.eye(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("when", ["at once", "when it is read", "after it was loaded"])
@pytest.mark.parametrize("first", ["logits", "loss"])
def test_a_sample_is_presented_with_logits_or_by_its_loss(
    when: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this error, a sample would be forgotten at each loss."""
    found = DynamicsTracker(4, statistics=["loss"])
    by_logits, by_loss = (
        lambda: found.update(*WITH_LOGITS),
        lambda: found.update_loss(INDEX, ONE_LOSS),
    )
    before, after = (by_logits, by_loss) if first == "logits" else (by_loss, by_logits)
    before()
    assert found.columns()["target"].tolist() == [
        -1,
        *((0, 1) if first == "logits" else (-1, -1)),
        -1,
    ]
    found.update_loss(torch.tensor([0]), ONE_LOSS[:1])  # another sample
    if when == "after it was loaded":
        saved = found.state_dict()
        found = DynamicsTracker(4, statistics=["loss"])
        found.load_state_dict(saved)
    if when == "when it is read":
        monkeypatch.setattr(State, "can_sync", False)  # as on a GPU
        after()
        monkeypatch.undo()
    with pytest.raises(ValueError, match="`update_loss`.*sample 1 by both"):
        found.scores("loss", missing="nan") if when == "when it is read" else after()
    if when != "when it is read":
        assert found.presentations.tolist() == [1, 1, 1, 0], "nothing is counted"


def test_sequence_losses_leave_padding_out_and_shift() -> None:
    logits = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 4:] = -100
    labels[1] = -100
    expected: list[list[float]] = [[], [], []]
    for row in range(3):
        for place in range(1, 6):
            if labels[row, place] != -100:
                p = references.softmax(logits[row, place - 1].double().numpy())
                expected[row].append(-np.log(p[labels[row, place]]))
    found = sequence_losses(logits.requires_grad_(), labels, shift=True)
    assert not found.requires_grad
    assert found.isnan().tolist() == [False, True, False]
    np.testing.assert_allclose(
        found[[0, 2]], [np.mean(expected[0]), np.mean(expected[2])], rtol=1e-5
    )
    plain = sequence_losses(logits[:, :-1], labels[:, 1:], shift=False)
    assert torch.equal(plain.nan_to_num(0), found.nan_to_num(0))
    assert sequence_losses(logits.bfloat16(), labels, shift=False).dtype == torch.float32


def test_wrong_use_is_named() -> None:
    index, loss = torch.arange(2), torch.rand(2)
    for statistics in (["loss", "aum"], [FirstLearned()], [DUAL()], [Last(score="el2n")]):
        mixed = DynamicsTracker(3, statistics=statistics)
        name = next(name for name in mixed.statistics if name != "loss")
        with pytest.raises(TypeError, match=f"`update_loss`.*'{name}'"):
            mixed.update_loss(index, loss)
    found = tracker()
    with pytest.raises(ValueError, match=r"`loss`.*\(2, 1\)"):
        found.update_loss(index, loss[:, None])
    with pytest.raises(TypeError, match="`loss`.*int64"):
        found.update_loss(index, index)
    with pytest.raises(ValueError, match=r"`index`.* 3\)?.* 5"):
        found.update_loss(torch.tensor([0, 5]), loss)
    assert found.presentations.sum() == 0
    found.update_loss(index, loss)
    for name in ("forgetting", "hardest"):
        with pytest.raises(ValueError, match=f"{name}.* 2 of 3.*`update_loss`"):
            found.scores(name, missing="nan")
    with pytest.raises(ValueError, match=r"`logits`.*\(2, 3\)"):
        sequence_losses(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.int64), shift=True)


def test_a_trainers_batches_are_presented_by_their_losses() -> None:
    found = DynamicsTracker(3, statistics=["loss"])
    presenter = Presenter(found, "Owner", None, None, None, lambda batch, outputs: outputs)
    taken = presenter.take({"tokens": torch.zeros(2, 4), "index": torch.tensor([2, 0])})
    presenter.present(taken, torch.tensor([torch.nan, 3.0]), None, "")
    assert found.presentations.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match=r"`loss`.*\(\)"):
        presenter.present(taken, torch.tensor(3.0), None, "")
    with pytest.raises(TypeError, match="`losses`.*ForgettingTracker"):
        Presenter(ForgettingTracker(3), "Owner", None, None, None, lambda batch, outputs: outputs)
    with pytest.raises(ValueError, match="`correct`.*`losses`"):
        Presenter(ForgettingTracker(3), "Owner", None, None, lambda b, o: o, lambda b, o: o)


@pytest.mark.parametrize("decay", [0.9, 0.9999, 1 - 1e-9])
def test_an_average_of_one_loss_is_that_loss(decay: float) -> None:
    found = DynamicsTracker(1, statistics=[MovingAverage(decay=decay)])
    found.update_loss(torch.tensor([0]), torch.tensor([3.0]))
    assert found.scores("loss_average").item() == pytest.approx(3, rel=1e-6)


def test_labels_that_are_no_tokens_are_named() -> None:
    logits = torch.zeros(1, 3, 5)
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="`labels`.*" + str(dtype)):
            sequence_losses(logits, torch.ones(1, 3, dtype=dtype), shift=False)
    for label in (-1, 5):
        with pytest.raises(ValueError, match=f"`labels`.* 5.* {label}"):
            sequence_losses(logits, torch.tensor([[0, -100, label]]), shift=False)
    with pytest.raises(TypeError, match="`score`.* int"):
        Last(score=5)  # type: ignore[arg-type]
