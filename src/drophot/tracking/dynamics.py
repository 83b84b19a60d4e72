"""Training dynamics: margin, error, confidence and loss of every sample, from the same logits."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from drophot.tracking import packed_history, validation
from drophot.tracking.forgetting import ForgettingTracker, Missing, NeverLearned
from drophot.tracking.state import Columns, State, bring, join_histories

Statistic = Literal["forgetting", "aum", "el2n", "confidence", "variability", "loss"]

_AUM, _EL2N, _CONFIDENCE, _LOSS = range(4)


class DynamicsTracker(ForgettingTracker):
    r"""Forgetting events, and with them AUM, EL2N, confidence, variability and loss.

    Each is taken over the presentations of a sample, from the logits :math:`z`, the probabilities
    :math:`p = \mathrm{softmax}(z)` and the target :math:`y`:

    ============== ====================================================== ======================
    statistic      of a sample                                            the hard ones score
    ============== ====================================================== ======================
    `aum`          mean of :math:`z_y - \max_{k \ne y} z_k`               low
    `el2n`         mean of :math:`\lVert p - \mathrm{onehot}(y) \rVert_2` high
    `confidence`   mean of :math:`p_y`                                    low
    `variability`  standard deviation of :math:`p_y` (divided by n)       high: ambiguous
    `loss`         mean of :math:`-\log p_y`                              high
    ============== ====================================================== ======================

    All are kept in float32, whatever the logits' precision, as running means with eight bits more
    and (Welford's) sums of squares, so that thousands of presentations lose no digits. The state is
    36 bytes a sample. Infinite logits are taken as limits: a sample whose own class was masked by
    `-inf` once has an AUM of `-inf` and an infinite loss from then on, and the others are finite.

    Everything else is as in :class:`drophot.ForgettingTracker`: `update`, `observe`, `watch` and
    `attach`, `sync`, the state. Which presentations are meant is the caller's choice here too; the
    papers judge the training batches as they pass.

    References:
        AUM: Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking,
        NeurIPS 2020, https://arxiv.org/abs/2001.10528. EL2N: Paul et al., Deep Learning on a Data
        Diet, NeurIPS 2021, https://arxiv.org/abs/2107.07075, at one epoch; here its mean over all
        that were presented. Confidence and variability: Swayamdipta et al., Dataset Cartography,
        EMNLP 2020, https://arxiv.org/abs/2009.10795.

    Args:
        num_samples: `N`, the length of the dataset whose indices will come.
        device: Where the state lives. `None` means where the first batch's logits are.

    Raises:
        TypeError: If `num_samples` is not an integer.
        ValueError: If `num_samples` is less than 1.

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

    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Present a batch: judge it by its logits.

        Args:
            index: The samples' indices in the dataset, integers, shape `(B,)`.
            logits: The model's outputs, shape `(B, C)` with `C` at least 2, any float dtype, with
                or without gradient; not probabilities. A NaN makes its sample's statistics NaN.
            targets: The true classes, integers from 0 to `C - 1`, shape `(B,)`.

        Raises:
            TypeError: As in :meth:`drophot.ForgettingTracker.update`.
            ValueError: As there.
            RuntimeError: As there.
        """
        validation.batch(index, logits, targets)
        if len(index) == 0:
            return
        with torch.no_grad():
            targets = bring(targets, logits.device, torch.int64)
            classes = targets.clamp(0, logits.shape[1] - 1)
            values = _values(logits.float(), classes[:, None])
            rows = self._judge(index, logits, targets)
            values = bring(values, rows.place.device).index_select(0, rows.order)
            self._add(rows.place, rows.again, values)

    def update_correct(self, index: Tensor, correct: Tensor) -> None:
        """Not here: the statistics need logits.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "`update_correct` should be called on a ForgettingTracker. Found a DynamicsTracker, "
            "whose statistics need the logits: call `update`."
        )

    def scores(  # pyright: ignore[reportIncompatibleMethodOverride] # by name: "aum" comes first
        self,
        statistic: Statistic | NeverLearned = "forgetting",
        *,
        never_learned: NeverLearned = "hardest",
        missing: Missing = "raise",
    ) -> Tensor:
        """One number for each sample; the class's table says which end is the hard one.

        Args:
            statistic: Which. `"forgetting"` is :meth:`drophot.ForgettingTracker.scores`, and so are
                that method's own words, `"hardest"` and `"zero"`.
            never_learned: For `"forgetting"`, what a sample scores that was never right.
            missing: What happens if a sample was never presented: an error (`"raise"`), or it
                scores NaN (`"nan"`).

        Returns:
            Scores, shape `(N,)`, on the tracker's device: float32; for `"forgetting"` int64, unless
            `missing="nan"`.

        Raises:
            ValueError: If a word is none of those above, a sample was never presented, or a batch
                came with wrong indices.
        """
        if statistic == "forgetting":
            return super().scores(never_learned, missing=missing)
        if statistic == "hardest" or statistic == "zero":
            return super().scores(statistic, missing=missing)
        if statistic not in get_args(Statistic):
            raise ValueError(
                f"`statistic` should be one of {', '.join(map(repr, get_args(Statistic)))}. Found "
                f"{statistic!r}."
            )
        return _statistics(self._presented(missing))[statistic]

    def columns(self) -> dict[str, np.ndarray]:
        """Everything at once, for a table: `pandas.DataFrame(tracker.columns())`.

        Returns:
            NumPy arrays of shape `(N,)`: `index`; `target`, -1 for a sample that was never
            presented; `presentations`; `learned`; `forgetting`, the events alone; and `aum`,
            `el2n`, `confidence`, `variability`, `loss` as in `scores`, NaN for a sample that was
            never presented.

        Raises:
            ValueError: If a batch came with wrong indices.
        """
        columns = {
            "index": torch.arange(self.num_samples),
            "target": self._state.targets,
            "presentations": self.presentations,
            "learned": self.learned,
            "forgetting": self.counts,
            **_statistics(self._read()),
        }
        return {name: column.cpu().numpy().copy() for name, column in columns.items()}

    def _new_state(self, device: torch.device | str | None) -> State:
        columns = {
            "history": (torch.int64, ()),
            "means": (torch.float32, (4,)),
            "squares": (torch.float32, ()),
            "tails": (torch.int8, (4,)),  # what the means are more than float32 can say
        }
        return State(self.num_samples, columns, _join, device)

    def _add(self, place: Tensor, again: Tensor | None, values: Tensor) -> None:
        """Take in values (B, 4) of the samples at `place`, ascending."""
        columns = self._state.columns
        size = values.new_ones(len(place))
        squares = torch.zeros_like(size)
        if again is not None:
            # Samples that stand several times in the batch are a group each: first their own mean.
            group = torch.zeros_like(place)
            group[1:] = (~again).cumsum(0)
            size = torch.zeros_like(size).index_add_(0, group, size).index_select(0, group)
            sums = torch.zeros_like(values).index_add_(0, group, values)
            mean = sums.index_select(0, group) / size[:, None]
            apart = (values - mean)[:, _CONFIDENCE].square()
            squares = squares.index_add_(0, group, apart).index_select(0, group)
            values = mean
        total = packed_history.presentations(columns["history"].index_select(0, place))
        names = ("means", "tails", "squares")
        mean, tail, before = (columns[name].index_select(0, place) for name in names)
        known = _Part(total - size, mean, _unpacked(mean, tail), before)
        pooled = _pool(known, _Part(size, values, torch.zeros_like(values), squares))
        # Repeats write the same numbers to the same place.
        for name, column in zip(names, pooled, strict=True):
            columns[name].index_copy_(0, place, column)


def _statistics(whole: Columns) -> dict[str, Tensor]:
    """What the columns say of each sample, NaN for one that was never presented."""
    presented = packed_history.presentations(whole["history"])
    means = torch.where(presented[:, None] > 0, whole["means"], torch.nan)
    return {
        "aum": means[:, _AUM],
        "el2n": means[:, _EL2N],
        "confidence": means[:, _CONFIDENCE],
        "variability": (whole["squares"] / presented).sqrt(),
        "loss": means[:, _LOSS],
    }


def _values(logits: Tensor, targets: Tensor) -> Tensor:
    """Margin, error, confidence and loss (B, 4), of logits (B, C) in float32 and targets (B, 1)."""
    own = logits.gather(1, targets)
    others = logits.scatter(1, targets, -torch.inf)
    nearest = others.amax(1, keepdim=True)
    margin = own - nearest
    # The largest logit becomes 0, so that nothing overflows; p = exp(logits) / total. An infinite
    # one becomes the largest finite one before, beside which all others vanish as they should.
    most = torch.finfo(torch.float32).max
    largest = torch.maximum(own, nearest).clamp(max=most)
    own = own.clamp(max=most) - largest
    others = (others.clamp(max=most) - largest).exp()
    rest = others.sum(1, keepdim=True)
    # total - 1 and 1 - p_y without the 1, in which the digits of a sure sample would be lost.
    beyond = rest + own.expm1()
    total = beyond + 1
    error = torch.linalg.vector_norm(others, dim=1, keepdim=True).hypot(rest) / total
    return torch.cat([margin, error, own.exp() / total, beyond.log1p() - own], 1)


class _Part(NamedTuple):
    """Some presentations: how many, means and what those lack, and the sum of squares."""

    size: Tensor
    means: Tensor
    tails: Tensor
    squares: Tensor


def _pool(before: _Part, after: _Part) -> tuple[Tensor, Tensor, Tensor]:
    """Means, tails (packed) and squares of two parts together."""
    # Chan, Golub and LeVeque, 1979; with one new value it is Welford's update.
    share = after.size / (before.size + after.size)
    apart = (after.means - before.means) + (after.tails - before.tails)
    squares = after.squares + apart[:, _CONFIDENCE].square() * before.size * share
    step = apart * share[:, None]
    # A sum, and what its rounding lost (Knuth's TwoSum): a settled mean would not move otherwise.
    rough = before.means + step
    lost = rough - before.means
    lost = (before.means - (rough - lost)) + (step - lost)
    tails = before.tails + lost
    means = rough + tails
    tails = tails - (means - rough)
    # What is infinite stays so; of two infinities that differ there is no mean.
    beyond = before.means + after.means
    beyond = torch.where(before.size[:, None] > 0, beyond, after.means)
    means = torch.where(beyond.isfinite(), means, beyond)
    return means, _packed(means, tails), before.squares + squares


def _packed(means: Tensor, tails: Tensor) -> Tensor:
    """What a mean lacks, at most half of its last bit, in 8 bits."""
    return (tails / _unit(means)).nan_to_num(0, 0, 0).round().clamp(-127, 127).to(torch.int8)


def _unpacked(means: Tensor, tails: Tensor) -> Tensor:
    return torch.where(tails != 0, tails * _unit(means), 0.0)


def _unit(means: Tensor) -> Tensor:
    return means.abs() * 2.0**-31  # half of the last bit is at most 2 ** -24, and 127 of these


def _join(before: Columns, base: Columns, after: Columns) -> Columns:
    """As `join_histories`; what the rank has is split into the base and what came to it."""
    joined = join_histories(before, base, after)
    n, n_base, total = (packed_history.presentations(p["history"]) for p in (before, base, after))
    size = total - n_base
    tails = {id(p): _unpacked(p["means"], p["tails"]) for p in (before, base, after)}
    apart = (after["means"] - base["means"]) + (tails[id(after)] - tails[id(base)])
    apart = apart * (total / size)[:, None]
    between = apart[:, _CONFIDENCE].square() * n_base * (size / total)
    squares = (after["squares"] - base["squares"] - between).clamp(min=0)
    # Where one is infinite, so is what came to it, or nothing that is finite can be told of it.
    came = torch.where(apart.isfinite(), base["means"] + apart, after["means"])
    means, packed, squares = _pool(
        _Part(n, before["means"], tails[id(before)], before["squares"]),
        _Part(size, came, torch.where(apart.isfinite(), tails[id(base)], 0.0), squares),
    )
    return joined | {"means": means, "tails": packed, "squares": squares}
