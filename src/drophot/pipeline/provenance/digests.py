"""Digests of tensors and of values that JSON can hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 26  # bytes that are hashed at a time


def digest(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of tensors' values, shapes and types."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.detach()
        rows = max(1, len(tensor) * _CHUNK // max(1, tensor.nbytes)) if tensor.dim() else 1
        for part in torch.split(tensor, rows) if tensor.dim() and tensor.numel() else (tensor,):
            part = part.detach().cpu().resolve_neg().reshape(-1).contiguous()
            found.update(part.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def digest_of(tree: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(text_of(tree).encode()).hexdigest()[:16]


def text_of(tree: Any) -> str:
    """The canonical JSON of a value, in which the order of names does not matter."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))
