"""The data map and the sheet of suspicious images."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset
from drophot.report import plot_data_map, plot_score_change, plot_suspects
from drophot.stats import forgotten_by_pruning
from drophot.tracking import DUAL

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")


def tracker(num_samples: int = 12) -> DynamicsTracker:
    """Confident of all samples but 5; sample 2 was forgotten once, and the last never presented."""
    found = DynamicsTracker(num_samples)
    index = torch.arange(num_samples - 1)
    for epoch in range(2):
        logits = 3 * nn_one_hot(index % 3) * (1 + index[:, None] / 100)
        if epoch:
            logits[2] = logits[2].roll(1)
        targets = index % 3
        targets[5] = 0
        found.update(index, logits, targets)
    return found


def nn_one_hot(classes: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(classes, 3).float()


def test_the_map_has_a_point_for_each_sample_presented() -> None:
    found, ax = tracker(), None
    ax = plot_data_map(found)
    points = np.concatenate([part.get_offsets() for part in ax.collections])
    columns = found.columns()
    wanted = np.stack([columns["variability"], columns["confidence"]], 1)[:11]
    assert sorted(map(tuple, points.tolist())) == sorted(map(tuple, wanted.tolist()))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["never forgotten", "forgotten once", "never correct"]
    (forgotten,) = [part for part in ax.collections if part.get_label() == "forgotten once"]
    assert forgotten.get_offsets().tolist() == [wanted[2].tolist()]
    assert plot_data_map(found, ax=ax) is ax


def test_a_large_map_draws_a_fixed_part_of_the_samples() -> None:
    first, second = (plot_data_map(tracker(30_000)) for _ in range(2))
    parts = [[part.get_offsets() for part in ax.collections] for ax in (first, second)]
    assert sum(map(len, parts[0])) == 20_000
    assert all(np.array_equal(a, b) for a, b in zip(*parts, strict=True))


LABELS = torch.arange(12) % 3
LABELS[5] = 0
IMAGES: dict[str, Callable[[Tensor], Any]] = {
    "dataset": lambda x: IndexedDataset(TensorDataset(x, LABELS)),
    "no labels": lambda x: IndexedDataset(TensorDataset(x)),
    "tensor": lambda x: x,
    "gray": lambda x: x[:, 0],
    "one channel": lambda x: x[:, :1],
    "arrays": lambda x: [
        (image.permute(1, 2, 0).numpy(), y) for image, y in zip(x, LABELS.numpy(), strict=True)
    ],
    "two numbers": lambda x: [(image, torch.zeros(2)) for image in x],
    "bytes": lambda x: [(255 * image).byte().permute(1, 2, 0).numpy() for image in x],
}


@pytest.mark.parametrize("kind", IMAGES)
def test_the_sheet_shows_the_hardest_samples_first(kind: str) -> None:
    x = torch.linspace(-1, 1, 12 * 3 * 4 * 4).view(12, 3, 4, 4)
    x[5] = x[5].flip(1)
    figure = plot_suspects(tracker(), IMAGES[kind](x), number=7, classes=["a", "b$", "c"])
    assert [ax.get_xlabel() for ax in figure.axes][:2] == ["no. 5", "no. 2"]
    assert len(figure.axes) == 7
    assert figure.axes[0].get_title() == "a"  # the label that it was given
    if kind == "dataset":
        (drawn,) = figure.axes[0].get_images()
        wanted = (x[5] - x[5].min()) / (x[5].max() - x[5].min())
        np.testing.assert_allclose(drawn.get_array(), wanted.permute(1, 2, 0).numpy(), atol=1e-5)
        figure.savefig(BytesIO(), dpi=20)


def test_the_sheet_takes_pil_images_and_any_statistic() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    images = [(image.new("RGB", (4, 4)), label) for label in LABELS.tolist()]
    figure = plot_suspects(tracker(), images, statistic="confidence", number=100)
    assert figure.axes[0].get_xlabel() == "no. 5"
    assert len(figure.axes) == 11  # all that were presented


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_have_their_channels_first_or_last(channels: int) -> None:
    x = torch.randint(0, 256, (12, channels, 5, 6), dtype=torch.uint8)
    wanted = x[5].permute(1, 2, 0).squeeze(2).numpy()
    last = x.permute(0, 2, 3, 1)
    for images in (x, last, x.numpy(), last.numpy()):
        (drawn,) = plot_suspects(tracker(), images, number=1).axes[0].get_images()
        np.testing.assert_array_equal(drawn.get_array(), wanted)


def test_labels_of_a_dataset_in_another_order_are_an_error() -> None:
    images = torch.zeros(12, 3, 4, 4)
    for other in (TensorDataset(images, LABELS.roll(1)), [(x, 2.0) for x in images]):
        if isinstance(other, list):
            plot_suspects(tracker(), other)  # no classes
            continue
        for dataset in (other, IndexedDataset(other)):
            with pytest.raises(ValueError, match=r"`images`.*label 1.*sample 5.* 0"):
                plot_suspects(tracker(), dataset, number=1)


def test_a_tracker_that_has_seen_no_targets_shows_the_labels_of_the_dataset() -> None:
    losses = DynamicsTracker(12, statistics=["loss"])
    losses.update_loss(torch.arange(12), torch.arange(12.0))
    images = torch.zeros(12, 3, 4, 4)
    for dataset, wanted in ((TensorDataset(images, LABELS), "c"), (images, "")):
        figure = plot_suspects(losses, dataset, statistic="loss", number=1, classes=list("abc"))
        assert figure.axes[0].get_title() == wanted


def test_the_sheet_is_drawn_into_a_given_figure() -> None:
    from matplotlib.figure import Figure

    images = torch.zeros(12, 3, 4, 4)
    whole = Figure(layout="constrained")
    left, right = np.ravel(whole.subfigures(1, 2))
    assert plot_suspects(tracker(), images, number=2, figure=left) is whole
    assert [len(part.axes) for part in (left, right)] == [2, 0]
    with pytest.raises(ValueError, match="label 1"):
        plot_suspects(tracker(), TensorDataset(images, LABELS.roll(1)), figure=right)
    assert not right.axes
    plain = Figure()
    assert plot_suspects(tracker(), images, number=3, figure=plain) is plain
    assert len(plain.axes) == 3


def test_wrong_arguments_are_named() -> None:
    images = torch.zeros(12, 3, 4, 4)
    with pytest.raises(TypeError, match=r"`tracker`.*ForgettingTracker"):
        plot_data_map(ForgettingTracker(12))
    with pytest.raises(TypeError, match=r"`tracker`.*Tensor"):
        plot_suspects(images, tracker())
    with pytest.raises(ValueError, match=r"`tracker`.*'confidence'"):
        plot_data_map(DynamicsTracker(12, statistics=["aum"]))
    with pytest.raises(ValueError, match="`tracker`"):
        plot_data_map(DynamicsTracker(12))
    with pytest.raises(ValueError, match="`tracker`"):
        plot_suspects(DynamicsTracker(12), images)
    with pytest.raises(ValueError, match=r"`statistic`.*'forgetting'"):
        plot_suspects(tracker(), images, statistic="forgetting")
    with pytest.raises(TypeError, match=r"`images`.*dict.*5"):
        plot_suspects(tracker(), [{"image": image} for image in images])
    with pytest.raises(TypeError, match=r"`images`.*Tensor.*\(2, 5, 5\).*5"):
        plot_suspects(tracker(), torch.zeros(12, 2, 5, 5))
    dual = DynamicsTracker(12, statistics=[DUAL(window=3)])
    dual.update(torch.arange(12), torch.randn(12, 3), LABELS)
    with pytest.raises(ValueError, match=r"`tracker`.*'dual'"):
        plot_suspects(dual, images, statistic="dual")
    for number in (0, -1):
        with pytest.raises(ValueError, match=rf"`number`.*{number}"):
            plot_suspects(tracker(), images, number=number)
    for count in (6, 60):
        with pytest.raises(ValueError, match=rf"`images`.*12.*{count}"):
            plot_suspects(tracker(), torch.zeros(count, 3, 4, 4))
    for classes in (["a"], {0: "a"}):
        with pytest.raises(ValueError, match=r"`classes`.*[12]"):
            plot_suspects(tracker(), images, classes=classes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_leave_the_others_visible(value: float) -> None:
    images = torch.linspace(0, 1, 16).view(1, 4, 4).repeat(12, 1, 1).bfloat16()
    images[:, 1, 1] = value
    (drawn,) = plot_suspects(tracker(), images, number=1).axes[0].get_images()
    assert drawn.get_array()[0, 0] == 0
    assert drawn.get_array()[3, 3] == 1
    plot_suspects(tracker(), torch.full((12, 4, 4), value), number=1)


def points_of(ax: Any) -> dict[str, list[list[float]]]:
    return {part.get_label(): part.get_offsets().tolist() for part in ax.collections}


def test_scores_before_and_after_are_drawn_sample_by_sample() -> None:
    before = torch.tensor([3.0, 1.0, 2.0, -1.0, np.nan, -2.0], dtype=torch.float64)
    after = [2.5, -1.5, 1.0, 0.5, 1.0, -np.inf]
    found = forgotten_by_pruning(before > 0, np.array(after) > 0, [0] * 6)
    ax = plot_score_change(before, after, found, name="margin")
    assert points_of(ax) == {
        "others": [[3.0, 2.5], [2.0, 1.0]],
        "gained": [[-1.0, 0.5]],
        "forgotten": [[1.0, -1.5]],
    }
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("margin before", "margin after")
    (diagonal,) = ax.lines
    assert diagonal.get_slope() == 1
    assert plot_score_change(before, after, ax=ax) is ax
    plain = plot_score_change(before, after)
    assert plain.get_legend() is None
    assert list(map(len, points_of(plain).values())) == [4]


def test_every_forgotten_sample_of_many_is_drawn() -> None:
    before, after = torch.ones(30_000), torch.ones(30_000)
    after[7] = -1
    found = forgotten_by_pruning(before > 0, after > 0, before)
    drawn = points_of(plot_score_change(before, after, found))
    assert {label: len(points) for label, points in drawn.items()} == {
        "others": 20_000,
        "forgotten": 1,
    }


@pytest.mark.parametrize(
    ("before", "after", "error", "words"),
    [
        (["a"], [1.0], TypeError, "`before`"),
        ([[1.0]], [[1.0]], ValueError, r"`before`.*\(1, 1\)"),
        ([1.0, 2.0], [1.0], ValueError, r"`after`.* 2 .*\(1,\)"),
        ([np.nan, 1.0], [1.0, np.inf], ValueError, "`before` and `after`.* 2 "),
        ([1.0], [1.0], ValueError, "`found`.* 1 .* 2"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(
    before: Any, after: Any, error: Any, words: str
) -> None:
    found = forgotten_by_pruning([True] * 3, [True, True, False], [0] * 3)
    with pytest.raises(error, match=words):
        plot_score_change(before, after, found if "found" in words else None)
