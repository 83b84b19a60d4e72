"""Scores of single presentations: the `Score` protocol and the built-in statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from drophot._core.random_state import RandomStream
from drophot._core.signatures import signature_error
from drophot.tracking import score_checks
from drophot.tracking.accumulators import Accumulator
from drophot.tracking.validation import describe

HardEnd = Literal["high", "low"]
Statistic = Literal["forgetting", "aum", "el2n", "confidence", "variability", "loss"]


@runtime_checkable
class Score(Protocol):
    """A score of a presentation, which :class:`drophot.DynamicsTracker` averages per sample.

    Any object with these three members is a score; it does not inherit from this class. Pass it in
    `DynamicsTracker(num_samples, statistics=[...])` and read it by `tracker.scores(name)`.

    Attributes:
        name: A Python identifier that no other statistic or column of the tracker has.
        hard_end: Which scores hard samples have, `"high"` (a loss) or `"low"` (a margin).

    Example:
        >>> from drophot import DynamicsTracker
        >>> class Entropy:
        ...     name = "entropy"
        ...     hard_end = "high"
        ...
        ...     def __call__(self, logits, targets):
        ...         return torch.distributions.Categorical(logits=logits).entropy()
        >>> tracker = DynamicsTracker(num_samples=2, statistics=["aum", Entropy()])
        >>> tracker.update(torch.arange(2), torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> tracker.scores("entropy")
        tensor([1.3863, 1.3863])
        >>> tracker.statistics["entropy"].hard_end
        'high'
    """

    @property
    def name(self) -> str: ...

    @property
    def hard_end(self) -> HardEnd: ...

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Score each sample of a batch.

        It is called once per batch without gradients. It must not change its arguments. Random
        numbers that it draws from the global generators do not change those of the training.

        Args:
            logits: The model's outputs, float32, shape `(B, C)`, on the model's device.
            targets: The classes, int64 from 0 to `C - 1`, shape `(B,)`, on the same device.

        Returns:
            Finite floats, shape `(B,)`; they are kept as float32.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The standard deviation of a score over the presentations of a sample (divided by n).

    The built-in `"variability"` is the spread of `"confidence"`. A spread and the mean of the same
    score share one call per batch: `statistics=[score, Spread(score=score, name="score_spread")]`.

    Args:
        score: The score whose values vary from one presentation to the next.
        name: The name of the spread, different from that of the score.
        hard_end: Which spreads hard (here: ambiguous) samples have.

    Example:
        >>> from drophot import DynamicsTracker
        >>> class Top:
        ...     name = "top"
        ...     hard_end = "low"
        ...
        ...     def __call__(self, logits, targets):
        ...         return logits.amax(dim=1)
        >>> tracker = DynamicsTracker(1, statistics=[Spread(score=Top(), name="top_spread")])
        >>> for largest in (1.0, 3.0):
        ...     tracker.update(torch.tensor([0]), torch.tensor([[largest, 0.0]]), torch.tensor([0]))
        >>> tracker.scores("top_spread")
        tensor([1.])
    """

    score: Score
    name: str
    hard_end: HardEnd = "high"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The values of `score`, whose standard deviation the tracker keeps.

        Args:
            logits: The model's outputs, shape `(B, C)`.
            targets: The classes, shape `(B,)`.

        Returns:
            The values, shape `(B,)`.
        """
        return self.score(logits, targets)


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    """A column of `built_in_values`."""

    name: str
    hard_end: HardEnd
    column: int

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return built_in_values(logits.float(), targets[:, None])[:, self.column]


AUM = _BuiltIn("aum", "low", 0)
EL2N = _BuiltIn("el2n", "high", 1)
CONFIDENCE = _BuiltIn("confidence", "low", 2)
LOSS = _BuiltIn("loss", "high", 3)
VARIABILITY = Spread(score=CONFIDENCE, name="variability")

BUILT_IN: Mapping[str, Score] = MappingProxyType({
    score.name: score for score in (AUM, EL2N, CONFIDENCE, VARIABILITY, LOSS)
})
DEFAULT = tuple(BUILT_IN)
_FUSED = (AUM, EL2N, CONFIDENCE, LOSS)  # the columns of `built_in_values`

# Other names that `scores` accepts, and the other columns of a tracker's table and CSV file.
_RESERVED = {"forgetting", "hardest", "zero", "index", "target", "presentations", "learned", "id"}


def built_in_values(logits: Tensor, targets: Tensor) -> Tensor:
    """Margin, error norm, confidence and loss `(B, 4)` of logits `(B, C)` and targets `(B, 1)`.

    One function computes all four, because they share the exponentials. Logits are float32.
    """
    own = logits.gather(1, targets)
    nearest = logits.scatter(1, targets, -torch.inf).amax(1, keepdim=True)
    margin = own - nearest
    # The largest logit becomes 0, so that nothing overflows; p = exp(logits) / total. An infinite
    # logit is first replaced by the largest finite number, so that all others get probability 0.
    most = torch.finfo(torch.float32).max
    largest = torch.maximum(own, nearest).clamp(max=most)
    own = own.clamp(max=most) - largest
    # Once for all classes: on a CPU, each `exp` waits for all threads of torch.
    powers = (logits.clamp(max=most) - largest).exp()
    others = powers.scatter(1, targets, 0)
    rest = others.sum(1, keepdim=True)
    # total - 1 and 1 - p_y without the 1, which would round away the digits of a confident sample.
    beyond = rest + own.expm1()
    total = beyond + 1
    error = torch.linalg.vector_norm(others, dim=1, keepdim=True).hypot(rest) / total
    return torch.cat([margin, error, powers.gather(1, targets) / total, beyond.log1p() - own], 1)


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics of a tracker, and the values `(B, M)` from which they are accumulated.

    The `M` values of a presentation are the built-in ones that are needed, in the order of
    `built_in_values`, followed by those of the user's scores.
    """

    by_name: Mapping[str, Score]
    fused: tuple[int, ...]  # the columns of `built_in_values` that are needed
    own: tuple[Score, ...]  # the user's scores, each once
    accumulators: tuple[Accumulator, ...]
    # One for each of these, by name, so that no score changes the values of another one.
    streams: Mapping[str, RandomStream] = field(compare=False)

    @property
    def num_values(self) -> int:
        """`M`."""
        return len(self.fused) + len(self.own)

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names of the user's scores, in the order of their values."""
        return tuple(score.name for score in self.own)

    @property
    def checked_names(self) -> tuple[str, ...]:
        """The names of all scores whose values must be finite, in the order of `to_check`."""
        return self.own_names + tuple(own.name for own in self.accumulators if _is_of_own(own))

    def column(self, score: Score) -> int:
        """Which of the `M` values a statistic is taken of."""
        source = _source(score)
        if isinstance(source, _BuiltIn):
            return self.fused.index(source.column)
        return len(self.fused) + self.own_names.index(source.name)

    def values(self, logits: Tensor, classes: Tensor) -> Tensor:
        """All values `(B, M)` of float32 logits `(B, C)` and valid classes `(B, 1)`."""
        if not self.own and len(self.fused) == len(_FUSED):
            return built_in_values(logits, classes)
        parts = [logits.new_empty(len(logits), 0)]
        if self.fused:
            values = built_in_values(logits, classes)
            parts += [values[:, column : column + 1] for column in self.fused]
        logits, targets = logits.detach(), classes[:, 0]
        for score in self.own:
            found = self._call(score, logits, targets)
            parts.append(score_checks.checked(score.name, found, logits)[:, None])
        return torch.cat(parts, 1)

    def series(self, logits: Tensor, classes: Tensor) -> list[Tensor]:
        """The values of each accumulator, as in `values`."""
        logits, targets = logits.detach(), classes[:, 0]
        found = [self._call(own, logits, targets) for own in self.accumulators]
        return [
            score_checks.checked(own.name, values, logits) if _is_of_own(own) else values
            for own, values in zip(self.accumulators, found, strict=True)
        ]

    def to_check(self, values: Tensor, series: list[Tensor]) -> Tensor | None:
        """The values `(B, K)` that must be finite, those of the user's scores, if there are any."""
        if not self.checked_names:
            return None
        own = zip(self.accumulators, series, strict=True)
        rest = [part[:, None] for score, part in own if _is_of_own(score)]
        return torch.cat([values[:, len(self.fused) :], *rest], 1)

    @property
    def not_of_losses(self) -> list[str]:
        """The names of the statistics that need more than the loss of each sample."""
        return [
            name for name, score in self.by_name.items() if getattr(score, "score", score) != LOSS
        ]

    def _call(self, score: Score, logits: Tensor, targets: Tensor) -> Tensor:
        stream = self.streams[score.name]
        with (
            stream.on(logits.device),
            score_checks.unchanged(score.name, logits=logits, targets=targets),
        ):
            return score(logits, targets)


def _source(score: Score) -> Score:
    """The score that gives the values."""
    return score.score if isinstance(score, Spread) else score


def _is_of_own(score: Accumulator) -> bool:
    """Whether an accumulator is of a score of the user."""
    source = getattr(score, "score", None)
    return source is not None and not is_builtin_score(source)


def named_score(score: Score | str) -> Score:
    """The score of one that keeps its values: the built-in one of that name, or the object."""
    if isinstance(score, str):
        found = BUILT_IN.get(score)
        if found is None or isinstance(found, Spread):
            names = [name for name, known in BUILT_IN.items() if not isinstance(known, Spread)]
            raise ValueError(
                f"`score` must be one of {', '.join(map(repr, names))} or a Score, got {score!r}."
            )
        return found
    if isinstance(score, Spread | Accumulator):
        raise TypeError(
            f"`score` must be a score of single presentations, got a {type(score).__name__}."
        )
    if not isinstance(score, Score):
        raise TypeError(
            f"`score` must be the name of a score or an object with `name`, `hard_end` and "
            f"`__call__(logits, targets)`, got {describe(score)}."
        )
    return check_score(score)


def validate_statistics(statistics: Iterable[str | Score]) -> Statistics:
    """Check the statistics that a user asks for."""
    if isinstance(statistics, str) or not isinstance(statistics, Iterable):
        raise TypeError(
            f"`statistics` must be a list of names and scores, got {statistics!r}. Pass "
            f"`statistics=[...]`, even for a single one."
        )
    by_name: dict[str, Score] = {}
    sources: dict[str, Score] = {}
    for item in statistics:
        if item == "forgetting":
            continue  # which every tracker keeps
        score = _lookup(item) if isinstance(item, str) else check_score(item)
        if score.name in by_name:
            raise ValueError(
                f"`statistics` must not name a statistic twice, got {score.name!r} twice."
            )
        by_name[score.name] = score
        if isinstance(score, Accumulator):
            continue
        source = _source(score)
        if sources.setdefault(source.name, source) != source:
            raise ValueError(
                f"`statistics` must have different names for different scores, got two that are "
                f"named {source.name!r}."
            )
    for name, score in by_name.items():
        if isinstance(score, Spread) and name in sources:
            raise ValueError(
                f"`statistics` must name a spread differently from every score, got a spread and a "
                f"score that are named {name!r}."
            )
    if not by_name:
        raise ValueError(
            f"`statistics` must have at least one of {', '.join(map(repr, DEFAULT))} or a score, "
            f"got none. For forgetting events alone, use ForgettingTracker."
        )
    by_name = {name: by_name[name] for name in (*DEFAULT, *by_name) if name in by_name}
    fused = tuple(sorted(s.column for s in sources.values() if isinstance(s, _BuiltIn)))
    own = tuple(score for score in sources.values() if not isinstance(score, _BuiltIn))
    accumulators = tuple(s for s in by_name.values() if isinstance(s, Accumulator))
    for name in {score.name for score in accumulators} & sources.keys():
        raise ValueError(
            f"`statistics` must have different names for different scores, got two that are named "
            f"{name!r}."
        )
    streams = {score.name: RandomStream() for score in (*own, *accumulators)}
    return Statistics(by_name, fused, own, accumulators, streams)


def is_builtin_score(score: object) -> TypeGuard[Score]:
    """Whether an object is one of the library's scores, which their names identify."""
    return isinstance(score, _BuiltIn | Spread) and score in BUILT_IN.values()


def _lookup(name: str) -> Score:
    if name not in BUILT_IN:
        raise ValueError(
            f"`statistics` must name {', '.join(map(repr, DEFAULT))} or hold Score objects, got "
            f"{name!r}."
        )
    return BUILT_IN[name]


def check_score(score: Score) -> Score:
    """Refuse an object that is not a score, or one whose name is taken."""
    if isinstance(score, type):
        raise TypeError(
            f"`statistics` must hold objects, got the class {score.__name__}. Pass an instance: "
            f"`{score.__name__}()`."
        )
    if not isinstance(score, Score):
        raise TypeError(
            f"`statistics` must hold names or objects with `name`, `hard_end` and "
            f"`__call__(logits, targets)`, got {describe(score)}."
        )
    if not isinstance(score.name, str) or not score.name.isidentifier():
        raise ValueError(
            f"The `name` of a score must be a Python identifier, got {score.name!r}. Use letters, "
            f"digits and underscores, such as 'top_two_margin'."
        )
    if is_builtin_score(score):
        return score
    if score.name in _RESERVED or score.name in BUILT_IN:
        raise ValueError(
            f"The `name` of a score must differ from the built-in names, got {score.name!r}. "
            f"Choose another one."
        )
    if score.hard_end not in ("high", "low"):
        raise ValueError(
            f'`hard_end` of score {score.name!r} must be "high" or "low": which scores hard '
            f"samples have. Got {score.hard_end!r}."
        )
    if wrong := signature_error(score, None, None):
        raise TypeError(
            f"Score {score.name!r} must take two arguments, the logits and the targets, got "
            f"{wrong}."
        )
    if isinstance(score, Spread):
        if isinstance(score.score, Spread):
            raise TypeError(f"`score` of the spread {score.name!r} must be a score, got a Spread.")
        check_score(score.score)
    return score
