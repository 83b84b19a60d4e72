"""The selectors behind the short names: by score, at random, and by the model's features."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from drophot.coreset.density_facility_location import density_facility_location
from drophot.coreset.feature_extraction import features
from drophot.coreset.greedy import Coreset
from drophot.coreset.greedy_facility_location import facility_location
from drophot.coreset.greedy_k_center import k_center
from drophot.coreset.score_ranking import DrawByScore, End, select_by_score
from drophot.coreset.selectors import Evidence, Selector, check_evidence


@dataclass(frozen=True, slots=True)
class ByScore:
    """Keep the samples with the highest or the lowest scores, the modes "high" and "low"."""

    end: End = "high"
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.end not in ("high", "low"):
            raise ValueError(f'`end` must be "high" or "low", got {self.end!r}.')

    @property
    def name(self) -> str:
        return self.end + "-balanced" * self.balanced

    @property
    def needs(self) -> Collection[str]:
        return ("scores", "targets") if self.balanced else ("scores",)

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        check_evidence(self, evidence)
        assert evidence.scores is not None
        targets = evidence.targets if self.balanced else None
        return select_by_score(self.draw, evidence.scores, ratio, targets=targets, seed=seed)

    @property
    def draw(self) -> DrawByScore:
        return DrawByScore(self.end)


@dataclass(frozen=True, slots=True)
class Random:
    """Keep a uniformly random subset, the mode "random"."""

    balanced: bool = False

    @property
    def name(self) -> str:
        return "random" + "-balanced" * self.balanced

    @property
    def needs(self) -> Collection[str]:
        return ("targets",) if self.balanced else ()

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        check_evidence(self, evidence)
        targets = evidence.targets if self.balanced else None
        scores = torch.zeros((), device="cpu").expand(evidence.num_samples)  # values do not matter
        return select_by_score(self.draw, scores, ratio, targets=targets, seed=seed)

    @property
    def draw(self) -> DrawByScore:
        return DrawByScore(None)


@dataclass(frozen=True, slots=True)
class KCenter:
    """k-center on the inputs of the model's last linear layer, in each class; mode "k_center"."""

    name = "k_center"
    needs = ("model", "targets")

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        return _select_by_features(self, k_center, ratio, evidence, seed)

    def features(self, model: nn.Module, dataset: Dataset[Any]) -> Tensor:
        """The vectors that it selects by; an error if the model does not have them."""
        return features(model, dataset, "penultimate")


@dataclass(frozen=True, slots=True)
class FacilityLocation:
    """Facility location on softmax − one-hot, in each class; the mode "facility_location"."""

    name = "facility_location"
    needs = ("model", "targets")

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        return _select_by_features(self, facility_location, ratio, evidence, seed)

    def features(self, model: nn.Module, dataset: Dataset[Any]) -> Tensor:
        """The vectors that it selects by; an error if the model does not have them."""
        return features(model, dataset, "error")


@dataclass(frozen=True, slots=True)
class DensityFacilityLocation:
    """SubZeroCore on the inputs of the model's last linear layer, in each class.

    The mode "density_facility_location".
    """

    name = "density_facility_location"
    needs = ("model", "targets")

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        return _select_by_features(self, density_facility_location, ratio, evidence, seed)

    def features(self, model: nn.Module, dataset: Dataset[Any]) -> Tensor:
        """The vectors that it selects by; an error if the model does not have them."""
        return features(model, dataset, "penultimate")


FeatureSelector = KCenter | FacilityLocation | DensityFacilityLocation


def _select_by_features(
    selector: FeatureSelector,
    algorithm: Callable[..., Coreset],
    ratio: float,
    evidence: Evidence,
    seed: int,
) -> Tensor:
    check_evidence(selector, evidence)
    assert evidence.model is not None
    assert evidence.dataset is not None
    vectors = selector.features(evidence.model, evidence.dataset)
    return algorithm(vectors, ratio, targets=evidence.targets, seed=seed).indices


SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        *(ByScore("high"), ByScore("low"), Random()),
        *(KCenter(), FacilityLocation(), DensityFacilityLocation()),
    )
}


def selector_by_name(name: str) -> Selector:
    """The built-in selector with this short name."""
    if name not in SELECTORS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, SELECTORS))}, got {name!r}.")
    return SELECTORS[name]
