"""One loss per sequence from the logits of a language model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from drophot.tracking.validation import check_plain, describe

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
        ValueError: If a shape is wrong; on a CPU also if a label is not a token in [0, V).

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
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
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
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_labels(labels, logits.shape[2], ignore_index)
    sums = [
        F.cross_entropy(rows.float(), wanted, reduction="sum", ignore_index=ignore_index)
        for rows, wanted in zip(logits, labels, strict=True)
    ]
    if not sums:
        return logits.new_empty(0, dtype=torch.float32)
    return torch.stack(sums) / (labels != ignore_index).sum(1)


def _check_labels(labels: Tensor, num_tokens: int, ignore_index: int) -> None:
    wrong = labels[((labels < 0) | (labels >= num_tokens)) & (labels != ignore_index)]
    if len(wrong):
        raise ValueError(
            f"`labels` must be in [0, {num_tokens}), the tokens of the logits, or `ignore_index`, "
            f"{ignore_index}, got {int(wrong[0])}. Pass `ignore_index={int(wrong[0])}` if this "
            f"label marks tokens that are left out."
        )
