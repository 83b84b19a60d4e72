"""Until coreset/selectors is there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from drophot.coreset import score_selection
from drophot.coreset.feature_extraction import features
from drophot.coreset.stratified import Stratified


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    num_samples: int
    scores: Tensor | None = None
    model: nn.Module | None = None
    targets: Tensor | None = None
    dataset: Dataset[Any] | None = None


class Selector(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> Collection[str]: ...
    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class ByScore:
    mode: Any

    @property
    def name(self) -> str:
        return stratified_name(self.mode)

    @property
    def needs(self) -> Collection[str]:
        return frozenset({"scores"}) if self.mode != "random" else frozenset()

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        scores = evidence.scores
        if self.mode == "random":
            scores = torch.zeros(evidence.num_samples, device="cpu")
        assert scores is not None
        return score_selection.select(scores, ratio, self.mode, seed=seed)


@dataclass(frozen=True)
class OfFeatures:
    name: Literal["k_center", "facility_location"]
    needs = frozenset({"model", "targets"})

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        assert evidence.model is not None
        assert evidence.dataset is not None
        kind = "penultimate" if self.name == "k_center" else "error"
        vectors = features(evidence.model, evidence.dataset, kind)
        import drophot

        choose = getattr(drophot, self.name)
        return choose(vectors, ratio, targets=evidence.targets, seed=seed).indices


def stratified_name(mode: Any) -> str:
    if not isinstance(mode, Stratified):
        return str(mode)
    changed = [(f.name, getattr(mode, f.name)) for f in fields(mode)]
    changed = [pair for pair, f in zip(changed, fields(mode), strict=True) if pair[1] != f.default]
    parts = [str(value) if key == "hard" else f"{key}{value}" for key, value in changed]
    return "-".join(["stratified", *parts])


def selector(name: str) -> Selector:
    if name in ("k_center", "facility_location"):
        return OfFeatures(name)  # type: ignore[arg-type]
    return ByScore(name)


def checked_indices(indices: Tensor, total: int, ratio: float, name: str) -> Tensor:
    return indices


def _select(self: Any, ratio: float, evidence: Evidence, seed: int) -> Tensor:
    return ByScore(self).select(ratio, evidence, seed)


_st: Any = Stratified
_st.name = property(stratified_name)
_st.needs = frozenset({"scores"})
_st.select = _select
