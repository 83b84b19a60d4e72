"""Selection among a part of the samples: the part of a split, or what has a score."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import random_split

from drophot import Stratified, select
from drophot._core.ratios import num_kept

MODES = ["high", "low", "random", Stratified(bins=5, cutoff=0.1), Stratified(hard="low")]
NAN = float("nan")


@st.composite
def splits(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int]]:
    """Scores with NaN outside the part, classes, and the part in any order."""
    total = draw(st.integers(1, 40))
    part = draw(st.lists(st.integers(0, total - 1), min_size=1, unique=True))
    scores = torch.full((total,), NAN)
    scores[part] = torch.tensor(
        draw(st.lists(st.integers(-2, 2), min_size=len(part), max_size=len(part)))
    ).float()
    return scores, draw(st.lists(st.integers(0, 2), min_size=total, max_size=total)), part


@given(splits(), st.floats(0.01, 0.9), st.sampled_from(MODES), st.booleans(), st.integers(0, 9))
def test_it_is_the_selection_from_the_part_alone(
    split: Any, ratio: float, mode: Any, balanced: bool, seed: int
) -> None:
    scores, classes, part = split
    targets = classes if balanced else None
    found = select(scores, ratio, mode, targets=targets, among=part, seed=seed)
    assert len(found) == num_kept(len(part), ratio)
    assert (found.diff() > 0).all()
    assert set(found.tolist()) <= set(part)
    # The same scores in a set that has only them: as many of each score are kept, class by class.
    ordered = sorted(part)
    alone = select(
        scores[ordered],
        ratio,
        mode,
        targets=[classes[p] for p in ordered] if balanced else None,
        seed=seed,
    )
    if mode in ("high", "low"):
        pairs = [(float(scores[i]), balanced and classes[i]) for i in found.tolist()]
        others = [(float(scores[ordered[i]]), balanced and classes[ordered[i]]) for i in alone]
        assert sorted(pairs) == sorted(others)
    if balanced:
        of = torch.tensor(classes)
        assert torch.equal(
            of[found].bincount(minlength=3), of[torch.tensor(ordered)[alone]].bincount(minlength=3)
        )


@given(splits(), st.sampled_from(MODES), st.booleans(), st.data())
def test_what_lies_outside_and_the_order_of_the_part_do_not_count(
    split: Any, mode: Any, balanced: bool, data: Any
) -> None:
    scores, classes, part = split
    targets = classes if balanced else None
    expected = select(scores, 0.4, mode, targets=targets, among=part)
    again = data.draw(st.permutations(part))
    other = torch.where(scores.isnan(), torch.tensor(1e9), scores)
    assert torch.equal(select(other, 0.4, mode, targets=targets, among=again), expected)


@given(splits(), st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from(["high", "low", "random"]))
def test_a_smaller_ratio_is_part_of_a_larger(split: Any, a: float, b: float, mode: Any) -> None:
    scores, _, part = split
    small, large = (select(scores, ratio, mode, among=part) for ratio in sorted((a, b)))
    assert set(small.tolist()) <= set(large.tolist())


@pytest.mark.parametrize("mode", MODES)
def test_among_all_is_no_restriction(mode: Any) -> None:
    scores = torch.arange(50) % 7
    assert torch.equal(select(scores, 0.3, mode, among=range(50)), select(scores, 0.3, mode))


def test_a_validation_split_is_never_kept() -> None:
    train, validation = random_split(range(1000), [0.8, 0.2])  # type: ignore[arg-type]
    scores = torch.full((1000,), NAN)
    scores[train.indices] = torch.rand(800)
    for part in (
        train.indices,
        torch.tensor(train.indices),
        np.array(train.indices, dtype=np.uint16),
        (~scores.isnan()).nonzero()[:, 0],
    ):
        found = select(scores, 0.3, among=part)
        assert len(found) == 240
        assert not set(found.tolist()) & set(validation.indices)


@pytest.mark.parametrize(
    ("among", "error", "found"),
    [
        ([True] * 6, TypeError, "bool.*nonzero"),
        (np.array([False] * 5 + [True]), TypeError, "bool"),
        ([1, 1], ValueError, "1 repeated"),
        ([-1], ValueError, "-1"),
        ([0, 6], ValueError, "6"),
        ([], ValueError, "empty"),
        ([0.0, 1.0], TypeError, "float64"),
        ([[0, 1]], ValueError, r"\(1, 2\)"),
        ({0, 1}, TypeError, "set"),
        ("train", TypeError, "U5"),
        ([0, 1, 3], ValueError, "2 of 3 in `among`.* 1"),
    ],
)
def test_a_wrong_part_is_named(among: Any, error: type[Exception], found: str) -> None:
    with pytest.raises(error, match=found) as caught:
        select([0.0, NAN, 2.0, NAN, 4.0, 5.0], 0.5, among=among)
    assert "`among`" in str(caught.value)
