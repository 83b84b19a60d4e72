"""k-center and facility location, held against the definitions, one choice after the other."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from helpers.processes import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drophot import Coreset, facility_location, k_center
from drophot._core.ratios import num_kept
from drophot.coreset import greedy_facility_location, greedy_k_center, held_facility_location

SELECTORS = [k_center, facility_location]
both = pytest.mark.parametrize("selector", SELECTORS)
Selector = Callable[..., Coreset]


@st.composite
def grids(draw: st.DrawFn, most: int = 30) -> np.ndarray:
    """Points on a small grid, on which products are exact and equal distances the rule."""
    size, width = draw(st.integers(1, most)), draw(st.integers(1, 4))
    numbers = draw(st.lists(st.integers(-4, 4), min_size=size * width, max_size=size * width))
    return np.array(numbers, dtype=np.float64).reshape(size, width)


def cloud(size: int, width: int = 5, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=draws, dtype=torch.float64)


@given(grids(), st.floats(0.01, 1), st.integers(0, 9), st.integers(1, 8), st.data())
@settings(max_examples=60)
def test_each_centre_is_the_farthest_sample_whatever_the_candidates(
    points: np.ndarray, ratio: float, seed: int, candidates: int, data: st.DataObject
) -> None:
    size = num_kept(len(points), ratio)
    start = data.draw(st.lists(st.integers(0, len(points) - 1), unique=True, max_size=size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_k_center, "_MAX_CANDIDATES", candidates)
        found = k_center(points, ratio, start=start, seed=seed)
    chosen = list(start)
    ranking, gains = found.ranking.tolist(), found.gains.tolist()
    assert len(ranking) == size - len(start)
    for number, (sample, gain) in enumerate(zip(ranking, gains, strict=True)):
        if not chosen:
            assert number == 0
            assert gain == np.inf
        else:
            _, distance = references.farthest(points, chosen)
            own = references.apart(points[[sample]], points[chosen]).min()
            assert own == pytest.approx(distance, abs=1e-6)
            assert gain == pytest.approx(max(distance, 0), abs=1e-6)
        chosen.append(sample)
    assert found.indices.tolist() == sorted(chosen)
    assert len(set(chosen)) == size


def test_equal_distances_go_to_the_sample_that_stands_first() -> None:
    corners = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])
    for candidates in (1, 2, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(greedy_k_center, "_MAX_CANDIDATES", candidates)
            found = k_center(torch.cat([torch.zeros(1, 2), corners]), 1, start=[0])
        assert found.ranking.tolist() == [1, 2, 3, 4]


def in_order(points: np.ndarray, size: int, start: list[int]) -> list[int]:
    """The farthest of whole numbers, one after the other, the first of equal ones: exact."""
    norms = (points**2).sum(1)
    away = norms[:, None] + norms - 2 * points @ points.T
    nearest, found = away[start].min(0), []
    nearest[start] = -1
    while len(found) < size - len(start):
        found.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, away[found[-1]])
        nearest[[*start, *found]] = -1
    return found


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 6)),
    most=st.integers(1, 12),
    offset=st.sampled_from([0, 1, -7, 1000, 2**20]),
    scale=st.sampled_from([1.0, 2.0**-10, 2.0**-140, 2.0**90]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    candidates=st.sampled_from([1, 3, 2048]),
    data=st.data(),
)
def test_exact_distances_that_are_equal_go_to_the_first(
    shape: tuple[int, int],
    most: int,
    offset: int,
    scale: float,
    dtype: torch.dtype,
    candidates: int,
    data: st.DataObject,
) -> None:
    draws = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    points = draws.integers(0, most + 1, shape)
    size = data.draw(st.integers(1, len(points)))
    count = data.draw(st.integers(1, size))
    start = draws.choice(len(points), count, replace=False).tolist()
    rows = torch.from_numpy(points + offset).to(dtype) * scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_k_center, "_MAX_CANDIDATES", candidates)
        found = k_center(rows, size / len(points), start=start)
    assert found.ranking.tolist() == in_order(points, size, start)


def test_bits_and_pixels_choose_the_same_in_either_precision() -> None:
    draws = np.random.default_rng(0)
    for most, width in ((1, 30), (255, 40), (1, 4000)):
        points = draws.integers(0, most + 1, (300, width))
        expected = in_order(points, 40, [0])
        for kind in (np.uint8, np.float32, np.float64):
            found = k_center(points.astype(kind), 40 / 300, start=[0])
            assert found.ranking.tolist() == expected


@given(grids(), st.floats(0.01, 1), st.sampled_from([0, 40, 1 << 24]), st.data())
@settings(max_examples=60)
def test_each_medoid_lowers_the_sum_most_whatever_pairs_are_kept(
    points: np.ndarray, ratio: float, pairs: int, data: st.DataObject
) -> None:
    size = num_kept(len(points), ratio)
    start = data.draw(st.lists(st.integers(0, len(points) - 1), unique=True, max_size=size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_facility_location, "_MAX_HELD", 0)
        patch.setattr(greedy_facility_location, "_MAX_PAIRS", pairs)
        patch.setattr(greedy_facility_location, "_ROWS", 3)
        found = facility_location(points, ratio, start=start)
    check_medoids(points, start, found)


@given(
    points=grids(),
    ratio=st.floats(0.01, 1),
    rows=st.sampled_from([1, 3, 512]),
    few=st.sampled_from([0.0, 0.3, 1.0]),
    data=st.data(),
)
@settings(max_examples=60)
def test_each_medoid_lowers_the_sum_most_if_all_distances_are_held(
    points: np.ndarray, ratio: float, rows: int, few: float, data: st.DataObject
) -> None:
    size = num_kept(len(points), ratio)
    start = data.draw(st.lists(st.integers(0, len(points) - 1), unique=True, max_size=size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_facility_location, "_ROWS", rows)
        patch.setattr(held_facility_location, "_FEW", few)
        found = facility_location(points, ratio, start=start)
    check_medoids(points, start, found)


@pytest.mark.parametrize("few", [0.0, 0.05, 1.0])
def test_a_larger_cloud_whose_distances_are_held(
    few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = cloud(300)
    monkeypatch.setattr(held_facility_location, "_ROWS", 64)
    monkeypatch.setattr(held_facility_location, "_FEW", few)
    found = facility_location(points, 0.2)
    check_medoids(points.numpy(), [], found)
    monkeypatch.setattr(greedy_facility_location, "_MAX_HELD", 0)
    again = facility_location(points, 0.2)
    assert found.ranking.tolist() == again.ranking.tolist()
    assert torch.equal(found.weights, again.weights)


def check_medoids(points: np.ndarray, start: list[int], found: Coreset) -> None:
    furthest = references.apart(points, points).max()
    chosen = list(start)
    for sample, gain in zip(found.ranking.tolist(), found.gains.tolist(), strict=True):
        assert sample not in chosen
        gains = references.facility_gains(points, chosen, furthest)
        assert gains[sample] == pytest.approx(gains.max(), abs=1e-4)
        assert gain == pytest.approx(gains.max(), abs=1e-4)
        chosen.append(sample)
    assert found.indices.tolist() == sorted(chosen)
    away = references.apart(points, points[found.indices.numpy()])
    assert found.weights.sum() == len(points)
    # Who stands for a sample is as near as anybody: the weights are a count of nearest ones.
    sure = (away <= away.min(1, keepdims=True) + 1e-9).sum(1) == 1
    least = np.bincount(away.argmin(1)[sure], minlength=len(found))
    assert (found.weights.numpy() >= least - 1e-9).all()
    if sure.all():
        assert found.weights.numpy().tolist() == least.tolist()


@pytest.mark.parametrize("pairs", [0, 2_000, 20_000, 1 << 24])
def test_a_larger_cloud_with_pairs_kept_at_once_later_and_never(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = cloud(300)
    monkeypatch.setattr(greedy_facility_location, "_MAX_HELD", 0)
    monkeypatch.setattr(greedy_facility_location, "_MAX_PAIRS", pairs)
    real, kept_after = greedy_facility_location._pairs, []

    def spy(state: Any, most: int) -> Any:
        found = real(state, most)
        if found is not None:
            assert len(found.away) <= most
            kept_after.append(state.count)
        return found

    monkeypatch.setattr(greedy_facility_location, "_pairs", spy)
    found = facility_location(points, 0.2)
    assert len(kept_after) == (pairs > 0), "once, and then no more"
    if pairs:
        assert (kept_after[0] <= 4) == (pairs > 10_000)
    check_medoids(points.numpy(), [], found)


@both
def test_float32_of_many_features_is_as_good_by_the_objective(selector: Selector) -> None:
    """Rounding may take another of two equal ones; what matters is what the choices are worth."""
    points = cloud(600, 200).float()
    found = selector(points, 0.1)
    exact = selector(points.double(), 0.1)
    away = references.apart(points.numpy(), points.numpy())
    worth = [away[:, f.indices.numpy()].min(1) for f in (found, exact)]
    if selector is k_center:
        assert worth[0].max() == pytest.approx(worth[1].max(), rel=0.01)
    else:
        assert worth[0].sum() == pytest.approx(worth[1].sum(), rel=1e-3)
        total = len(points) * away.max() - found.gains.double().sum().item()
        assert worth[0].sum() == pytest.approx(total, rel=1e-4)


def test_k_center_is_within_twice_of_the_best_radius() -> None:
    """Gonzalez' theorem, against clusters whose best radius is known."""
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    points = centres.repeat_interleave(50, 0) + torch.rand(200, 2) - 0.5
    found = k_center(points, 4 / 200)
    radius = torch.cdist(points, points[found.indices]).amin(1).max()
    assert radius <= 2 * torch.cdist(points, centres).amin(1).max()
    assert found.indices.div(50, rounding_mode="floor").tolist() == [0, 1, 2, 3]


@both
@given(grids(), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=25)
def test_a_smaller_ratios_ranking_is_the_beginning_of_a_largers(
    selector: Selector, points: np.ndarray, one: float, other: float
) -> None:
    small, large = (selector(points, ratio) for ratio in sorted((one, other)))
    assert large.ranking.tolist()[: len(small)] == small.ranking.tolist()
    if len(large.gains) > 1:
        assert (large.gains.diff() <= 1e-4).all(), "gains fall"


@both
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.floats(0.01, 1))
@settings(max_examples=25)
def test_with_targets_each_class_is_covered_by_itself(
    selector: Selector, targets: list[int], ratio: float
) -> None:
    points = cloud(len(targets))
    found = selector(points, ratio, targets=targets, seed=3)
    classes = sorted(set(targets))
    sizes = references.largest_remainders([targets.count(c) for c in classes], len(found), 3)
    gains = []
    for c, size in zip(classes, sizes, strict=True):
        inside = torch.tensor([i for i, t in enumerate(targets) if t == c])
        if size:
            gains += selector(points[inside], size / len(inside), seed=3).gains.tolist()
    if selector is facility_location:  # of two samples either is the medoid, so that gains tell
        assert found.gains.tolist() == pytest.approx(gains, abs=1e-5)
        whole = sum(targets.count(c) for c, size in zip(classes, sizes, strict=True) if size)
        assert found.weights.sum() == whole
    assert sorted(found.ranking.tolist()) == found.indices.tolist()
    assert [sum(targets[i] == c for i in found.indices.tolist()) for c in classes] == sizes


@both
def test_a_start_with_targets_counts_in_its_class(selector: Selector) -> None:
    targets = torch.arange(40) % 2
    found = selector(cloud(40), 0.2, targets=targets, start=[0, 2, 3])
    assert {0, 2, 3} < set(found.indices.tolist())
    assert targets[found.indices].bincount().tolist() == [4, 4]
    assert sorted([*found.ranking.tolist(), 0, 2, 3]) == found.indices.tolist()
    with pytest.raises(ValueError, match="`start`.* class.* 4"):
        selector(cloud(40), 0.2, targets=targets, start=[0, 2, 4, 6, 8])


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8])
def test_any_dtype_and_layout_gives_the_same(selector: Selector, dtype: torch.dtype) -> None:
    points = torch.randint(0, 9, (60, 3), generator=torch.Generator().manual_seed(0))
    expected = selector(points.float(), 0.3)
    for other in (
        points.to(dtype),
        points.numpy(),
        points.tolist(),
        torch.stack([points.float()] * 2, 2)[..., 0].requires_grad_(),
    ):
        found = selector(other, 0.3)
        assert found.gains.tolist() == pytest.approx(expected.gains.tolist(), abs=1e-4)
        assert len(found) == 18
    assert expected.indices.dtype == expected.ranking.dtype == torch.int64
    assert expected.gains.dtype == torch.float32
    assert expected.indices.device.type == "cpu"


@both
def test_everything_and_one_and_equal_samples(selector: Selector) -> None:
    assert selector(cloud(7), 1).indices.tolist() == list(range(7))
    assert len(selector(cloud(7), 1e-9)) == 1
    found = selector(torch.ones(9, 2), 0.5)
    assert len(found) == 5
    assert found.gains[1:].tolist() == [0, 0, 0, 0]


@both
def test_features_are_left_as_they_were(selector: Selector) -> None:
    points = cloud(20)
    before = points.clone()
    selector(points, 0.5)
    assert torch.equal(points, before)


@both
def test_far_from_the_origin_no_digits_are_lost(selector: Selector) -> None:
    points = cloud(100).float()
    assert torch.equal(selector(points + 2**12, 0.2).indices, selector(points, 0.2).indices)


def test_the_first_centre_is_drawn_by_the_seed() -> None:
    firsts = {int(k_center(cloud(50), 0.1, seed=seed).ranking[0]) for seed in range(40)}
    assert len(firsts) > 20
    again = [k_center(cloud(50), 0.1, seed=4).ranking.tolist() for _ in range(2)]
    assert again[0] == again[1]


@both
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 0}, ValueError, r"`ratio` .* \(0, 1\]"),
        ({"features": torch.zeros(3)}, ValueError, r"`features`.*\(N, D\).* \(3,\)"),
        ({"features": torch.zeros(0, 2)}, ValueError, r"`features`.*\(0, 2\)"),
        ({"features": torch.zeros(2, 2) + 1j}, TypeError, "complex64"),
        (
            {"features": torch.tensor([[1.0], [float("nan")], [float("inf")]])},
            ValueError,
            "`features`.* 2 .* 1",
        ),
        ({"targets": [0, 1]}, ValueError, r"shape \(4,\)"),
        ({"start": [0.5]}, TypeError, "`start` .*float64"),
        ({"start": [1, 4]}, ValueError, r"`start`.*\[0, 4\).* 4"),
        ({"start": [-1]}, ValueError, "`start`.* -1"),
        ({"start": [1, 1]}, ValueError, "`start`.* 1 repeated"),
        ({"start": [0, 1, 2]}, ValueError, "`start`.* 3.* 2"),
        ({"seed": 0.5}, TypeError, "float"),
    ],
)
def test_wrong_input_is_named(
    selector: Selector, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {"features": torch.arange(4.0)[:, None], "ratio": 0.5}
    with pytest.raises(error, match=message):
        selector(**(good | arguments))


@both
def test_memory_is_said_and_refused_before_the_start(
    selector: Selector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="drophot"):
        selector(cloud(100), 0.1)
    assert "10 of 100 samples, 5 features" in caplog.text
    assert "GB of memory" in caplog.text
    monkeypatch.setattr("drophot._core.memory.available", lambda device: 1e5)
    for name in ("choose_held", "_update_all"):
        module = greedy_facility_location if name == "choose_held" else greedy_k_center
        monkeypatch.setattr(module, name, None)  # nothing is begun
    with pytest.raises(MemoryError, match=r"`features`.*\(100, 5\).* GB.*`targets`"):
        selector(cloud(100), 0.1)


@pytest.mark.slow
@both
@pytest.mark.parametrize("size", [200, 400])
def test_what_is_held_is_what_was_said(
    selector: Selector, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is as large as all pairs, and together they are less than was announced."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    monkeypatch.setattr(greedy_facility_location, "_MAX_HELD", 0)
    monkeypatch.setattr(greedy_facility_location, "_MAX_PAIRS", 16 * size)
    monkeypatch.setattr(greedy_facility_location, "_strip", lambda total: 16)
    monkeypatch.setattr(greedy_k_center, "_MAX_CANDIDATES", 16)
    monkeypatch.setattr(greedy_facility_location, "row_blocks", lambda total, width: _blocks(total))
    monkeypatch.setattr(greedy_k_center, "row_blocks", lambda total, width: _blocks(total))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    largest = max(largest, leaf.untyped_storage().nbytes())
            return out

    with Watch():
        selector(cloud(size), 0.05)
    assert largest <= 8 * size * 16 < 8 * size * size


def _blocks(total: int) -> list[slice]:
    return [slice(begin, min(begin + 16, total)) for begin in range(0, total, 16)]


@both
@pytest.mark.parametrize("scale", [2.0**-400, 2.0**-60, 2.0**60, 2.0**400, 2.0**1022])
def test_the_scale_of_the_features_changes_the_gains_alone(
    selector: Selector, scale: float
) -> None:
    points = cloud(60)
    found, other = selector(points, 0.2), selector(points * scale, 0.2)
    assert torch.equal(found.ranking, other.ranking)
    with np.errstate(over="ignore"):
        gains = (found.gains.double() * scale).float()
    assert torch.allclose(gains, other.gains, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, torch.arange(20_000) % 10])
@both
def test_the_process_grows_by_no_more_than_was_said(
    selector: Selector, targets: Tensor | None, tmp_path: Path
) -> None:
    """In a process of its own, whose memory is its own, at a size where memory counts."""
    script = tmp_path / "grow.py"
    script.write_text(
        f"""
import io, logging, re, resource, torch
from drophot import {selector.__name__} as selector
said = io.StringIO()
logging.basicConfig(stream=said, level="INFO")
torch.set_num_threads(1)
points = torch.randn(20_000, {512 if selector is k_center else 64})
targets = torch.arange(20_000) % 10 if {targets is not None} else None
selector(points[:200], 0.1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
selector(points, 0.01, targets=targets)
print(peak() - before, float(re.findall(r"([0-9.]+) GB", said.getvalue())[-1]) * 1e9)
"""
    )
    grown, said = map(float, run_script(script, folder=tmp_path, filters=[]).split())
    assert grown <= 1.1 * said + 30e6
    # All distances of one group are held up to 2 GiB.
    assert said < (2e9 if selector is facility_location and targets is None else 1.2e9)
