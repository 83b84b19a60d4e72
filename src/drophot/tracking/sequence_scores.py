"""The last value of a score, its moving average, and when a sample was learned."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from drophot._core import scalars
from drophot._core.classifier import is_correct
from drophot.tracking import packed_history
from drophot.tracking.accumulators import ColumnTypes, Presented
from drophot.tracking.state import Columns
from drophot.tracking.statistics import LOSS, HardEnd, Score, named_score

_AFTER_ALL = 1 + packed_history.MAX_PRESENTATIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Last:
    """The value of a score at the last presentation of a sample, by default of the loss.

    It keeps 4 bytes per sample. With several ranks, the last presentation is that of the highest
    rank that has seen the sample since the last `sync`.

    Args:
        score: The name of a built-in score or an object.
        name: The name of the statistic. By default `"last_"` and the name of the score.

    Raises:
        TypeError: If `score` is not a score.
        ValueError: If `score` is unknown.

    Example:
        >>> from drophot import DynamicsTracker
        >>> tracker = DynamicsTracker(1, statistics=[Last()])
        >>> for other in (5.0, 0.0):
        ...     tracker.update(torch.tensor([0]), torch.tensor([[0.0, other]]), torch.tensor([0]))
        >>> tracker.scores("last_loss")
        tensor([0.6931])
    """

    score: Score | str = LOSS
    name: str = ""

    def __post_init__(self) -> None:
        score = named_score(self.score)
        object.__setattr__(self, "score", score)
        if not self.name:
            object.__setattr__(self, "name", f"last_{score.name}")

    @property
    def hard_end(self) -> HardEnd:
        """That of the score."""
        return named_score(self.score).hard_end

    @property
    def num_needed(self) -> int:
        """The number of presentations from which on a sample has a score."""
        return 1

    @property
    def columns(self) -> ColumnTypes:
        """The last value of each sample."""
        return {"value": (torch.float32, ())}

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
        rows = torch.arange(len(values), device=values.device)
        # Repeats of a sample write the same value, that of the last one.
        last = values.index_select(0, rows + batch.later)
        columns["value"].index_copy_(0, batch.position, last)

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """Called by the tracker to merge ranks."""
        return {"value": after["value"]}

    def result(self, columns: Columns) -> Tensor:
        """Called by the tracker for the scores."""
        return columns["value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingAverage:
    r"""The exponential moving average of a score over the presentations, by default of the loss.

    For the values :math:`v_1, \dots, v_n` of a sample it is
    :math:`\sum_t d^{n-t} v_t / \sum_t d^{n-t}` with the decay :math:`d`, the
    weighted mean in which a presentation counts :math:`d` times as much as the next one. It
    keeps 4 bytes per sample.

    Args:
        score: The name of a built-in score or an object.
        decay: `d`, in (0, 1).
        name: The name of the statistic. By default the name of the score and `"_average"`.

    Raises:
        TypeError: If `score` is not a score, or `decay` not a number.
        ValueError: If `score` is unknown, or `decay` is not in (0, 1).

    Example:
        >>> from drophot import DynamicsTracker
        >>> tracker = DynamicsTracker(1, statistics=[MovingAverage(score="aum", decay=0.5)])
        >>> for margin in (3.0, 0.0):
        ...     tracker.update(torch.tensor([0]), torch.tensor([[margin, 0.0]]), torch.tensor([0]))
        >>> tracker.scores("aum_average")
        tensor([1.])
    """

    score: Score | str = LOSS
    decay: float = 0.9
    name: str = ""

    def __post_init__(self) -> None:
        score = named_score(self.score)
        object.__setattr__(self, "score", score)
        if not self.name:
            object.__setattr__(self, "name", f"{score.name}_average")
        decay = scalars.real("decay", self.decay, "a number in (0, 1)")
        if not 0 < decay < 1:
            raise ValueError(
                f"`decay` must be in (0, 1), got {decay:g}. For the plain mean, name the score; "
                f"for the last value alone, use Last."
            )

    @property
    def hard_end(self) -> HardEnd:
        """That of the score."""
        return named_score(self.score).hard_end

    @property
    def num_needed(self) -> int:
        """The number of presentations from which on a sample has a score."""
        return 1

    @property
    def columns(self) -> ColumnTypes:
        """The weighted sum of each sample, before it is divided by the sum of the weights."""
        return {"sum": (torch.float32, ())}

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
        total, position = columns["sum"], batch.position
        factor = _power(self.decay, batch.earlier + batch.later + 1)
        total.index_copy_(0, position, total.index_select(0, position) * factor)
        share = (1 - self.decay) * _power(self.decay, batch.later)
        total.index_add_(0, position, share * values)

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """Called by the tracker to merge ranks."""
        n_base, n = (packed_history.presentations(part["history"]) for part in (base, after))
        factor = _power(self.decay, n - n_base)
        others = before["sum"] - base["sum"]
        # An infinite sum stays infinite, and the difference of two of them is not a number.
        joined = torch.where(others.isfinite(), after["sum"] + factor * others, before["sum"])
        return {"sum": joined}

    def result(self, columns: Columns) -> Tensor:
        """Called by the tracker for the scores."""
        presented = packed_history.presentations(columns["history"])
        # 1 - decay ** n, whose digits a decay near 1 would lose in float32.
        weights = -torch.expm1(presented.to(torch.float32) * log(self.decay))
        return columns["sum"] / weights


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLearned:
    """At which of its presentations, counted from 1, a sample was learned.

    The score is the first presentation at which the sample was correct: the first learning event of
    Toneva et al. With `for_good=True` it is the first from which on the sample was correct each
    time: the iteration learned of Baldock et al., in presentations. A sample that is not learned
    has one more than its number of presentations, and at least one more than every sample that is.
    It keeps 4 bytes per sample.

    References:
        Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network
        Learning, ICLR 2019, https://arxiv.org/abs/1812.05159. Baldock, Maennel and Neyshabur, Deep
        Learning Through the Lens of Example Difficulty, NeurIPS 2021,
        https://arxiv.org/abs/2106.09647.

    Args:
        for_good: Whether the sample must also stay correct.
        name: The name of the statistic. By default `"first_learned"` or `"learned_for_good"`.

    Example:
        >>> from drophot import DynamicsTracker
        >>> scores = [FirstLearned(), FirstLearned(for_good=True)]
        >>> tracker = DynamicsTracker(1, statistics=scores)
        >>> for margin in (-1.0, 1.0, -1.0, 1.0):
        ...     tracker.update(torch.tensor([0]), torch.tensor([[margin, 0.0]]), torch.tensor([0]))
        >>> tracker.scores("first_learned"), tracker.scores("learned_for_good")
        (tensor([2.]), tensor([4.]))
    """

    for_good: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            name = "learned_for_good" if self.for_good else "first_learned"
            object.__setattr__(self, "name", name)

    @property
    def hard_end(self) -> HardEnd:
        """Hard samples are learned late."""
        return "high"

    @property
    def num_needed(self) -> int:
        """The number of presentations from which on a sample has a score."""
        return 1

    @property
    def columns(self) -> ColumnTypes:
        """One number for each sample: see `add`."""
        return {"at": (torch.int32, ())}

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether each sample is correct.

        Args:
            logits: The model's outputs, shape `(B, C)`.
            targets: The classes, shape `(B,)`.

        Returns:
            1 or 0, shape `(B,)`.
        """
        return is_correct(logits, targets).float()

    def add(self, columns: Columns, batch: Presented, values: Tensor) -> None:
        """Called by the tracker for each batch."""
        # The last wrong presentation. Or the first correct one, subtracted from a number that is
        # larger, so that 0 means none and the maximum is the first.
        number, correct = batch.number.to(torch.int32), values > 0
        none = torch.zeros_like(number)
        found = (
            torch.where(correct, none, number)
            if self.for_good
            else torch.where(correct, _AFTER_ALL - number, none)
        )
        columns["at"].scatter_reduce_(0, batch.position, found, "amax")

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """Called by the tracker to merge ranks."""
        n, n_base = (
            packed_history.presentations(part["history"]).to(torch.int32) for part in (before, base)
        )
        mine, others = after["at"], before["at"]
        if self.for_good:
            return {"at": torch.where(mine > n_base, mine - n_base + n, others)}
        shifted = torch.where(mine > 0, mine + n_base - n, mine)
        return {"at": torch.where(others > 0, others, shifted)}

    def result(self, columns: Columns) -> Tensor:
        """Called by the tracker for the scores."""
        presented, at = packed_history.presentations(columns["history"]), columns["at"].long()
        learned = (at < presented) if self.for_good else at > 0
        number = torch.where(learned, at + 1 if self.for_good else _AFTER_ALL - at, 0)
        return torch.where(learned, number, torch.maximum(presented, number.max()) + 1)


def _power(base: float, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent.to(torch.float32))
