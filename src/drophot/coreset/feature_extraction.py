"""What a model makes of each sample: the vectors that k-center and facility location choose by."""

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

_CHUNK = 512


def features(
    model: nn.Module,
    dataset: Dataset[Any],
    kind: Kind = "penultimate",
    *,
    cache: Cache = "auto",
) -> Tensor:
    r"""One vector for each sample, from one pass of a trained classifier in evaluation mode.

    The model comes back as it was, mode and random state included.

    References:
        `"penultimate"`: Sener and Savarese, Active Learning for Convolutional Neural Networks: A
        Core-Set Approach, ICLR 2018. `"error"`: Katharopoulos and Fleuret, Not All Samples Are
        Created Equal, ICML 2018, https://arxiv.org/abs/1803.00942, and CRAIG.

    Args:
        model: Called as `model(inputs)`, gives logits `(B, C)`.
        dataset: Samples `(input, target)` or `(input, target, index)`.
        kind: `"penultimate"`, the inputs of the model's last linear layer, or `"error"`,
            :math:`\mathrm{softmax}(z) - \mathrm{onehot}(y)`, the gradient of the loss by the
            logits, whose distances bound those of the samples' gradients.
        cache: `True` decodes all samples first; the others read them batch by batch, as the pass
            is the only one.

    Returns:
        Shape `(N, D)`, float32, in the dataset's order, on the model's device: `D` is the last
        layer's number of inputs, or `C`.

    Raises:
        ValueError: If `kind` is another word, the dataset is empty, its samples differ in shape, or
            for `"penultimate"` the model's outputs are not those of a linear layer.
        TypeError: If the samples are no tuples of tensors and numbers, or the model, the dataset or
            what the model gives is of the wrong kind.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(10, 4), torch.zeros(10, dtype=torch.int64))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> features(model, data).shape, features(model, data, "error").shape
        (torch.Size([10, 8]), torch.Size([10, 3]))
    """
    if kind not in get_args(Kind):
        raise ValueError(f'`kind` should be "penultimate" or "error". Found {kind!r}.')
    check_model(model)
    found: Tensor | None = None
    done = 0
    with evaluating(model) as device:
        data = Kept(dataset, device, cache, readings=1).data
        look = _penultimate(model) if kind == "penultimate" else _error(model)
        for inputs, targets, *_ in batches(data, _CHUNK, device):
            rows = look(inputs, targets)
            if found is None:
                found = rows.new_empty(len(data), *rows.shape[1:])
            found[done : done + len(rows)] = rows
            done += len(rows)
    assert found is not None  # in_memory refuses what is empty
    return found


def errors(logits: Tensor, targets: Tensor) -> Tensor:
    """The gradient of each sample's cross-entropy by its logits.

    Args:
        logits: Shape `(B, C)`.
        targets: Classes, shape `(B,)`.

    Returns:
        softmax − one-hot, float32, shape `(B, C)`.

    Raises:
        ValueError: If the targets are no classes.
    """
    if targets.dim() != 1 or targets.is_floating_point():
        raise ValueError(
            f"`targets` should be classes, integers of shape (B,). Found {targets.dtype} of shape "
            f"{tuple(targets.shape)}; take argmax(1) of one-hot ones."
        )
    return logits.float().softmax(1) - F.one_hot(targets.long(), logits.shape[1])


def _error(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def look(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(model, model, inputs)
        if logits.dim() != 2:
            raise ValueError(f"`model` should give logits (B, C). Found {tuple(logits.shape)}.")
        return errors(logits, targets)

    return look


def _penultimate(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def look(inputs: Tensor, _: Tensor) -> Tensor:
        last: list[Any] = [None, None]

        def keep(module: nn.Module, given: Any, named: Any, output: Tensor) -> None:
            last[:] = given[0] if given else named["input"], output

        handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
        try:
            logits = logits_of(model, model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        before, output = last
        if output is not logits:
            raise ValueError(
                f"`model` should end in a linear layer, whose inputs are the features. Found "
                f"{type(model).__name__}, whose outputs are not those of one; take "
                f'kind="error", or give features of your own to the selector.'
            )
        if before.dim() != 2:
            raise ValueError(
                f"`model` should give logits (B, C) of one vector for each sample. Found "
                f"{tuple(logits.shape)} of {tuple(before.shape)}; wrap the model in one that does."
            )
        return before.float()

    return look
