"""Faults in the values of a batch, encoded as one integer that stays on the device until read."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from drophot.tracking.batch_matching import UNPAIRED

# Instead of the first target of a sample, in a state.
NO_TARGET = -1  # never presented with a target
ONLY_LOSS = -2  # presented by its loss

NO_FAULT = torch.iinfo(torch.int64).max  # of several faults, the smallest is kept
_NO_PAIR = NO_FAULT - 1  # logits that may belong to another batch
# NO_CLASS minus the sample and the invalid target (32 bits). It is below all other faults, because
# an invalid target may be stored as the sample's first one, and then a valid one would not match.
NO_CLASS = -(1 << 62)
_NOT_FINITE = 1 << 62  # plus the number of the score and the sample
_LOSS_LATER = 1 << 61  # plus the sample, which was presented with a target before
MAX_SAMPLES = 1 << 29
HALF = 1 << 31


def find_fault(
    index: Tensor, pairs: list[tuple[Tensor, Tensor]], classes: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The fault of a batch, on the device of its tensors.

    Args:
        index: The samples, int64, shape `(B,)`.
        pairs: Tensors `(B,)` that should be equal. Where they differ, the index is out of range or
            the target differs from the sample's earlier one.
        classes: The targets clamped to the classes and the targets, int64, which should be equal.
    """
    wrong = reduce(torch.logical_or, (one != other for one, other in pairs))
    if classes is None:
        return index.masked_fill(~wrong, NO_FAULT).amin()
    nearest, target = classes
    fine = nearest == target
    # `where` would copy a number to the device and wait for it.
    fault = index.masked_fill(~(wrong & fine), NO_FAULT)
    value = target.clamp(-HALF, HALF - 1) + HALF
    code = NO_CLASS - value - index.clamp(0, MAX_SAMPLES - 1) * (1 << 32)
    return torch.minimum(fault, code.masked_fill(fine, NO_FAULT)).amin()


def not_finite(index: Tensor, finite: Tensor) -> Tensor:
    """The fault of a batch `(B,)` in which not all of `K` scores `(B, K)` are finite."""
    score = torch.arange(finite.shape[1], device=finite.device) * MAX_SAMPLES
    code = _NOT_FINITE + score + index.clamp(0, MAX_SAMPLES - 1)[:, None]
    return code.masked_fill(finite, NO_FAULT).amin()


def loss_later(index: Tensor, known: Tensor) -> Tensor:
    """The fault of samples `(B,)` presented by their losses, some of whose targets are known."""
    code = _LOSS_LATER + index.clamp(0, MAX_SAMPLES - 1)
    return code.masked_fill(~known, NO_FAULT).amin()


def unpaired(wrong: Tensor) -> Tensor:
    """The fault of logits that belong to another batch if `wrong`, a bool without dimensions."""
    fault = torch.full_like(wrong, _NO_PAIR, dtype=torch.int64)
    return fault.masked_fill(~wrong, NO_FAULT)


def explain(fault: int, num_samples: int, targets: Tensor, own_scores: tuple[str, ...]) -> str:
    """The error message of a fault.

    Args:
        fault: The integer, not `NO_FAULT`.
        num_samples: `N`.
        targets: The first target of each sample, or `NO_TARGET` or `ONLY_LOSS`.
        own_scores: The names of the user's scores.
    """
    if fault == _NO_PAIR:
        return UNPAIRED
    if fault <= NO_CLASS:
        sample, value = divmod(NO_CLASS - fault, 1 << 32)
        return (
            f"`targets` must be classes from 0 to C - 1 for logits of shape (B, C), got "
            f"{value - HALF} for sample {sample}. Leave such samples out: `keep = targets >= 0`, "
            f"then `update(index[keep], logits[keep], targets[keep])`."
        )
    score, sample = divmod(fault - _NOT_FINITE, MAX_SAMPLES)
    if 0 <= score < len(own_scores):
        return (
            f"Score {own_scores[score]!r} must be finite, but it returned NaN or infinity for "
            f"sample {sample}. Clamp it, or check the logits for NaN and infinity."
        )
    if 0 <= fault - _LOSS_LATER < MAX_SAMPLES:
        return mixed(fault - _LOSS_LATER)
    if not 0 <= fault < num_samples:
        return (
            f"`index` must be in [0, {num_samples}), got {fault}. Take the indices from "
            f"IndexedDataset, and set `num_samples` to the length of that dataset."
        )
    return mismatch(fault, int(targets[fault]), "another one")


def mixed(sample: int) -> str:
    """The error message of a sample presented both with its logits and by its loss."""
    return (
        f"A sample must be presented either by `update` or by `update_loss`, got sample {sample} "
        f"by both. Use `update_loss` for no sample whose logits there are."
    )


def mismatch(sample: int, first: int, later: int | str) -> str:
    """The error message of a sample that had two targets."""
    if ONLY_LOSS in (first, later):
        return mixed(sample)
    return (
        f"`targets` must be the same each time a sample is presented, got sample {sample} with "
        f"target {first} at first and {later} later. The indices do not follow their samples: take "
        f"them from IndexedDataset, not from the position in a shuffled loader. If the loop mixes "
        f"samples or labels (mixup, CutMix), pass each sample's own label to `update`."
    )
