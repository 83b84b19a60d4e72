"""The accuracy of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from drophot._core.classifier import check_classes, check_model, is_correct, logits_of
from drophot._core.model_contexts import evaluating
from drophot.data import batching
from drophot.data.cache import Cache, Kept
from drophot.training.memory_format import use_channels_last
from drophot.training.step import fast_forward

_BATCH_SIZE = 512  # small enough for the activations to stay in a CPU's cache


def evaluate(model: nn.Module, dataset: Dataset[Any], *, cache: Cache = "auto") -> float:
    """Return the accuracy of a classifier: the share of samples whose class it predicts.

    A sample whose logits contain NaN counts as wrong. The model's mode and the random state are
    restored. Each sample is read once.

    Args:
        model: Called as `model(inputs)`, returns logits `(B, C)`.
        dataset: Samples `(input, target)` or `(input, target, index)`.
        cache: `True` decodes all samples before the first batch, which is rarely useful. The other
            settings read them batch by batch.

    Returns:
        The accuracy, in [0, 1].

    Raises:
        ValueError: If the dataset is empty, its samples differ in shape, the targets are not one
            integer in `[0, C)` per sample, or the logits are not of shape `(B, C)`.
        TypeError: If the samples are not tuples of tensors and numbers, or the model, its output or
            the dataset is of the wrong kind.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        >>> evaluate(nn.Identity(), data)  # its inputs are the logits
        0.75
    """
    check_model(model)
    with evaluating(model) as device:
        data = Kept(dataset, device, cache, readings=1).data
        forward, layout = fast_forward(model, device), use_channels_last(model, data, device)
        correct, lowest, highest = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        num_classes = 0
        for inputs, targets, *_ in batching.batches(
            data, _BATCH_SIZE, device, channels_last=layout
        ):
            logits = logits_of(model, forward, inputs)
            check_classes(logits, targets)
            correct += is_correct(logits, targets).sum()
            lowest = torch.minimum(lowest, targets.min())
            highest = torch.maximum(highest, targets.max())
            num_classes = logits.shape[1]
    num_correct, low, high = torch.stack([correct, lowest, highest]).tolist()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"`dataset` must have targets in [0, {num_classes}), the classes of the model, got "
            f"{low if low < 0 else high}. Leave samples with other targets out."
        )
    return num_correct / len(data)
