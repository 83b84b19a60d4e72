"""The interface of selectors, and the checks of their evidence and results."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from drophot._core.arrays import as_real_tensor
from drophot._core.ratios import num_kept
from drophot._core.signatures import signature_error
from drophot.coreset.class_balance import check_targets
from drophot.coreset.score_ranking import check_no_nan, check_scores

NEEDS = ("scores", "confidence", "model", "targets")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The information that a selector receives about the samples.

    The caller fills in what the selector lists in `needs`; the other attributes may be `None`.
    Lists and arrays become tensors.

    Args:
        num_samples: `N`, the number of samples to select from.
        scores: One score per sample, shape `(N,)`. Integers become float64 (float32 on devices
            that lack it).
        confidence: The mean probability of each sample's target over the presentations that gave
            the scores, shape `(N,)`.
        model: The scoring network, trained on all samples.
        targets: The samples' classes, integers, shape `(N,)`.
        dataset: The training set that `model` can be run on. It is given together with `model`.

    Raises:
        TypeError: If `scores` or `confidence` are not real numbers, or `targets` not integers.
        ValueError: If `scores`, `confidence` or `targets` do not have shape `(N,)`, or a score is
            NaN.

    Example:
        >>> evidence = Evidence(num_samples=3, scores=torch.tensor([0.5, 0.1, 0.9]))
        >>> evidence.scores.argmax(), evidence.model is None
        (tensor(2), True)
    """

    num_samples: int
    scores: Tensor | None = None
    confidence: Tensor | None = None
    model: nn.Module | None = None
    targets: Tensor | None = None
    dataset: Dataset[Any] | None = None

    def __post_init__(self) -> None:
        if self.scores is not None:
            object.__setattr__(self, "scores", self._checked_scores(self.scores))
        if self.confidence is not None:
            confidence = as_real_tensor("confidence", self.confidence)
            if confidence.shape != (self.num_samples,):
                raise ValueError(
                    f"`confidence` must have one entry for each of the {self.num_samples} samples, "
                    f"got shape {tuple(confidence.shape)}."
                )
            object.__setattr__(self, "confidence", confidence)
        if self.targets is not None:
            targets = torch.from_numpy(check_targets(self.targets, self.num_samples))
            object.__setattr__(self, "targets", targets)

    def _checked_scores(self, scores: Tensor) -> Tensor:
        found = check_scores(scores)
        if len(found) != self.num_samples:
            raise ValueError(
                f"`scores` must have one entry for each of the {self.num_samples} samples, got "
                f"{len(found)}."
            )
        check_no_nan(found, None)
        if found.is_floating_point():
            return found
        return found.float() if found.device.type == "mps" else found.double()


class Selector(Protocol):
    """The interface of a selector: an object with `name`, `needs` and `select`.

    Every object with these three members can be passed as `mode` to :func:`drophot.select`,
    :class:`drophot.DropHot` and :class:`drophot.Grid`; it does not have to inherit from this class.

    Example:
        >>> class FirstSamples:
        ...     name = "first"
        ...     needs = ()
        ...
        ...     def select(self, ratio, evidence, seed):
        ...         return torch.arange(max(1, int(ratio * evidence.num_samples + 0.5)))
        >>> from drophot import select
        >>> select([0.3, 0.2, 0.1, 0.0], 0.5, FirstSamples())
        tensor([0, 1])
    """

    @property
    def name(self) -> str:
        """The name in records, tables and file names; it identifies the selector's settings."""
        ...

    @property
    def needs(self) -> Collection[str]:
        """What `select` uses: any of "scores", "confidence", "model" and "targets"."""
        ...

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        """Select a fraction of the samples.

        Args:
            ratio: The fraction kept, in (0, 1].
            evidence: The number of samples, and what `needs` lists.
            seed: Determines every random choice.

        Returns:
            The indices of the kept samples, int64, unique, in any order, of shape `(K,)` with
            `K = max(1, floor(ratio * N + 0.5))`.
        """
        ...


def is_selector(value: object) -> bool:
    """Whether a value has the members of a `Selector`."""
    members = all(hasattr(value, name) for name in ("name", "needs", "select"))
    return members and not isinstance(value, type)


def check_selector(argument: str, selector: Selector) -> None:
    """Raise an error if a selector's `name` or `needs` cannot be used."""
    if not isinstance(selector.name, str) or not selector.name:
        raise TypeError(
            f"The `name` of `{argument}`, a {type(selector).__name__}, must be a non-empty string, "
            f"got {selector.name!r}."
        )
    needs: object = selector.needs
    if not isinstance(needs, Collection) or any(need not in NEEDS for need in needs):
        raise ValueError(
            f"The `needs` of selector {selector.name!r} must be a collection of "
            f"{', '.join(map(repr, NEEDS))}, got {selector.needs!r}."
        )
    if wrong := signature_error(selector.select, 0.5, None, 0):
        raise TypeError(
            f"`select` of selector {selector.name!r} must take three arguments, the ratio, the "
            f"evidence and the seed, got {wrong}."
        )


def check_evidence(selector: Selector, evidence: Evidence, hint: str = "") -> None:
    """Raise an error that says what the selector needs and the evidence lacks."""
    missing = [need for need in selector.needs if getattr(evidence, need) is None]
    if "model" in selector.needs and not missing and evidence.dataset is None:
        missing = ["dataset"]
    if missing:
        raise ValueError(
            f"Selector {selector.name!r} needs {' and '.join(f'`{need}`' for need in missing)}, "
            f"which the evidence does not include.{hint}"
        )


def checked_indices(selector: Selector, indices: Any, ratio: float, num_samples: int) -> Tensor:
    """The result of a selector, in ascending order on the CPU, checked to be a valid selection."""
    name = f"Selector {selector.name!r}"
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
        found = type(indices).__name__
        if isinstance(indices, Tensor):
            found = f"{indices.dtype} of shape {tuple(indices.shape)}"
        raise TypeError(f"{name} must return a one-dimensional int64 tensor, got {found}.")
    ordered = indices.detach().cpu().sort().values
    size = num_kept(num_samples, ratio)
    if len(ordered) != size:
        raise ValueError(
            f"{name} must return {size} indices, max(1, floor(ratio * N + 0.5)) for "
            f"ratio={ratio:g} and N={num_samples}, got {len(ordered)}."
        )
    for extreme in (ordered[0], ordered[-1]):
        if not 0 <= extreme < num_samples:
            raise ValueError(
                f"{name} must return indices in [0, {num_samples}), got {int(extreme)}."
            )
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"{name} must return each index once, got {int(repeated[0])} repeated.")
    return ordered
