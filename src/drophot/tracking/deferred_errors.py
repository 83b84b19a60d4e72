"""What only the values of a batch can tell is wrong, as one number that a device can keep."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from drophot.tracking.batch_matching import UNPAIRED

NO_FAULT = torch.iinfo(torch.int64).max  # of several faults the least is kept
_NO_PAIR = NO_FAULT - 1  # logits that may be another batch's
# Less the sample, and the target that is no class in 32 bits. Below all others: such a target may
# be taken for the sample's first, and a right one later for another.
_NO_CLASS = -(1 << 62)
_MOST_SAMPLES = 1 << 29
_HALF = 1 << 31


def found(
    index: Tensor, pairs: list[tuple[Tensor, Tensor]], classes: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The fault of a batch.

    Args:
        index: The samples, int64, shape `(B,)`.
        pairs: What should be equal, shape `(B,)`: if it is not, the index is wrong, or its target
            is another one than before.
        classes: What should be equal too: the nearest class, and the target, int64.

    Returns:
        A number on the device of the tensors.
    """
    wrong = reduce(torch.logical_or, (one != other for one, other in pairs))
    if classes is None:
        return index.masked_fill(~wrong, NO_FAULT).amin()
    nearest, target = classes
    fine = nearest == target
    # Not `where`, which brings a number to the device and waits for it.
    fault = index.masked_fill(~(wrong & fine), NO_FAULT)
    value = target.clamp(-_HALF, _HALF - 1) + _HALF
    code = _NO_CLASS - value - index.clamp(0, _MOST_SAMPLES - 1) * (1 << 32)
    return torch.minimum(fault, code.masked_fill(fine, NO_FAULT)).amin()


def unpaired(wrong: Tensor) -> Tensor:
    """The fault of logits that may be another batch's.

    Args:
        wrong: Whether they are, bool, no dimension.

    Returns:
        A number on the same device.
    """
    fault = torch.full_like(wrong, _NO_PAIR, dtype=torch.int64)
    return fault.masked_fill(~wrong, NO_FAULT)


def explain(fault: int, num_samples: int, targets: Tensor) -> str:
    """Say what is wrong.

    Args:
        fault: The number, not `NO_FAULT`.
        num_samples: `N`.
        targets: What was seen of each sample at first.

    Returns:
        A sentence that names the value and the cure.
    """
    if fault == _NO_PAIR:
        return UNPAIRED
    if fault <= _NO_CLASS:
        sample, value = divmod(_NO_CLASS - fault, 1 << 32)
        return (
            f"`targets` should be classes, from 0 to C - 1 for logits of shape (B, C). Found "
            f"{value - _HALF} for sample {sample}; leave such samples out: `keep = targets >= 0`, "
            f"then `update(index[keep], logits[keep], targets[keep])`."
        )
    if not 0 <= fault < num_samples:
        return (
            f"`index` should be in [0, {num_samples}). Found {fault}; indices come from "
            f"IndexedDataset, and `num_samples` is the length of that dataset."
        )
    return mismatch(fault, int(targets[fault]), "another one")


def mismatch(sample: int, first: int, later: int | str) -> str:
    """That a sample had two targets.

    Args:
        sample: Which.
        first: Its target at first.
        later: And later.

    Returns:
        A sentence.
    """
    return (
        f"`targets` should be the same for a sample each time. Found sample {sample} with target "
        f"{first} at first and {later} later: indices do not follow their samples; take them from "
        f"IndexedDataset, not from the position in a shuffled loader. Where the loop mixes samples "
        f"or labels (mixup, CutMix), give `update` each sample's own label."
    )
