"""Training dynamics: margin, error, confidence, loss and other scores of the logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drophot._core.capturable_hooks import repeatable
from drophot.tracking import packed_history, score_labels, validation
from drophot.tracking.accumulators import Accumulation, Accumulator
from drophot.tracking.deferred_errors import ONLY_LOSS
from drophot.tracking.forgetting import ForgettingTracker
from drophot.tracking.forgetting_scores import Missing, NeverLearned
from drophot.tracking.fused_update import Layout
from drophot.tracking.record import Rows, record_losses
from drophot.tracking.running_means import RunningMeans
from drophot.tracking.sequence_scores import FirstLearned
from drophot.tracking.state import Columns, State, to_device
from drophot.tracking.statistics import (
    CONFIDENCE,
    DEFAULT,
    Score,
    Spread,
    Statistics,
    validate_statistics,
)
from drophot.tracking.statistics import Statistic as Statistic

_RANDOM = "random"  # in a `state_dict`: where the random numbers of each score are


class DynamicsTracker(ForgettingTracker):
    r"""Tracks forgetting events and, from the same logits, AUM, EL2N, confidence and other scores.

    Each statistic is taken over the presentations of a sample, from the logits :math:`z`, the
    probabilities :math:`p = \mathrm{softmax}(z)` and the target :math:`y`:

    ============== ====================================================== ======================
    statistic      of a sample                                            hard samples score
    ============== ====================================================== ======================
    `aum`          mean of :math:`z_y - \max_{k \ne y} z_k`               low
    `el2n`         mean of :math:`\lVert p - \mathrm{onehot}(y) \rVert_2` high
    `confidence`   mean of :math:`p_y`                                    low
    `variability`  standard deviation of :math:`p_y` (divided by n)       high: ambiguous
    `loss`         mean of :math:`-\log p_y`                              high
    ============== ====================================================== ======================

    `statistics` chooses among them and adds scores of your own, see
    :class:`drophot.tracking.Score`. The tracker keeps the mean of a score over the presentations,
    and with :class:`drophot.tracking.Spread` its standard deviation. Forgetting events are always
    kept.

    All statistics are kept in float32, regardless of the precision of the logits. Running means
    have eight more bits and sums of squares are updated by Welford's method, so that thousands of
    presentations lose no digits. The state has 36 bytes per sample; each score of your own adds 5,
    its spread another 4. The built-in statistics take infinite logits as limits: a sample whose own
    class was masked by `-inf` once has an AUM of `-inf` and an infinite loss from then on; its
    other statistics are finite. Scores of windows do the same: those of probabilities stay finite,
    and the spread of a margin or loss that is infinite once is infinite.

    Everything else is as in :class:`drophot.ForgettingTracker`: `update`, `observe`, `watch`,
    `attach`, `sync` and the state. Here, too, the caller decides when samples are presented. In the
    papers, each training batch is a presentation.

    References:
        AUM: Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking,
        NeurIPS 2020, https://arxiv.org/abs/2001.10528. EL2N: Paul et al., Deep Learning on a Data
        Diet, NeurIPS 2021, https://arxiv.org/abs/2107.07075; the paper takes it at one epoch, this
        class its mean over all presentations. Confidence and variability: Swayamdipta et al.,
        Dataset Cartography, EMNLP 2020, https://arxiv.org/abs/2009.10795.

    Args:
        num_samples: `N`, the length of the dataset that the indices refer to.
        device: Where the state is kept. `None` means the device of the first batch's logits.
        statistics: Names from the table, scores and spreads. By default all of the table.

    Raises:
        TypeError: If `num_samples` is not an integer, or `statistics` holds something else.
        ValueError: If `num_samples` is less than 1, `statistics` is empty, or a name in it is
            unknown, used twice or not an identifier.

    Example:
        >>> tracker = DynamicsTracker(num_samples=2)
        >>> for margin in (1.0, 3.0):
        ...     logits = torch.tensor([[margin, 0.0], [margin, 0.0]])
        ...     tracker.update(torch.tensor([0, 1]), logits, torch.tensor([0, 1]))
        >>> tracker.scores("aum")
        tensor([ 2., -2.])
        >>> tracker.scores("forgetting")
        tensor([0, 2])
        >>> tracker.columns()["confidence"].round(3).tolist()
        [0.8420000076293945, 0.15800000727176666]
    """

    def __init__(
        self,
        num_samples: int,
        *,
        device: torch.device | str | None = None,
        statistics: Iterable[str | Score] = DEFAULT,
    ) -> None:
        self._statistics = validate_statistics(statistics)
        means = RunningMeans(self._statistics.num_values, _square_columns(self._statistics))
        self._kept = Accumulation(means, self._statistics.accumulators)
        self._layout = _layout(self._statistics, means)
        super().__init__(num_samples, device=device)

    @property
    def statistics(self) -> Mapping[str, Score]:
        """The statistics that are kept, by name: `tracker.statistics["aum"].hard_end` is `"low"`.

        Forgetting events, whose hard end is `"high"`, are not among them.
        """
        return MappingProxyType(dict(self._statistics.by_name))

    @repeatable
    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Present a batch, and score it by its logits.

        Args:
            index: The samples' indices in the dataset, integers, shape `(B,)`.
            logits: The model's outputs, shape `(B, C)` with `C` at least 2, any float dtype, with
                or without gradient; not probabilities. A NaN makes the built-in statistics of its
                sample NaN.
            targets: The true classes, integers from 0 to `C - 1`, shape `(B,)`.

        Raises:
            TypeError: As in :meth:`drophot.ForgettingTracker.update`, and if a score of your own
                does not return a float tensor.
            ValueError: As there, and if a score of your own returns another shape than `(B,)` or
                (on a GPU when the tracker is read) a value that is not finite. Nothing is counted
                then.
            RuntimeError: As there.
        """
        validation.check_batch(index, logits, targets)
        if len(index) == 0:
            return
        with torch.no_grad():
            if self._present_fused(index, logits, targets):
                return
            targets = to_device(targets, logits.device, torch.int64)
            classes = targets.clamp(0, logits.shape[1] - 1)
            values = self._statistics.values(logits.float(), classes[:, None])
            series = self._statistics.series(logits.float(), classes[:, None])
            if logits.dtype == torch.float64:  # logits that differ may be equal in float32
                series = [
                    own(logits, classes) if isinstance(own, FirstLearned) else part
                    for own, part in zip(self._statistics.accumulators, series, strict=True)
                ]
            if (own := self._statistics.to_check(values, series)) is not None:
                self._state.check_finite(index, own)
            rows = self._record_logits(index, logits, targets)
            self._accumulate(rows, values, series)

    def reset(self) -> None:
        """Return to the initial state."""
        super().reset()
        for stream in self._statistics.streams.values():
            stream.reset()

    def state_dict(self) -> dict[str, Any]:
        """A copy of the whole state, as in :meth:`drophot.ForgettingTracker.state_dict`.

        It includes the random numbers of scores that draw some, so that a run that is resumed draws
        those of an uninterrupted one.

        Returns:
            Tensors, numbers, strings, and lists and dictionaries of these.

        Raises:
            RuntimeError: As there.
            ValueError: As there.
        """
        random = {
            name: state
            for name, stream in self._statistics.streams.items()
            if (state := stream.dump()) is not None
        }
        return super().state_dict() | ({_RANDOM: random} if random else {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved state, as :meth:`drophot.ForgettingTracker.load_state_dict` does.

        Args:
            state_dict: The `state_dict` of a tracker of the same class, size and statistics. The
                statistics must have the same names and classes, and the same arguments if they are
                frozen dataclasses, as those of drophot are. A state that was saved by drophot
                before it stored the arguments is checked by the names alone.

        Raises:
            ValueError: As there.
        """
        super().load_state_dict({n: value for n, value in state_dict.items() if n != _RANDOM})
        random = state_dict.get(_RANDOM, {})
        for name, stream in self._statistics.streams.items():
            stream.load(random.get(name))

    def update_loss(self, index: Tensor, loss: Tensor) -> None:
        """Present a batch by its losses, for a model without logits `(B, C)`.

        The tracker must have only statistics of the loss: `"loss"`, :class:`drophot.tracking.Last`,
        :class:`drophot.tracking.MovingAverage`, :class:`drophot.tracking.WindowSpread` of
        `"loss"`, and a :class:`drophot.tracking.Spread` of it. Whether a sample is correct is not
        known, so there are no forgetting scores, and without targets, indices that do not follow
        their samples cannot be detected.

        Args:
            index: The samples' indices in the dataset, integers, shape `(B,)`.
            loss: The loss of each sample, floats, shape `(B,)`, with or without gradient. A NaN
                makes the statistics of its sample NaN.

        Raises:
            TypeError: If an argument is not such a tensor, or the tracker has a statistic that
                needs logits.
            ValueError: If a shape is wrong; on a CPU also if an index is out of range or a sample
                was presented by `update` before, on a GPU when the tracker is read. Nothing is
                counted then.

        Example:
            >>> tracker = DynamicsTracker(3, statistics=["loss"])
            >>> tracker.update_loss(torch.tensor([2, 0]), torch.tensor([0.5, 4.0]))
            >>> tracker.scores("loss", missing="nan")
            tensor([4.0000,    nan, 0.5000])
        """
        validation.check_loss(index, loss)
        if names := self._statistics.not_of_losses:
            raise TypeError(
                f"`update_loss` needs a tracker whose statistics are all of the loss, got "
                f"{', '.join(map(repr, names))}, which need logits. Create it with "
                f'`DynamicsTracker(..., statistics=["loss"])`.'
            )
        if len(index) == 0:
            return
        with torch.no_grad():
            values = loss.detach().float()
            rows = record_losses(self._state, index, values.device)
            means = values[:, None].expand(-1, self._statistics.num_values)
            self._accumulate(rows, means, [values] * len(self._statistics.accumulators))

    def update_correct(self, index: Tensor, correct: Tensor) -> None:
        """Not available: the statistics need logits.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "`update_correct` cannot be called on a DynamicsTracker, whose statistics need the "
            "logits. Call `update`, or use a ForgettingTracker."
        )

    def scores(  # pyright: ignore[reportIncompatibleMethodOverride] # by name: "aum" comes first
        self,
        statistic: str = "forgetting",
        *,
        never_learned: NeverLearned = "hardest",
        missing: Missing = "raise",
    ) -> Tensor:
        """One number for each sample. `tracker.statistics[name].hard_end` says which end is hard.

        Args:
            statistic: The name of the statistic. `"forgetting"`, `"hardest"` and `"zero"` give the
                scores of :meth:`drophot.ForgettingTracker.scores`.
            never_learned: For `"forgetting"`, the score of a sample that was never correct.
            missing: How to treat samples that were never presented: raise an error (`"raise"`) or
                give them NaN (`"nan"`).

        Returns:
            Scores, shape `(N,)`, on the tracker's device: float32; for `"forgetting"` int64, unless
            `missing="nan"`.

        Raises:
            ValueError: If the tracker does not keep the statistic, another argument is unknown, a
                sample was never presented or too rarely for the statistic, a batch had wrong
                indices, or forgetting scores are requested after `update_loss`.
        """
        if statistic in ("forgetting", "hardest", "zero"):
            self._read()  # raises the error of a batch
            if n := int((self._state.targets == ONLY_LOSS).sum()):
                raise ValueError(
                    f"`scores({statistic!r})` needs logits, but {n} of {self.num_samples} samples "
                    f"were presented by `update_loss`. Name one of "
                    f"{', '.join(map(repr, self._statistics.by_name))}."
                )
        if statistic == "forgetting":
            return super().scores(never_learned, missing=missing)
        if statistic == "hardest" or statistic == "zero":
            return super().scores(statistic, missing=missing)
        if statistic not in self._statistics.by_name:
            known = ("forgetting", *self._statistics.by_name)
            raise ValueError(
                f"`statistic` must be one of {', '.join(map(repr, known))}, got {statistic!r}. To "
                f"track another one, name it in `DynamicsTracker(..., statistics=[...])`."
            )
        columns = self._presented(missing)
        score = self._statistics.by_name[statistic]
        if missing == "raise" and isinstance(score, Accumulator):
            validation.check_presented_often(columns["history"], statistic, score.num_needed)
        return self._of_each_sample(columns, statistic)

    def columns(self) -> dict[str, np.ndarray]:
        """Everything at once, for a table: `pandas.DataFrame(tracker.columns(), index=ids)`.

        Returns:
            The columns of :meth:`drophot.ForgettingTracker.columns`, and each of the statistics as
            in `scores`, NaN for a sample that was never presented.

        Raises:
            ValueError: If a batch had wrong indices.
        """
        columns, state = super().columns(), self._read()
        for name in self._statistics.by_name:
            columns[name] = self._of_each_sample(state, name).cpu().numpy().copy()
        return columns

    def _new_state(self, device: torch.device | str | None) -> State:
        by_name = self._statistics.by_name
        labels = tuple(score_labels.label(name, score) for name, score in by_name.items())
        return State(
            self.num_samples,
            {"history": (torch.int64, ()), **self._kept.columns()},
            self._kept.join,
            device,
            statistics=() if labels == DEFAULT else labels,
            own_scores=self._statistics.checked_names,
        )

    def _accumulate(self, rows: Rows, values: Tensor, series: list[Tensor]) -> None:
        """Add the values of a batch, in its own order, to those of its samples."""
        device, order = rows.position.device, rows.order
        values = to_device(values, device).index_select(0, order)
        series = [to_device(part, device).index_select(0, order) for part in series]
        self._kept.add(self._state.columns, rows.position, rows.repeats, values, series)

    def _of_each_sample(self, columns: Columns, name: str) -> Tensor:
        """A statistic `(N,)`, NaN for a sample that was never presented."""
        presented = packed_history.presentations(columns["history"])
        score = self._statistics.by_name[name]
        if isinstance(score, Accumulator):
            return self._kept.result(score, columns)
        if isinstance(score, Spread):
            return (columns[_square_column(score.score)] / presented).sqrt()
        means = columns["means"][:, self._statistics.column(score)]
        return torch.where(presented > 0, means, torch.nan)


def _layout(kept: Statistics, means: RunningMeans) -> Layout | None:
    if kept.own or kept.accumulators:
        return None
    squares = {kept.fused[value]: name for name, value in means.squares.items()}
    return Layout(
        values=sum(1 << value for value in kept.fused),
        squares=sum(1 << value for value in squares),
        columns=("means", "tails", *(squares[value] for value in sorted(squares))),
    )


def _square_column(score: Score) -> str:
    return "squares" if score == CONFIDENCE else f"squares_{score.name}"


def _square_columns(statistics: Statistics) -> dict[str, int]:
    """The columns of sums of squares, and the value that each is of."""
    spreads = [score for score in statistics.by_name.values() if isinstance(score, Spread)]
    return {_square_column(spread.score): statistics.column(spread) for spread in spreads}
