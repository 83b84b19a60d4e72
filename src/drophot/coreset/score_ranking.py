"""Selection by scores: the highest, the lowest or random ones, with reproducible tie-breaking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core import order_statistics
from drophot._core.arrays import IntArray, as_real_tensor
from drophot._core.block_threads import block_at, map_blocks
from drophot._core.exact_arithmetic import exact
from drophot._core.radix_select import has_kernels
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot._core.seeded_draw import BLOCK, draw, position_blocks
from drophot.coreset.class_balance import Draw, check_targets, draw_balanced
from drophot.coreset.device_selection import draw_balanced_on_device, draw_smallest

End = Literal["high", "low"]

_SIGNED_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class DrawByScore:
    """Draws the samples with the highest or lowest scores, or random ones if `end` is `None`."""

    end: End | None

    def __call__(
        self, scores: Tensor, size: int, seed: int, positions: IntArray | None = None
    ) -> IntArray:
        if self.end is None:
            return draw_randomly(len(scores), size, seed, positions)
        return draw_by_score(scores, size, self.end, seed, positions)


@exact()
def select_by_score(
    draw: Draw,
    scores: Tensor | ArrayLike,
    ratio: float,
    *,
    targets: Tensor | ArrayLike | None,
    among: IntArray | None = None,
    seed: int,
) -> Tensor:
    """Select a fraction of the samples, within each class if `targets` are given.

    Args:
        draw: Draws by score.
        scores: Shape `(N,)`.
        ratio: The fraction kept.
        targets: Shape `(N,)`.
        among: The candidates' positions, ascending; by default all `N`.
        seed: Breaks ties and draws at random.

    Returns:
        The indices of the kept samples, int64, ascending, on the CPU.
    """
    ratio = check_keep_ratio("ratio", ratio)
    values = check_scores(scores)
    if isinstance(draw, DrawByScore) and has_kernels([values]):
        return _select_on_device(draw, values, ratio, targets, among, seed)
    classes = None if targets is None else check_targets(targets, len(values))
    if among is not None:
        values = values[torch.from_numpy(among).to(values.device)]
        classes = None if classes is None else classes[among]
    check_no_nan(values, among)
    return draw_balanced(draw, values, num_kept(len(values), ratio), seed, classes, among)


def _select_on_device(
    draw: DrawByScore,
    scores: Tensor,
    ratio: float,
    targets: Tensor | ArrayLike | None,
    among: IntArray | None,
    seed: int,
) -> Tensor:
    device = scores.device
    classes = None if targets is None else _classes_on_device(targets, scores)
    positions = None if among is None else torch.from_numpy(among).to(device)
    if positions is not None:
        scores = scores[positions]
        classes = None if classes is None else classes[positions]
    check_no_nan(scores, among)
    size = num_kept(len(scores), ratio)
    found = draw_balanced_on_device(
        scores, size, seed, end=draw.end, classes=classes, positions=positions
    )
    if found is None:
        assert classes is not None
        return draw_balanced(draw, scores.cpu(), size, seed, classes.cpu().numpy(), among)
    indices = found.to("cpu", non_blocking=True)  # into pinned memory, which is faster
    if found.is_cuda:
        torch.cuda.current_stream(device).synchronize()
    return indices


def _classes_on_device(targets: Tensor | ArrayLike, scores: Tensor) -> Tensor:
    """The checked targets; those that are already on the device stay there."""
    if (
        isinstance(targets, Tensor)
        and targets.device == scores.device
        and targets.shape == scores.shape
        and targets.dtype in _SIGNED_INTEGERS
    ):
        return targets.detach()
    return torch.from_numpy(check_targets(targets, len(scores))).to(scores.device)


def draw_by_score(
    scores: Tensor, size: int, end: End, seed: int, positions: IntArray | None = None
) -> IntArray:
    """The positions of the `size` highest or lowest scores, in no particular order.

    `positions` are those of the scores among all samples; by default `0 … N - 1`. Ties are broken
    by hashes of positions.
    """
    if has_kernels([scores]):
        places = None if positions is None else torch.from_numpy(positions).to(scores.device)
        found = draw_smallest(
            scores, [len(scores)], [size], seed, largest=end == "high", positions=places
        )
        return found.cpu().numpy()
    # All samples have one order, by score and then by hash. "low" takes its first samples and
    # "high" its last ones, so the two selections overlap only if they must.
    total, high = len(scores), end == "high"
    threshold = _kth_value(scores, total - size if high else size - 1)

    if scores.device.type == "cpu":
        beyond, tie_blocks, ties = _compare_on_cpu(scores, threshold, high)
    else:
        beyond, tie_blocks, ties = _compare_on_device(scores, threshold, high)

    def at(found: IntArray) -> IntArray:
        return found if positions is None else positions[found]

    rest = draw(lambda: map(at, tie_blocks()), ties, size - len(beyond), seed, largest=high)
    return np.concatenate([at(beyond), rest])


# The positions beyond a threshold, a function that finds the ties block by block, and their number.
_Compared = tuple[IntArray, Callable[[], Iterator[IntArray]], int]


def _compare_on_cpu(scores: Tensor, threshold: Tensor, high: bool) -> _Compared:
    values = scores.detach().resolve_neg().numpy()
    limit = threshold.numpy()
    beyond = np.greater if high else np.less

    def compare(_: int, block: slice) -> tuple[IntArray, int]:
        found = np.flatnonzero(beyond(values[block], limit)) + block.start
        return found, int(np.count_nonzero(values[block] == limit))

    (blocks,) = map_blocks(compare, [len(values)])
    found, ties = zip(*blocks, strict=True)

    def tie_blocks() -> Iterator[IntArray]:
        for number in np.flatnonzero(ties).tolist():
            block = block_at(number, len(values))
            yield np.flatnonzero(values[block] == limit) + block.start

    return np.concatenate(found), tie_blocks, sum(ties)


def _compare_on_device(scores: Tensor, threshold: Tensor, high: bool) -> _Compared:
    def where(test: Callable[[Tensor, Tensor], Tensor]) -> Iterator[IntArray]:
        for start, block in zip(range(0, len(scores), BLOCK), scores.split(BLOCK), strict=True):
            yield test(block, threshold).nonzero()[:, 0].cpu().numpy() + start

    beyond = np.concatenate(list(where(torch.gt if high else torch.lt)))
    ties = sum(int((block == threshold).sum()) for block in scores.split(BLOCK))
    return beyond, lambda: where(torch.eq), ties


def draw_randomly(total: int, size: int, seed: int, positions: IntArray | None = None) -> IntArray:
    """`size` of `total` positions at random, in no particular order."""
    # The stream differs from that of the ties, so the control is independent of how these fell.
    blocks = position_blocks(total) if positions is None else lambda: [positions]
    return draw(blocks, total, size, seed, stream=1)


def _kth_value(scores: Tensor, rank: int) -> Tensor:
    """The score at `rank` (from 0) in ascending order."""
    if not scores.is_cuda:
        return order_statistics.kth_value(scores, rank)
    # topk is torch's parallel radix selection; without sorting it does nothing more.
    from_below = 2 * rank < len(scores)
    size = rank + 1 if from_below else len(scores) - rank
    top = scores.topk(size, largest=not from_below, sorted=False).values
    return top.amax() if from_below else top.amin()


def check_scores(scores: Tensor | ArrayLike) -> Tensor:
    """The scores as a real tensor, checked to be one-dimensional and not empty."""
    values = as_real_tensor("scores", scores)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(
            f"`scores` must have shape (N,) with N at least 1, got {tuple(values.shape)}."
        )
    return values


def check_no_nan(scores: Tensor, among: IntArray | None) -> None:
    if not (scores.is_floating_point() and scores.amax().isnan()):
        return
    wrong = scores.isnan().nonzero()[:, 0].cpu().numpy()
    first = wrong[0] if among is None else among[wrong[0]]
    where, hint = f"{len(scores)}", "To select among the others, pass `among`."
    if among is not None:
        where, hint = f"{len(among)} in `among`", "Leave these samples out of `among`."
    raise ValueError(
        f"`scores` must not contain NaN or masked entries, got {len(wrong)} of {where}, the first "
        f"at index {first}. In the scores of a tracker, NaN marks a sample that was never "
        f"presented. {hint}"
    )
