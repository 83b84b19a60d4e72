"""Figures of samples: the data map, suspicious images, and scores before and after pruning."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from drophot._core import scalars
from drophot._core.arrays import as_real_tensor
from drophot.data.indexing import IndexedDataset
from drophot.report import plots
from drophot.stats import Forgotten
from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.score_table import most_suspicious

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_MOST_POINTS = 20_000  # more cover each other, and take seconds to draw
_EVENTS = {
    0: ("never forgotten", "#0072B2"),
    1: ("forgotten once", "#56B4E9"),
    2: ("twice", "#009E73"),
    3: ("3 times", "#E69F00"),
    4: ("4 times or more", "#D55E00"),
    -1: ("never correct", "#000000"),
}
_CHANGES = (("others", "#999999"), ("gained", "#0072B2"), ("forgotten", "#D55E00"))
_PER_ROW = 5
_CHANNELS = (1, 3, 4)


def plot_data_map(tracker: DynamicsTracker, *, ax: Axes | None = None) -> Axes:
    """Plot confidence against variability, a point for each sample: a data map.

    Samples at the top left are easy to learn. Those at the bottom left are hard, and some of them
    have wrong labels. Those on the right are ambiguous. Colors show how often a sample was
    forgotten, or that it was never correct. Of more than 20,000 samples, 20,000 are drawn, always
    the same ones.

    References:
        Swayamdipta et al., Dataset Cartography: Mapping and Diagnosing Datasets with Training
        Dynamics, EMNLP 2020, https://arxiv.org/abs/2009.10795. The colors of its figures are the
        share of epochs in which a sample was correct.

    Args:
        tracker: A tracker that keeps `"confidence"` and `"variability"`. Samples that were never
            presented are left out.
        ax: The axes to draw into. `None` creates a new figure.

    Returns:
        The axes, neither shown nor saved.

    Raises:
        TypeError: If `tracker` is not a DynamicsTracker.
        ValueError: If it does not keep both statistics, or no sample was presented.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> tracker = DynamicsTracker(6)
        >>> tracker.update(torch.arange(6), torch.eye(3).repeat(2, 1), torch.arange(6) % 3)
        >>> plot_data_map(tracker).get_ylabel()
        'confidence'
    """
    _check_tracker(tracker)
    columns = tracker.columns()
    for name in ("confidence", "variability"):
        if name not in columns:
            raise ValueError(
                f"`tracker` must keep {name!r}, got one with "
                f"{', '.join(map(repr, tracker.statistics))}. Name it in "
                f"`DynamicsTracker(..., statistics=[...])`."
            )
    shown = np.flatnonzero(~np.isnan(columns["confidence"]))
    if not len(shown):
        raise ValueError("`tracker` must have presented samples, got one that has seen none.")
    shown = _drawn(shown)
    ax = plots.axes(ax)
    x, y = columns["variability"][shown], columns["confidence"][shown]
    events = np.where(columns["learned"], np.minimum(columns["forgetting"], 4), -1)[shown]
    for number, (label, color) in _EVENTS.items():
        at = events == number
        if at.any():
            ax.scatter(x[at], y[at], s=6, c=color, label=label, linewidths=0, rasterized=True)
    ax.set_xlabel("variability")
    ax.set_ylabel("confidence")
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), markerscale=2)
    return ax


def plot_score_change(
    before: Any,
    after: Any,
    found: Forgotten | None = None,
    *,
    name: str = "score",
    ax: Axes | None = None,
) -> Axes:
    """Plot a score after pruning against the same score before it, a point for each sample.

    A sample on the dashed diagonal has kept its score. The figure shows whether pruning changes
    all samples in the same way or moves some of them far, which the accuracy and the share
    forgotten do not tell. Of more than 20,000 samples of one color, 20,000 are drawn, always the
    same ones.

    Args:
        before: A score of each sample before pruning, numbers `(N,)`: `tracker.scores("aum")` of a
            new tracker after `tracker.observe(model, loader)` is the margin, `"loss"` the loss.
        after: The same after pruning, or after fine-tuning. Samples whose score is not finite in
            one of the two are left out.
        found: The result of :func:`drophot.stats.forgotten_by_pruning` for the same samples, to
            draw those that were forgotten and gained in colors. `None` draws all in one color.
        name: The name of the score, for the axes.
        ax: The axes to draw into. `None` creates a new figure.

    Returns:
        The axes, neither shown nor saved.

    Raises:
        TypeError: If `before` or `after` does not hold numbers.
        ValueError: If they have different shapes or are not one-dimensional, no sample has two
            finite scores, or `found` has a sample that they do not have.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from drophot.stats import forgotten_by_pruning
        >>> before, after = torch.tensor([3.0, 1.0, 2.0, -1.0]), torch.tensor([2.0, -1.0, 1.0, 0.5])
        >>> found = forgotten_by_pruning(before > 0, after > 0, before, groups=2)
        >>> ax = plot_score_change(before, after, found, name="margin")
        >>> ax.get_xlabel(), [text.get_text() for text in ax.get_legend().get_texts()]
        ('margin before', ['others', 'gained', 'forgotten'])
    """
    x, y = _score_pair(before, after)
    kinds = np.zeros(len(x), dtype=np.int64)
    if found is not None:
        for number, positions in enumerate((found.gained, found.indices), start=1):
            if len(positions) and positions.max() >= len(x):
                raise ValueError(
                    f"`found` must be of the {len(x)} samples of `before`, got sample "
                    f"{positions.max()}. Pass the scores of all samples that were compared."
                )
            kinds[positions] = number
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        raise ValueError(
            f"`before` and `after` must be finite for some sample, got {len(x)} samples without "
            f"two finite scores. Observe the networks with new trackers."
        )
    ax = plots.axes(ax)
    for number, (label, color) in enumerate(_CHANGES):
        shown = _drawn(np.flatnonzero((kinds == number) & finite))
        if len(shown):
            part = {"s": 6, "c": color, "linewidths": 0, "rasterized": True}
            ax.scatter(x[shown], y[shown], label=label if found else None, **part)
    ax.axline((0, 0), slope=1, color="#000000", linestyle="--", linewidth=0.8)
    ax.set_xlabel(f"{name} before".replace("$", r"\$"))
    ax.set_ylabel(f"{name} after".replace("$", r"\$"))
    if found is not None:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), markerscale=2)
    return ax


def plot_suspects(
    tracker: DynamicsTracker,
    images: Any,
    *,
    statistic: str = "aum",
    number: int = 20,
    classes: Sequence[str] | Mapping[int, str] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draw the images that are most likely mislabeled, each with the label that it was given.

    If the dataset has labels, those of the images that are drawn are compared with the labels that
    the tracker has seen, so that a dataset in another order is an error.

    Args:
        tracker: A tracker of the dataset.
        images: The dataset that the tracker's indices refer to, or only its images: `images[i]` is
            an image, or a tuple that begins with one, followed by its label. An image is a PIL
            image, or a tensor or NumPy array `(C, H, W)`, `(H, W, C)` or `(H, W)`. If `C` can be
            the first or the last size, it is the first of a tensor and the last of an array. Floats
            are scaled so that the smallest is black and the largest white.
        statistic: The statistic to sort by: those at its hard end come first.
        number: How many images to draw, at most those that were presented.
        classes: The name of each class. `None` shows its number.
        figure: The figure or subfigure to draw into. `None` creates a new figure.

    Returns:
        The figure, neither shown nor saved; that of a subfigure is the whole one.

    Raises:
        TypeError: If `tracker` is not a DynamicsTracker, or a sample does not begin with an image.
        ValueError: If the tracker does not keep `statistic`, or has it for no sample, `number` is
            below 1, `images` has another length than the tracker or another label for an image, or
            `classes` lacks a class.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> tracker = DynamicsTracker(6)
        >>> tracker.update(torch.arange(6), torch.eye(3).repeat(2, 1), torch.zeros(6).long())
        >>> figure = plot_suspects(tracker, torch.rand(6, 3, 8, 8), number=4, classes=["cat"])
        >>> [ax.get_title() for ax in figure.axes][:2]
        ['cat', 'cat']
    """
    _check_tracker(tracker)
    number = scalars.integer("number", number, least=1)
    _check_length(images, tracker.num_samples)
    worst = most_suspicious(tracker, statistic, number).tolist()
    plots.axes(None)  # raises if matplotlib is missing
    from matplotlib.figure import Figure

    targets = tracker.columns()["target"]
    sheet: list[tuple[int, np.ndarray, str]] = []
    for sample in worst:
        found = images[sample]
        pixels = _pixels(found, sample)
        label = _label(found, isinstance(images, IndexedDataset))
        target = _checked_target(int(targets[sample]), label, sample)
        sheet.append((sample, pixels, "" if target is None else _class_name(target, classes)))
    rows = -(-len(sheet) // _PER_ROW)
    if figure is None:
        figure = Figure(figsize=(1.6 * _PER_ROW, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, _PER_ROW, squeeze=False).flat
    for ax, image in zip_longest(axes, sheet):
        if image is None:
            ax.remove()
            continue
        sample, pixels, name = image
        ax.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None)
        ax.set_title(name.replace("$", r"\$"), fontsize="medium")
        ax.set_xlabel(f"no. {sample}", fontsize="small")
        ax.set(xticks=[], yticks=[])
    return figure.figure


def _drawn(positions: np.ndarray) -> np.ndarray:
    """The positions of the samples to draw, always the same ones."""
    if len(positions) <= _MOST_POINTS:
        return positions
    return np.random.default_rng(0).choice(positions, _MOST_POINTS, replace=False)


def _score_pair(before: Any, after: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = (
        as_real_tensor(name, values).cpu().double().numpy()
        for name, values in (("before", before), ("after", after))
    )
    if x.ndim != 1:
        raise ValueError(f"`before` must have shape (N,), got {x.shape}.")
    if x.shape != y.shape:
        raise ValueError(
            f"`after` must have one score for each of the {len(x)} samples of `before`, got shape "
            f"{y.shape}."
        )
    return x, y


def _check_tracker(tracker: object) -> None:
    if not isinstance(tracker, DynamicsTracker):
        raise TypeError(
            f"`tracker` must be a DynamicsTracker, got {type(tracker).__name__}. A "
            f"ForgettingTracker keeps no other statistics."
        )


def _check_length(images: Any, num_samples: int) -> None:
    """Images of a part of the dataset, or of another one, would be drawn for the wrong samples."""
    found = len(images) if hasattr(images, "__len__") else num_samples
    if found != num_samples:
        raise ValueError(
            f"`images` must have the {num_samples} samples of the tracker, got {found}. Pass the "
            f"dataset whose indices the tracker was updated with."
        )


def _label(found: Any, is_indexed: bool) -> int | None:
    """The label of a sample, if it is an integer that follows the image."""
    parts = found[:-1] if is_indexed else found  # the last one is the index
    if not isinstance(parts, (tuple, list)) or len(parts) < 2:
        return None
    try:
        return operator.index(parts[1])
    except TypeError:
        return None


def _checked_target(target: int, label: int | None, sample: int) -> int | None:
    """The target that a tracker has seen, or the label if it has seen none."""
    if target < 0:
        return label
    if label is not None and label != target:
        raise ValueError(
            f"`images` must be the dataset that `tracker` was updated with, in its order, got "
            f"label {label} for sample {sample}, whose target was {target}. If the labels differ "
            f"on purpose, pass the images alone, such as [x for x, _ in dataset]."
        )
    return target


def _class_name(target: int, classes: Sequence[str] | Mapping[int, str] | None) -> str:
    if classes is None:
        return str(target)
    try:
        return str(classes[target])
    except (IndexError, KeyError):
        raise ValueError(
            f"`classes` must have a name for each class, got none for class {target}. Pass "
            f"`classes=None` to show numbers."
        ) from None


def _pixels(found: Any, sample: int) -> np.ndarray:
    """A sample's image as `(H, W)` or `(H, W, 3 or 4)`, of integers or of floats in [0, 1]."""
    image = found[0] if isinstance(found, (tuple, list)) else found
    try:
        if isinstance(image, Tensor):
            image = image.detach().cpu()
            # NumPy has no bfloat16.
            pixels = (image.float() if image.is_floating_point() else image).numpy()
        else:
            pixels = np.asarray(image)
        if (
            pixels.ndim == 3
            and pixels.shape[0] in _CHANNELS
            and (isinstance(image, Tensor) or pixels.shape[2] not in _CHANNELS)
        ):
            pixels = pixels.transpose(1, 2, 0)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        valid = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    except (TypeError, ValueError):
        pixels, valid = np.empty(0), False
    if not valid or pixels.dtype.kind not in "buif":
        shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise TypeError(
            f"`images` must hold images or tuples that begin with one, got "
            f"{type(image).__name__}{shape} for sample {sample}. An image is a PIL image, or a "
            f"tensor or array of shape (C, H, W), (H, W, C) or (H, W) with 1, 3 or 4 channels."
        )
    if pixels.dtype.kind != "f":
        return pixels
    pixels = pixels.astype(np.float32)
    finite = pixels[np.isfinite(pixels)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
    return (pixels.clip(low, high) - low) / max(high - low, np.finfo(np.float32).tiny)
