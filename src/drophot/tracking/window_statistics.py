"""Statistics of sliding windows of presentations: Dyn-Unc, DUAL and TDDS."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from drophot._core import scalars
from drophot.tracking import packed_history
from drophot.tracking.accumulators import ColumnTypes, Presented, replay
from drophot.tracking.state import Columns
from drophot.tracking.statistics import CONFIDENCE, HardEnd, Score, named_score


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSpread:
    r"""Dyn-Unc: the mean standard deviation of a score over sliding windows of presentations.

    For the values :math:`v_1, \dots, v_T` of a sample and windows of :math:`J` presentations,

    .. math:: \frac{1}{T - J + 1} \sum_{k=1}^{T-J+1} \mathrm{std}(v_k, \dots, v_{k+J-1}),

    with the standard deviation divided by :math:`J - 1`. The default is the dynamic uncertainty of
    He et al.: the values are the probabilities of the target. With `score="loss"` it is the same of
    the losses. A window with an infinite value has an infinite standard deviation, and the score of
    its sample stays infinite. It keeps `4 * (window + 1)` bytes per sample. A sample with fewer
    than `window` presentations has no score.

    References:
        He, Yang, Huang and Zhao, Large-scale Dataset Pruning with Dynamic Uncertainty, CVPR
        Workshops 2024, https://arxiv.org/abs/2306.05175.

    Args:
        score: The score whose values vary, the name of a built-in one or an object.
        window: `J`, the number of presentations in a window, at least 2.
        until: `T`, after how many presentations of a sample windows are no longer counted. `None`
            counts all.
        name: The name of the statistic.
        hard_end: Which values hard (here: uncertain) samples have.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `window` is less than 2, `until` less than `window`, or `score` unknown.

    Example:
        >>> from drophot import DynamicsTracker
        >>> tracker = DynamicsTracker(1, statistics=[WindowSpread(window=2)])
        >>> for other in (0.0, 2.0, 0.0):
        ...     tracker.update(torch.tensor([0]), torch.tensor([[0.0, other]]), torch.tensor([0]))
        >>> tracker.scores("dyn_unc")
        tensor([0.2693])
    """

    score: Score | str = CONFIDENCE
    window: int = 10
    until: int | None = None
    name: str = "dyn_unc"
    hard_end: HardEnd = "high"

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", named_score(self.score))
        _check_window(self.window, self.until)

    @property
    def num_needed(self) -> int:
        """The number of presentations from which on a sample has a score."""
        return self.window

    @property
    def columns(self) -> ColumnTypes:
        """The last values of each sample, and the sum of its windows."""
        return _columns(self.window)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The values of `score`.

        Args:
            logits: The model's outputs, shape `(B, C)`.
            targets: The classes, shape `(B,)`.

        Returns:
            The values, shape `(B,)`.
        """
        return named_score(self.score)(logits, targets)

    def add(self, columns: Columns, batch: Presented, values: Tensor) -> None:
        """Called by the tracker for each batch."""
        windows = _add_values(columns["recent"], batch, values)
        spread = windows.std(1)
        # In the limit of an infinite value; its difference from the mean is not a number.
        infinite = windows.isinf().any(1) & ~windows.isnan().any(1)
        spread = torch.where(infinite, inf, spread)
        _add_windows(columns, batch, spread, self.window, self.until)

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """Called by the tracker to merge ranks."""
        return replay(self, before, base, after, after["recent"])

    def result(self, columns: Columns) -> Tensor:
        """Called by the tracker for the scores."""
        return _mean_of_windows(columns, self.window, self.until)


@dataclass(frozen=True, slots=True, kw_only=True)
class DUAL:
    r"""DUAL: difficulty and uncertainty in sliding windows of an early part of training.

    For the probabilities :math:`p_1, \dots, p_T` of a sample's target and windows of :math:`J`
    presentations, with mean :math:`\mu_k` and standard deviation :math:`\sigma_k` (divided by
    :math:`J - 1`) of the window that begins at :math:`k`,

    .. math:: \frac{1}{T - J + 1} \sum_{k=1}^{T-J+1} 10 \, \sigma_k \, (1 - \mu_k).

    The factor 10 is that of the authors' code; it does not change a selection. It keeps
    `4 * (window + 1)` bytes per sample. A sample with fewer than `window` presentations has no
    score. Combine it with :class:`drophot.coreset.Beta` if less than half of the data is kept.

    References:
        Cho, Shin, Kang and Yun, Lightweight Dataset Pruning without Full Training via Example
        Difficulty and Prediction Uncertainty, ICML 2025, https://arxiv.org/abs/2502.06905.

    Args:
        window: `J`, the number of presentations in a window, at least 2.
        until: `T`, after how many presentations of a sample windows are no longer counted. The
            paper trains for 30 of 200 epochs on CIFAR; stop training there as well, or the rest
            serves only other scores. `None` counts all.
        name: The name of the statistic.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `window` is less than 2, or `until` less than `window`.

    Example:
        >>> from drophot import DynamicsTracker
        >>> tracker = DynamicsTracker(1, statistics=[DUAL(window=2)])
        >>> for other in (0.0, 2.0, 0.0):
        ...     tracker.update(torch.tensor([0]), torch.tensor([[0.0, other]]), torch.tensor([0]))
        >>> tracker.scores("dual")
        tensor([1.8590])
    """

    window: int = 10
    until: int | None = 30
    name: str = "dual"

    def __post_init__(self) -> None:
        _check_window(self.window, self.until)

    @property
    def hard_end(self) -> HardEnd:
        """Hard and uncertain samples have high scores."""
        return "high"

    @property
    def num_needed(self) -> int:
        """The number of presentations from which on a sample has a score."""
        return self.window

    @property
    def columns(self) -> ColumnTypes:
        """The last probabilities of each sample, and the sum of its windows."""
        return _columns(self.window)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The probabilities of the targets.

        Args:
            logits: The model's outputs, shape `(B, C)`.
            targets: The classes, shape `(B,)`.

        Returns:
            The probabilities, shape `(B,)`.
        """
        return CONFIDENCE(logits, targets)

    def add(self, columns: Columns, batch: Presented, values: Tensor) -> None:
        """Called by the tracker for each batch."""
        windows = _add_values(columns["recent"], batch, values)
        scores = 10 * windows.std(1) * (1 - windows.mean(1))
        _add_windows(columns, batch, scores, self.window, self.until)

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """Called by the tracker to merge ranks."""
        return replay(self, before, base, after, after["recent"])

    def result(self, columns: Columns) -> Tensor:
        """Called by the tracker for the scores."""
        return _mean_of_windows(columns, self.window, self.until)


@dataclass(frozen=True, slots=True, kw_only=True)
class TDDS:
    r"""TDDS: how much the change of the outputs varies in sliding windows, averaged with decay.

    From one presentation of a sample to the next its probabilities change by
    :math:`d_t = \sum_c |p_{t+1,c} \, (\log p_{t+1,c} - \log p_{t,c})|`. A window of :math:`J`
    presentations has :math:`J - 1` changes; its value :math:`r_k` is the norm of their differences
    from their mean. The score is the moving average
    :math:`\sum_{k=1}^{T-J+1} \beta \, (1 - \beta)^{T-J+1-k} \, r_k`. As in the authors' code,
    :math:`10^{-8}` is added to the probabilities before the logarithm.

    It keeps the last probabilities of each sample and so needs `4 * (num_classes + window)` bytes
    per sample. With several ranks, a rank must present a sample at most once between two calls of
    `sync`. A sample with fewer than `window` presentations has no score.

    References:
        Zhang, Du, Li, Xie and Zhou, Spanning Training Progress: Temporal Dual-Depth Scoring (TDDS)
        for Enhanced Dataset Pruning, CVPR 2024, https://arxiv.org/abs/2311.13613.

    Args:
        num_classes: `C`, the number of columns of the logits.
        window: `J`, the number of presentations in a window, at least 3: with 2 there is a single
            change, which does not vary.
        until: `T`, after how many presentations of a sample windows are no longer counted; the
            paper chooses it for each ratio. `None` counts all.
        decay: `β`, the weight of the newest window, in (0, 1].
        name: The name of the statistic.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; in `update`, if the logits have another number
            of classes.

    Example:
        >>> from drophot import DynamicsTracker
        >>> tracker = DynamicsTracker(1, statistics=[TDDS(num_classes=2, window=3)])
        >>> for other in (0.0, 2.0, 1.0):
        ...     tracker.update(torch.tensor([0]), torch.tensor([[0.0, other]]), torch.tensor([0]))
        >>> tracker.scores("tdds")
        tensor([0.2002])
    """

    num_classes: int
    window: int = 10
    until: int | None = None
    decay: float = 0.9
    name: str = "tdds"

    def __post_init__(self) -> None:
        scalars.integer("num_classes", self.num_classes, least=2)
        _check_window(self.window, self.until, least=3)
        decay = scalars.real("decay", self.decay, "a number in (0, 1]")
        if not 0 < decay <= 1:
            raise ValueError(f"`decay` must be in (0, 1], got {decay:g}. The paper uses 0.9.")

    @property
    def hard_end(self) -> HardEnd:
        """Samples whose outputs keep changing have high scores."""
        return "high"

    @property
    def num_needed(self) -> int:
        """The number of presentations from which on a sample has a score."""
        return self.window

    @property
    def columns(self) -> ColumnTypes:
        """The last probabilities of each sample, its last changes, and the moving average."""
        return {
            "probabilities": (torch.float32, (self.num_classes,)),
            "changes": (torch.float32, (self.window - 1,)),
            "average": (torch.float32, ()),
        }

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The probabilities of all classes.

        Args:
            logits: The model's outputs, shape `(B, C)`.
            targets: The classes, shape `(B,)`; not used.

        Returns:
            The probabilities, shape `(B, C)`.

        Raises:
            ValueError: If the logits have another number of classes.
        """
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"`logits` must have the {self.num_classes} classes of "
                f"`TDDS(num_classes={self.num_classes})`, got {logits.shape[1]}. Change "
                f"`num_classes`."
            )
        return logits.clamp(max=torch.finfo(logits.dtype).max).softmax(1)  # an infinite one gives 1

    def add(self, columns: Columns, batch: Presented, values: Tensor) -> None:
        """Called by the tracker for each batch."""
        position, number, earlier, later = batch
        last = columns["probabilities"]
        previous = torch.where(
            (earlier > 0)[:, None], values.roll(1, 0), last.index_select(0, position)
        )
        change = (values * ((values + 1e-8).log() - (previous + 1e-8).log())).abs().sum(1)
        rows = torch.arange(len(position), device=position.device)
        last.index_copy_(0, position, values.index_select(0, rows + later))
        # The first presentation has no change; what it writes is overwritten before it is used.
        windows = _add_values(columns["changes"], batch._replace(number=number - 1), change)
        norm = torch.linalg.vector_norm(windows - windows.mean(1, keepdim=True), dim=1)
        counted = _is_counted(number, self.window, self.until)
        until = torch.full_like(number, self.until or 1 << 32)
        end = torch.minimum(number + later, until)  # the last of the sample that is counted
        begin = (number - earlier - 1).clamp(min=self.window - 1)
        kept = 1 - self.decay
        factor = torch.pow(kept, (end - begin).clamp(min=0).to(torch.float32))
        average = columns["average"]
        average.index_copy_(0, position, average.index_select(0, position) * factor)
        share = self.decay * torch.pow(kept, (end - number).clamp(min=0).to(torch.float32))
        average.index_add_(0, position, torch.where(counted, share * norm, 0.0))

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """Called by the tracker to merge ranks."""
        return replay(self, before, base, after, after["probabilities"][:, None])

    def result(self, columns: Columns) -> Tensor:
        """Called by the tracker for the scores."""
        return columns["average"]


def _check_window(window: int, until: int | None, least: int = 2) -> None:
    scalars.integer("window", window, least=least)
    if until is not None and scalars.integer("until", until) < window:
        raise ValueError(
            f"`until` must be at least `window`, {window}, got {until}: there would be no window. "
            f"Raise `until` or lower `window`."
        )


def _columns(window: int) -> ColumnTypes:
    return {"recent": (torch.float32, (window,)), "total": (torch.float32, ())}


def _is_counted(number: Tensor, window: int, until: int | None) -> Tensor:
    """Whether a window that ends with this presentation is counted."""
    return (number >= window) & (number <= (inf if until is None else until))


def _add_windows(
    columns: Columns, batch: Presented, scores: Tensor, window: int, until: int | None
) -> None:
    """Add the scores of the windows that end with each row."""
    counted = _is_counted(batch.number, window, until)
    columns["total"].index_add_(0, batch.position, torch.where(counted, scores, 0.0))


def _mean_of_windows(columns: Columns, window: int, until: int | None) -> Tensor:
    presented = packed_history.presentations(columns["history"])
    if until is not None:
        presented = presented.clamp(max=until)
    return columns["total"] / (presented - window + 1)


def _add_values(recent: Tensor, batch: Presented, values: Tensor) -> Tensor:
    """Add values `(B,)` to the last `L` of their samples, in place.

    Value `t` of a sample is at `(t - 1) % L` of its row in `recent`, shape `(N, L)`.

    Returns:
        For each row its value and the `L - 1` before it, the newest first, shape `(B, L)`.
    """
    position, number, earlier, later = batch
    length = recent.shape[1]
    rows = torch.arange(len(values), device=values.device)
    lag = torch.arange(length, device=values.device)
    in_batch = values[(rows[:, None] - lag).clamp(min=0)]
    before = recent.index_select(0, position).gather(1, (number[:, None] - 1 - lag) % length)
    windows = torch.where(lag <= earlier[:, None], in_batch, before)
    # Of several values for one place, the last one is written each time.
    last = values.index_select(0, rows + length * (later // length))
    recent.index_put_((position, (number - 1) % length), last)
    return windows
