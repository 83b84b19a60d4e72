"""Beta sampling, against the density and the draws of its paper."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution

from drophot import select
from drophot._core.ratios import num_kept
from drophot.coreset import Beta


def test_samples_are_drawn_as_often_as_by_numpy_with_the_papers_density() -> None:
    chance = np.random.default_rng(0)
    scores, confidence, ratio = chance.random(12), chance.random(12), 0.25
    hardest = confidence[np.argsort(-scores)[:10]].mean()
    b = 15 * (1 - hardest) * (1 - 0.75**2)
    weights = beta_distribution.pdf(confidence, 16 - b, b) * scores
    expected, found, draws = np.zeros(12), np.zeros(12), 4000
    for seed in range(draws):
        p = weights / weights.sum()
        expected[chance.choice(12, size=3, replace=False, p=p)] += 1 / draws
        found[select(scores, ratio, Beta(confidence, 2), seed=seed)] += 1 / draws
    assert found.sum() == pytest.approx(3)
    np.testing.assert_allclose(found, expected, atol=5 * (0.5 / draws) ** 0.5)


unit = st.floats(0, 1, width=32)


@settings(max_examples=30)
@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=30), st.floats(0.01, 1), st.booleans())
def test_the_number_kept_is_exact_for_any_scores(
    rows: list[tuple[float, float]], ratio: float, balanced: bool
) -> None:
    scores, confidence = torch.tensor(rows).T
    targets = torch.arange(len(rows)) % 3 if balanced else None
    found = select(scores, ratio, Beta(confidence), targets=targets, seed=3)
    assert len(found) == len(found.unique()) == num_kept(len(rows), ratio)
    assert torch.equal(found, select(scores, ratio, Beta(confidence), targets=targets, seed=3))


def test_the_less_is_kept_the_easier_are_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(5000, generator=generator)
    scores = 1 - confidence  # the hardest have the highest scores
    means = [
        confidence[select(scores, ratio, Beta(confidence))].mean() for ratio in (0.02, 0.1, 0.3)
    ]
    assert means[0] > means[1] + 0.02 > means[2] + 0.1


def test_part_of_the_samples_has_its_own_confidences() -> None:
    confidence = torch.rand(50, generator=torch.Generator().manual_seed(1))
    among = torch.arange(5, 45, 2)
    found = select(torch.ones(50), 0.5, Beta(confidence), among=among)
    assert set(found.tolist()) <= set(among.tolist())
    assert len(found) == 10


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`confidence`.* 1\.5"):
        Beta(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="`exponent`.* 0"):
        Beta(torch.rand(3), 0)
    with pytest.raises(ValueError, match="`confidence`.* 4 .* 3"):
        select(torch.rand(4), 0.5, Beta(torch.rand(3)))
    with pytest.raises(ValueError, match="`scores`.* -1"):
        select([-1.0, 0.0], 0.5, Beta(torch.rand(2)))


def test_means_that_were_rounded_above_1_are_1() -> None:
    scores, above = torch.rand(20), torch.tensor([1.0000001, -1e-7] * 10)
    drawn = select(scores, 0.5, Beta(above))
    assert drawn.equal(select(scores, 0.5, Beta(above.clamp(0, 1))))
    with pytest.raises(ValueError, match=r"`confidence`.* 1\.0001"):
        Beta(above + 1e-4)


@pytest.mark.parametrize("confidence", [0.5, 1.0], ids=["no chance", "certain"])
def test_samples_of_equal_chance_are_drawn_at_random(confidence: float) -> None:
    # Scores of 0 have no chance. A confidence of 1 has an infinite density if beta is less than 1.
    scores = torch.zeros(100) if confidence < 1 else torch.ones(100)
    beta = Beta(torch.full((100,), confidence))
    found = [select(scores, 0.1, beta, seed=seed) for seed in range(60)]
    assert len(torch.cat(found).unique()) > 90


def test_only_candidates_need_a_confidence() -> None:
    confidence = torch.rand(10)
    confidence[7] = torch.nan
    others = [i for i in range(10) if i != 7]
    assert 7 not in select(torch.rand(10), 0.5, Beta(confidence), among=others)
    for targets in (None, torch.arange(10) % 2):
        with pytest.raises(ValueError, match="`confidence`.*NaN.* 7"):
            select(torch.rand(10), 0.5, Beta(confidence), targets=targets)
    for shape in ((0, 2), (3, 2), ()):
        with pytest.raises(ValueError, match="`confidence`.*shape"):
            Beta(torch.zeros(shape))
