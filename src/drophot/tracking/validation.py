"""What is refused before a batch is looked at: arguments of another kind, shape or dtype."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drophot._core import scalars
from drophot.tracking import packed_history


def describe(value: Any) -> str:
    """What a value is, for an error.

    Args:
        value: Anything.

    Returns:
        Its kind, and of what.
    """
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def size(num_samples: Any) -> int:
    """The number of samples of a tracker.

    Args:
        num_samples: As the user gave it.

    Returns:
        A plain integer of at least 1.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is less than 1.
    """
    scalar = isinstance(num_samples, str | bytes) or getattr(num_samples, "shape", None) == ()
    if hasattr(num_samples, "__len__") and not scalar:
        raise TypeError(
            f"`num_samples` should be an integer. Found {describe(num_samples)}; give len(dataset)."
        )
    found = scalars.integer("num_samples", num_samples)
    if found < 1:
        raise ValueError(
            f"`num_samples` should be at least 1. Found {found}; give the length of the dataset."
        )
    return found


def batch(index: Any, logits: Any, targets: Any) -> None:
    """Refuse a batch of another kind than `index (B,)`, `logits (B, C)`, `targets (B,)`.

    Args:
        index: The samples.
        logits: The model's outputs.
        targets: The classes.

    Raises:
        TypeError: If one is no tensor, or of another dtype.
        ValueError: If a shape is wrong.
        RuntimeError: If `logits` are inside of a transform of `torch.func`.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"`logits` should be a float tensor. Found {describe(logits)}.")
    plain("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"`logits` should have shape (B, C) with C at least 2. Found "
            f"{tuple(logits.shape)}; for any other kind of output judge it yourself and call "
            f"`update_correct`."
        )
    vector("index", index, len(logits), "logits")
    vector("targets", targets, len(logits), "logits")


def vector(name: str, value: Any, length: int, other: str) -> None:
    """Refuse what is no tensor of integers of shape `(B,)`.

    Args:
        name: The argument.
        value: What was given.
        length: `B`.
        other: The argument that `B` is taken from.

    Raises:
        TypeError: If it is no tensor, or not of integers.
        ValueError: If its shape is another, or `B` larger than any counter.
        RuntimeError: If it is inside of a transform of `torch.func`.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` should be a tensor of integers. Found {describe(value)}.")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"`{name}` should be a tensor of integers. Found {value.dtype}.")
    plain(name, value)
    if value.dim() != 1:
        raise ValueError(f"`{name}` should have shape (B,). Found {tuple(value.shape)}.")
    if len(value) != length:
        raise ValueError(
            f"`{name}` should have one entry for each row of `{other}`, {length}. Found "
            f"{len(value)}."
        )
    if length > packed_history.MAX_PRESENTATIONS:
        raise ValueError(
            f"A batch should have at most {packed_history.MAX_PRESENTATIONS} rows. "
            f"Found {length}; split it."
        )


def plain(name: str, value: Tensor) -> None:
    """Refuse a tensor whose rows are not there to be read, where that can be asked.

    Args:
        name: The argument.
        value: What was given.

    Raises:
        TypeError: If it is spread over ranks.
        RuntimeError: If it is inside of a transform of `torch.func`.
    """
    if torch.compiler.is_compiling():
        return
    if inside_transform(value):
        raise RuntimeError(
            f"`{name}` should be a tensor outside of `torch.func`'s transforms. Found one inside "
            f"of grad, jvp or vmap; let the function return the logits too (`has_aux=True`) and "
            f"call `update` with them afterwards, without `attach`."
        )
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(value, module.DTensor):
        raise TypeError(
            f"`{name}` should be a plain tensor with all rows and all classes. Found a DTensor; "
            f"call `{name}.full_tensor()` and give that to `update`."
        )


def inside_transform(value: Tensor) -> bool:
    """Whether a tensor is one of those that `torch.func` hands to a function."""
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is not None and wrapped(value)


def presented(history: Tensor, missing: str) -> None:
    """Refuse scores of samples that nobody has seen, unless they may be missing.

    Args:
        history: Of all samples.
        missing: `"raise"` or `"nan"`.

    Raises:
        ValueError: If `missing` is neither, or a sample was never presented and has to be.
    """
    if missing not in ("raise", "nan"):
        raise ValueError(f'`missing` should be "raise" or "nan". Found {missing!r}.')
    total = len(history)
    lack = int((packed_history.presentations(history) == 0).sum())
    if not lack or missing == "nan":
        return
    if lack == total:
        cure = (
            "call `update` or `observe`, or iterate over `tracker.watch(loader)` while "
            "`tracker.attach(model)` is in force: it takes both"
        )
    else:
        cure = (
            'for a part of the data, such as a training split, take `scores(..., missing="nan")` '
            "and `select(..., among=train.indices)`; otherwise see that `num_samples` and the "
            "indices are of one IndexedDataset of all samples"
        )
    raise ValueError(
        f"`scores` should be asked for once every sample was presented. Found {lack} of {total} "
        f"that never were; {cure}."
    )
