"""A selector that the library does not know, defined here, works through the public door."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drophot import Stratified, facility_location, features, k_center, select
from drophot._core.mode_names import FeatureMode
from drophot.coreset import Evidence, Selector, density_facility_location
from drophot.coreset.builtin_selectors import (
    ByScore,
    DensityFacilityLocation,
    FacilityLocation,
    KCenter,
    Random,
    selector_by_name,
)

SCORES = torch.tensor([5.0, 3.0, 9.0, 1.0, 7.0, 8.0])
TARGETS = torch.tensor([0, 0, 0, 1, 1, 1])


def num_kept(ratio: float, total: int) -> int:
    return max(1, int(ratio * total + 0.5))


@dataclass(frozen=True)
class Median:
    """Keeps the samples whose scores are closest to the median."""

    name: str = "median"
    needs: Collection[str] = ("scores",)

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        assert evidence.scores is not None
        assert evidence.model is None
        distance = (evidence.scores - evidence.scores.median()).abs()
        return distance.argsort(stable=True)[: num_kept(ratio, evidence.num_samples)]


@dataclass(frozen=True)
class FirstOfEachClass:
    """Keeps the first samples of each class, of two classes of the same size."""

    name: str = "first"
    needs: Collection[str] = frozenset({"targets"})

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        assert evidence.scores is None, "it does not need them"
        assert evidence.targets is not None
        half = num_kept(ratio, evidence.num_samples) // 2
        return torch.cat([(evidence.targets == c).nonzero()[:half, 0] for c in (1, 0)])


@dataclass(frozen=True)
class Returns:
    """Returns what a test wants."""

    value: Any
    name: str = "wrong"
    needs: Collection[str] = ()

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        return self.value


def test_a_selector_by_scores_works_in_select() -> None:
    selector: Selector = Median()
    assert select(SCORES, 0.5, selector).tolist() == [0, 1, 4]
    assert select(SCORES.tolist(), 1 / 6, selector).tolist() == [0]


def test_a_selector_by_targets_gets_only_these() -> None:
    assert select(SCORES, 2 / 3, FirstOfEachClass(), targets=TARGETS).tolist() == [0, 1, 3, 4]


def test_a_part_is_what_the_selector_sees_and_indices_are_those_of_all_samples() -> None:
    scores = torch.cat([torch.full((3,), torch.nan), SCORES])
    among = torch.arange(3, 9)
    assert select(scores, 0.5, Median(), among=among).tolist() == [3, 4, 7]
    targets = torch.cat([torch.zeros(3, dtype=torch.int64), TARGETS])
    found = select(scores, 2 / 3, FirstOfEachClass(), targets=targets, among=among.flip(0))
    assert found.tolist() == [3, 4, 6, 7]


def test_the_seed_and_the_number_of_samples_reach_the_selector() -> None:
    class Shuffled:
        name, needs = "shuffled", ()

        def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
            order = torch.Generator().manual_seed(seed)
            indices = torch.randperm(evidence.num_samples, generator=order)
            return indices[: num_kept(ratio, evidence.num_samples)]

    expected = torch.randperm(6, generator=torch.Generator().manual_seed(7))[:3]
    assert select(SCORES, 0.5, Shuffled(), seed=7).tolist() == sorted(expected.tolist())


def test_a_selector_may_compute_gradients() -> None:
    class ByGradient:
        name, needs = "gradient", ("scores",)

        def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
            assert evidence.scores is not None
            scores = evidence.scores.clone().requires_grad_()
            scores.square().sum().backward()
            assert scores.grad is not None
            return scores.grad.argsort()[: num_kept(ratio, evidence.num_samples)]

    assert select(SCORES, 1 / 3, ByGradient()).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("needs", "options", "missing"),
    [
        (("targets",), {}, "`targets`"),
        (("scores", "model"), {"targets": TARGETS}, "`model`"),
    ],
)
def test_what_select_does_not_have_is_named(
    needs: Any, options: dict[str, Any], missing: str
) -> None:
    with pytest.raises(ValueError, match=f"'wrong'.*{missing}"):
        select(SCORES, 0.5, Returns(torch.arange(3), needs=needs), **options)


@pytest.mark.parametrize(
    ("value", "error", "found"),
    [
        ([0, 1, 2], TypeError, "list"),
        (torch.arange(3).int(), TypeError, "int32"),
        (torch.zeros(6, dtype=torch.bool), TypeError, "bool"),
        (torch.arange(3)[:, None], TypeError, r"\(3, 1\)"),
        (torch.arange(2), ValueError, "3 indices.* 2"),
        (torch.arange(4), ValueError, "3 indices.* 4"),
        (torch.tensor([0, 1, 6]), ValueError, r"\[0, 6\).* 6"),
        (torch.tensor([0, -1, 5]), ValueError, r"\[0, 6\).* -1"),
        (torch.tensor([4, 1, 4]), ValueError, "4"),
    ],
    ids=str,
)
def test_an_invalid_selection_is_refused_by_the_selectors_name(
    value: Any, error: type[Exception], found: str
) -> None:
    with pytest.raises(error, match=f"'wrong'.*{found}"):
        select(SCORES, 0.5, Returns(value))


@pytest.mark.parametrize(
    ("mode", "error", "found"),
    [
        (Returns(None, name=""), TypeError, "`mode`.*''"),
        (Returns(None, needs=("score",)), ValueError, "'wrong'.*score"),
        (Returns(None, needs="scores"), ValueError, "'wrong'.*'scores'"),
        (Median, ValueError, "`mode`.*Median"),
        (object(), ValueError, "`mode`.*object"),
    ],
    ids=["name", "needs", "needs is a string", "a class", "an object"],
)
def test_what_is_not_a_selector_is_refused(mode: Any, error: type[Exception], found: str) -> None:
    with pytest.raises(error, match=found):
        select(SCORES, 0.5, mode)


# --- the built-in selectors use the same door -----------------------------------------------------


@pytest.mark.parametrize("mode", ["high", "low", "random", Stratified(bins=3, cutoff=0.2)])
@pytest.mark.parametrize("balanced", [False, True])
def test_built_in_selectors_select_the_same_through_the_door(mode: Any, balanced: bool) -> None:
    scores = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(0))
    targets = scores % 3
    settings = {"high": ByScore("high", balanced), "low": ByScore("low", balanced)}
    settings |= {"random": Random(balanced)}
    strata = Stratified(bins=3, cutoff=0.2, balanced=balanced)
    selector: Selector = settings[mode] if isinstance(mode, str) else strata
    given = {"scores": scores, "targets": targets}
    evidence = Evidence(num_samples=60, **{name: given[name] for name in selector.needs})
    for seed in range(3):
        found = selector.select(0.3, evidence, seed)
        expected = select(scores, 0.3, mode, targets=targets if balanced else None, seed=seed)
        assert torch.equal(found, expected)
        assert torch.equal(select(scores, 0.3, selector, targets=targets, seed=seed), expected) or (
            not balanced
        )


@pytest.mark.parametrize("selector", [ByScore("low", balanced=True), Stratified(balanced=True)])
def test_a_balanced_selector_needs_targets(selector: Selector) -> None:
    with pytest.raises(ValueError, match="`targets`"):
        select(SCORES, 0.5, selector)


@pytest.mark.parametrize(
    ("selector", "algorithm", "kind"),
    [
        (KCenter(), k_center, "penultimate"),
        (FacilityLocation(), facility_location, "error"),
        (DensityFacilityLocation(), density_facility_location, "penultimate"),
    ],
)
def test_selectors_by_features_compute_them_from_the_model(
    selector: Selector, algorithm: Any, kind: Any
) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 5), torch.arange(40) % 3
    model, data = nn.Linear(5, 3), TensorDataset(inputs, targets)
    evidence = Evidence(num_samples=40, model=model, targets=targets, dataset=data)
    expected = algorithm(features(model, data, kind), 0.25, targets=targets, seed=3)
    assert torch.equal(selector.select(0.25, evidence, 3), expected.indices)
    with pytest.raises(ValueError, match=f"'{selector.name}'.*`dataset`"):
        selector.select(0.25, Evidence(num_samples=40, model=model, targets=targets), 3)
    with pytest.raises(ValueError, match=f"'{selector.name}'.*`model`"):
        select(SCORES, 0.5, selector, targets=TARGETS)


def test_names_are_those_of_records() -> None:
    for name in ("high", "low", "random", *get_args(FeatureMode)):
        assert selector_by_name(name).name == name
    with pytest.raises(ValueError, match="`name`.*'hard'"):
        selector_by_name("hard")
    assert ByScore("low", balanced=True).name == "low-balanced"
    assert Random(balanced=True).name == "random-balanced"
    assert Stratified().name == "stratified"
    settings = Stratified(bins=20, cutoff=0.1, hard="low", balanced=True)
    assert settings.name == "stratified-bins20-cutoff0.1-low-balanced"


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"scores": torch.zeros(3, 1)}, ValueError, r"`scores` .*\(3, 1\)"),
        ({"scores": torch.zeros(2)}, ValueError, "`scores` .*3.* 2"),
        ({"scores": torch.tensor(1.0)}, ValueError, r"`scores` .*\(\)"),
        ({"scores": [0.0, float("nan"), 1.0]}, ValueError, "`scores` .*NaN.* 1 of 3"),
        ({"scores": torch.zeros(3, dtype=torch.complex64)}, TypeError, "`scores` .*complex64"),
        ({"scores": "abc"}, TypeError, "`scores` .*"),
        ({"targets": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"`targets` .*\(3, 1\)"),
        ({"targets": torch.zeros(3)}, TypeError, "`targets` .*float32"),
    ],
)
def test_evidence_is_checked(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Evidence(num_samples=3, **given)


def test_a_subclass_of_a_built_in_selector_selects_by_its_own_method() -> None:
    class First(Stratified):
        def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
            return torch.arange(num_kept(ratio, evidence.num_samples))

    assert select(SCORES, 0.5, First()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("scores", [[3, 1, 2], torch.tensor([3, 1, 2]), [3.0, 1.0, 2.0]])
def test_a_selector_gets_scores_as_floats(scores: Any) -> None:
    found = Evidence(num_samples=3, scores=scores, targets=[0, 1, 0]).scores
    assert found.is_floating_point()
    assert found.tolist() == [3.0, 1.0, 2.0]
