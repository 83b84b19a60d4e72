"""One loss per sequence from the logits of a language model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from drophot.tracking.validation import check_plain, describe


@torch.no_grad()
def sequence_losses(
    logits: Tensor, labels: Tensor, *, shift: bool, ignore_index: int = -100
) -> Tensor:
    """The mean cross-entropy of each sequence over its labeled tokens.

    Tokens whose label is `ignore_index`, such as padding, a prompt or tokens that are not masked,
    are left out. A sequence without any labeled token has no loss, NaN. The logits are processed
    one sequence at a time in float32, so that no second tensor of their size is needed.

    Args:
        logits: The model's outputs, floats, shape `(B, L, V)`, with or without gradient.
        labels: The tokens to predict, integers, shape `(B, L)`.
        shift: Whether the logits at one position predict the label at the next one, as in the
            causal language models of Transformers, whose labels are the inputs. `False` for masked
            language models, and if your labels are shifted already.
        ignore_index: The label of tokens that are left out.

    Returns:
        The losses, float32, shape `(B,)`, without gradient.

    Raises:
        TypeError: If `logits` is not a float tensor, or `labels` not a tensor of integers.
        ValueError: If a shape is wrong.

    Example:
        >>> logits = torch.zeros(2, 3, 5)  # every token has probability 1/5
        >>> labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
        >>> sequence_losses(logits, labels, shift=False)
        tensor([1.6094, 1.6094])
        >>> sequence_losses(logits, labels, shift=True)  # nothing follows the only token
        tensor([1.6094,    nan])
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"`logits` must be a float tensor, got {describe(logits)}.")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise TypeError(f"`labels` must be a tensor of integers, got {describe(labels)}.")
    check_plain("logits", logits)
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`logits` must have shape (B, L, V) and `labels` shape (B, L), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    labels = labels.to(logits.device, torch.int64)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    sums = [
        F.cross_entropy(rows.float(), wanted, reduction="sum", ignore_index=ignore_index)
        for rows, wanted in zip(logits, labels, strict=True)
    ]
    if not sums:
        return logits.new_empty(0, dtype=torch.float32)
    return torch.stack(sums) / (labels != ignore_index).sum(1)
