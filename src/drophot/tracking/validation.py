"""Checks of arguments by class, shape and dtype, before any value is read."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drophot._core import scalars
from drophot.tracking import packed_history


def describe(value: Any) -> str:
    """A value in the words of an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def check_size(num_samples: Any) -> int:
    """The number of samples of a tracker as a plain integer of at least 1."""
    scalar = isinstance(num_samples, str | bytes) or getattr(num_samples, "shape", None) == ()
    if hasattr(num_samples, "__len__") and not scalar:
        raise TypeError(
            f"`num_samples` must be an integer, got {describe(num_samples)}. Pass `len(dataset)`."
        )
    found = scalars.integer("num_samples", num_samples)
    if found < 1:
        raise ValueError(
            f"`num_samples` must be at least 1, got {found}. Pass the length of the dataset."
        )
    return found


def check_batch(index: Any, logits: Any, targets: Any) -> None:
    """Check that a batch is `index (B,)`, `logits (B, C)`, `targets (B,)`.

    Raises:
        TypeError: If one is not a tensor, or has the wrong dtype.
        ValueError: If a shape is wrong.
        RuntimeError: If `logits` are inside a transform of `torch.func`.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"`logits` must be a float tensor, got {describe(logits)}.")
    check_plain("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"`logits` must have shape (B, C) with C at least 2, got {tuple(logits.shape)}. For "
            f"any other kind of output, pass which samples are correct to `update_correct`."
        )
    check_vector("index", index, len(logits), "logits")
    check_vector("targets", targets, len(logits), "logits")


def check_loss(index: Any, loss: Any) -> None:
    """Check that a batch is `index (B,)`, `loss (B,)`, with the errors of `check_batch`."""
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise TypeError(f"`loss` must be a float tensor, got {describe(loss)}.")
    check_plain("loss", loss)
    if loss.dim() != 1:
        raise ValueError(
            f"`loss` must have one entry per sample, shape (B,), got {tuple(loss.shape)}. Compute "
            f'it with reduction="none"; for a language model, use `sequence_losses`.'
        )
    check_vector("index", index, len(loss), "loss")


def check_vector(name: str, value: Any, length: int, other: str) -> None:
    """Check that an argument is a tensor of integers `(B,)`, with `B` the length of another one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor of integers, got {describe(value)}.")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"`{name}` must be a tensor of integers, got {value.dtype}.")
    check_plain(name, value)
    if value.dim() != 1:
        raise ValueError(f"`{name}` must have shape (B,), got {tuple(value.shape)}.")
    if len(value) != length:
        raise ValueError(
            f"`{name}` must have one entry for each of the {length} rows of `{other}`, got "
            f"{len(value)}."
        )
    if length > packed_history.MAX_PRESENTATIONS:
        raise ValueError(
            f"A batch must have at most {packed_history.MAX_PRESENTATIONS} rows, got {length}. "
            f"Split it."
        )


def check_plain(name: str, value: Tensor) -> None:
    """Check that the rows of a tensor can be read.

    Raises:
        TypeError: If it is distributed over ranks.
        RuntimeError: If it is inside a transform of `torch.func`.
    """
    if torch.compiler.is_compiling():
        return
    if inside_transform(value):
        raise RuntimeError(
            f"`{name}` must be a tensor outside the transforms of `torch.func`, got one inside "
            f"grad, jvp or vmap. Return the logits from the function (`has_aux=True`) and call "
            f"`update` with them afterwards, without `attach`."
        )
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(value, module.DTensor):
        raise TypeError(
            f"`{name}` must be a plain tensor with all rows and all classes, got a DTensor. Pass "
            f"`{name}.full_tensor()` to `update`."
        )


def inside_transform(value: Tensor) -> bool:
    """Whether a tensor is wrapped by a transform of `torch.func`."""
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is not None and wrapped(value)


def check_presented(history: Tensor, missing: str) -> None:
    """Check that every sample was presented, unless `missing` is `"nan"`."""
    if missing not in ("raise", "nan"):
        raise ValueError(f'`missing` must be "raise" or "nan", got {missing!r}.')
    total = len(history)
    lack = int((packed_history.presentations(history) == 0).sum())
    if not lack or missing == "nan":
        return
    if lack == total:
        fix = (
            "Call `update` or `observe`, or use both `tracker.attach(model)` and "
            "`tracker.watch(loader)`"
        )
    else:
        fix = (
            'For a part of the data, such as a training split, use `scores(..., missing="nan")` '
            "and `select(..., among=train.indices)`. Otherwise check that `num_samples` and the "
            "indices are those of one IndexedDataset of all samples"
        )
    raise ValueError(
        f"`scores` needs every sample to be presented, but {lack} of {total} never were. {fix}."
    )


def check_presented_often(history: Tensor, statistic: str, least: int) -> None:
    """Check that every sample was presented as often as a statistic needs it."""
    presented = packed_history.presentations(history)
    if lack := int((presented < least).sum()):
        raise ValueError(
            f"`scores({statistic!r})` needs every sample to be presented at least {least} times, "
            f"but {lack} of {len(history)} were not; one has {int(presented.min())} presentations. "
            f'Train for more epochs, lower `window`, or use `scores(..., missing="nan")`.'
        )


def check_labels(found: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that the statistics of a state are those of a tracker, by their labels.

    A state that an older version saved has only their names. Then nothing else is compared.
    """
    names = [one.partition("=")[0] for one in wanted]
    if len(found) == len(wanted) and all(
        one in same for one, *same in zip(found, wanted, names, strict=True)
    ):
        return
    raise ValueError(
        f"`state_dict` must have the same statistics as the tracker, {listed(wanted)}, got "
        f"{listed(found)}. Create the tracker with `statistics=` as it was when the state was "
        f"saved."
    )


def listed(labels: Sequence[str]) -> str:
    """The labels of statistics in the words of an error message."""
    return ", ".join(labels) or "the default ones"
