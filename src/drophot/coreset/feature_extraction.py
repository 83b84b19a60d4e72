"""Feature vectors of samples, computed by a trained model, for k-center and facility location."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from drophot._core.classifier import check_model, logits_of
from drophot._core.model_contexts import evaluating
from drophot.data.batching import batches
from drophot.data.cache import Cache, Kept

Kind = Literal["penultimate", "error"]

_BATCH = 512


def features(
    model: nn.Module,
    dataset: Dataset[Any],
    kind: Kind = "penultimate",
    *,
    cache: Cache = "auto",
) -> Tensor:
    r"""Compute one feature vector per sample in one pass of a trained classifier.

    The model is in evaluation mode during the pass; afterwards its mode and all random states are
    as before.

    References:
        `"penultimate"`: Sener and Savarese, Active Learning for Convolutional Neural Networks: A
        Core-Set Approach, ICLR 2018. `"error"`: Katharopoulos and Fleuret, Not All Samples Are
        Created Equal, ICML 2018, https://arxiv.org/abs/1803.00942, and CRAIG.

    Args:
        model: Called as `model(inputs)`, returns logits `(B, C)`.
        dataset: Samples `(input, target)` or `(input, target, index)`.
        kind: `"penultimate"` for the inputs of the model's last linear layer, or `"error"` for
            :math:`\mathrm{softmax}(z) - \mathrm{onehot}(y)`, the gradient of the loss with respect
            to the logits. Distances between these bound the distances between the samples'
            gradients.
        cache: `True` decodes all samples before the pass. Otherwise they are decoded batch by
            batch, since there is only one pass.

    Returns:
        Shape `(N, D)`, float32, in the order of the dataset, on the model's device. `D` is the
        number of inputs of the last layer, or `C`.

    Raises:
        ValueError: If `kind` is not one of the two, the dataset is empty, its samples differ in
            shape, or, for `"penultimate"`, the model does not end in a linear layer.
        TypeError: If the samples are not tuples of tensors and numbers, or `model`, `dataset` or
            the model's output has the wrong type.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(10, 4), torch.zeros(10, dtype=torch.int64))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> features(model, data).shape, features(model, data, "error").shape
        (torch.Size([10, 8]), torch.Size([10, 3]))
    """
    if kind not in get_args(Kind):
        raise ValueError(f'`kind` must be "penultimate" or "error", got {kind!r}.')
    check_model(model)
    vectors: Tensor | None = None
    done = 0
    with evaluating(model) as device:
        data = Kept(dataset, device, cache, readings=1).data
        compute = _penultimate(model) if kind == "penultimate" else _error(model)
        for inputs, targets, *_ in batches(data, _BATCH, device):
            rows = compute(inputs, targets)
            if vectors is None:
                vectors = rows.new_empty(len(data), *rows.shape[1:])
            vectors[done : done + len(rows)] = rows
            done += len(rows)
    assert vectors is not None  # Kept raises an error for an empty dataset
    return vectors


def error_vectors(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax − one-hot, the gradients of the cross-entropy by the logits, float32 `(B, C)`."""
    if targets.dim() != 1 or targets.is_floating_point():
        raise ValueError(
            f"`targets` must be classes, integers of shape (B,), got {targets.dtype} of shape "
            f"{tuple(targets.shape)}. Use argmax(1) to convert one-hot targets."
        )
    return logits.float().softmax(1) - F.one_hot(targets.long(), logits.shape[1])


def _error(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def compute(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(model, model, inputs)
        if logits.dim() != 2:
            raise ValueError(
                f"`model` must return logits of shape (B, C), got shape {tuple(logits.shape)}."
            )
        return error_vectors(logits, targets)

    return compute


def _penultimate(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def compute(inputs: Tensor, _: Tensor) -> Tensor:
        last: list[Any] = [None, None]

        def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            last[:] = args[0] if args else kwargs["input"], output

        handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
        try:
            logits = logits_of(model, model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        before, output = last
        if output is not logits:
            raise ValueError(
                f"`model` must end in a linear layer, whose inputs are the features, but the "
                f"outputs of {type(model).__name__} are not those of a linear layer. Use "
                f'kind="error", or compute the features yourself and pass them to the selector.'
            )
        if before.dim() != 2:
            raise ValueError(
                f"`model` must return logits (B, C) from one vector per sample, got logits of "
                f"shape {tuple(logits.shape)} from inputs of shape {tuple(before.shape)}. Wrap the "
                f"model in one that does."
            )
        return before.float()

    return compute
