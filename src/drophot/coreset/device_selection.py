"""Selection by scores on a GPU: a few passes over the scores, whatever their values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from drophot._core import radix_select
from drophot._core.radix_select import Keys
from drophot._core.seeded_draw import hash_start
from drophot.coreset.class_balance import proportional_sizes

_MOST_CLASSES = 1 << 14  # each has a histogram of 2 KB


def draw_balanced_on_device(
    scores: Tensor,
    size: int,
    seed: int,
    *,
    end: str | None,
    classes: Tensor | None,
    positions: Tensor | None,
) -> Tensor | None:
    """As `class_balance.draw_balanced`: the drawn positions, int64, ascending, on the device.

    `end` is "high", "low", or `None` to draw at random. `None` is returned if there are too many
    classes for the kernels.
    """
    sizes, counts = [len(scores)], [size]
    if classes is not None:
        ordered = classes.sort(stable=True)
        order = ordered.indices
        sizes = ordered.values.unique_consecutive(return_counts=True)[1].tolist()
        if len(sizes) > _MOST_CLASSES:
            return None
        counts = proportional_sizes(sizes, size, seed).tolist()
        scores = scores[order]
        positions = order if positions is None else positions[order]
    found = draw_smallest(
        scores,
        sizes,
        counts,
        seed,
        keyed=end is not None,
        largest=end == "high",
        stream=1 if end is None else 0,
        positions=positions,
    )
    return found if classes is None else found.sort().values


def draw_smallest(
    scores: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    seed: int,
    *,
    keyed: bool = True,
    largest: bool = False,
    stream: int = 0,
    positions: Tensor | None = None,
) -> Tensor:
    """The positions of the samples with the smallest scores in each of several classes.

    They are the same as on a CPU, where `score_ranking` draws them: ties are broken by the hashes
    of positions.

    Args:
        scores: Shape `(N,)`, the scores of one class after the other.
        sizes: The number of samples of each class.
        counts: How many of them to draw.
        seed: Determines the hashes.
        keyed: Whether the scores matter; if not, those with the smallest hashes are drawn.
        largest: Take the largest scores and the largest hashes instead.
        stream: Draws of different streams are independent.
        positions: The samples' positions in the dataset, by default `0 … N - 1`.

    Returns:
        Shape `(sum(counts),)`, int64, on the device, in the order of the scores.
    """
    kernels = radix_select.kernels("drophot.coreset.selection_kernels")
    scores = scores.contiguous() if keyed else scores
    starts = accumulate(sizes, initial=0)
    drawn = [
        (part, start, count)
        for part, start, count in zip(scores.split([*sizes]), starts, counts, strict=False)
        if count
    ]
    ranks = [count for *_, count in drawn]
    table = radix_select.tensor_table(
        [part for part, *_ in drawn], range(len(drawn)), offsets=[start for _, start, _ in drawn]
    )
    keys = _keys(scores, keyed=keyed, largest=largest)
    if keyed:
        state = radix_select.find_thresholds(table, keys, ranks, ends_early=True)
    else:
        rows = [[0, count, len(part), count == len(part)] for part, _, count in drawn]
        state = torch.tensor(rows, dtype=torch.int64).to(scores.device)
    start_hash = torch.from_numpy(hash_start(seed, stream).view("int64")).to(scores.device)
    arguments = (start_hash, start_hash if positions is None else positions)
    constants = {"KEYED": keyed, "PLACED": positions is not None}
    hash_state = state.clone()
    hash_state[:, 0] = 0
    hashed = not _all_ended(state)
    if hashed:
        digits = torch.zeros(len(drawn), 256, dtype=torch.int64, device=scores.device)
        for shift in range(56, -1, -8):
            radix_select.launch_keyed(
                kernels.count_hash_digits,
                table,
                keys,
                *(state, hash_state, digits, *arguments),
                SHIFT=shift,
                **constants,
            )
            radix_select.choose_digit(hash_state, digits, shift, ends_early=True)
            if _all_ended(hash_state):
                break
    before = torch.zeros(len(table.chunks), dtype=torch.int64, device=scores.device)
    found = torch.empty(sum(ranks), dtype=torch.int64, device=scores.device)
    for writes in (False, True):
        radix_select.launch_keyed(
            kernels.write_selected,
            table,
            keys,
            *(state, hash_state, before, found, *arguments),
            WRITES=writes,
            HASHED=hashed,
            **constants,
        )
        if not writes:
            before = before.cumsum(0) - before
    return found


def _keys(scores: Tensor, *, keyed: bool, largest: bool) -> Keys:
    if not keyed or scores.is_floating_point():
        dtype = scores.dtype if keyed else torch.float32
        return radix_select.float_keys([dtype], signed=True, largest=largest)
    return radix_select.integer_keys(scores, largest=largest)


def _all_ended(state: Tensor) -> bool:
    return bool(state[:, 3].all())
