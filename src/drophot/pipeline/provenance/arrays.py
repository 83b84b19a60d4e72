"""The identity of an array or a tensor: its type, shape and a digest of its values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drophot.pipeline.provenance.digests import digest

_LARGE = 1 << 30  # bytes of a dataset's array, beyond which parts of it are hashed
_NUM_PARTS = 1024


def describe_ndarray(array: np.ndarray[Any, Any], data: bool, value: Callable[[Any], Any]) -> Any:
    """An array of NumPy as JSON can hold it; `value` describes what it consists of."""
    if array.dtype.hasobject:
        return value(array.tolist())
    if isinstance(array, np.ma.MaskedArray):
        masked: Any = array
        kept, mask = masked.filled(0), np.ma.getmaskarray(masked)
        return {"masked": [value(kept), value(mask), value(masked.fill_value)]}
    kind, shape = f"{array.dtype}", list(array.shape)
    if data and array.nbytes > _LARGE:
        flat = array.reshape(-1)
        starts = range(0, len(flat), max(1, len(flat) // _NUM_PARTS))
        array = np.concatenate([flat[i : i + 1024] for i in starts])
        shape = list(array.shape)
    found = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()[:16]
    return {"array": f"{kind} {shape}", "digest": found}


def describe_tensor(tensor: Tensor, data: bool, value: Callable[[Any], Any]) -> Any:
    """A tensor as JSON can hold it; `None` if its values cannot be read."""
    shape = f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.device.type == "meta":
        return {"tensor": shape, "digest": str(tensor.layout)}
    if parts := _parts(tensor):
        return {"tensor": shape, "layout": str(tensor.layout), "parts": value(parts)}
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None
    if tensor.numel() == 1 and not tensor.is_complex():
        return {"tensor": shape, "value": value(tensor.item())}
    if data and tensor.nbytes > _LARGE and tensor.is_contiguous():
        flat = tensor.detach().reshape(-1)
        starts = range(0, len(flat), len(flat) // _NUM_PARTS)
        tensor = torch.cat([flat[i : i + 1024] for i in starts])
    return {"tensor": shape, "digest": digest([tensor])}


def _parts(tensor: Tensor) -> list[Any]:
    """The parts of a sparse or a quantized tensor; nothing for any other."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if not tensor.is_quantized:
        return []
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.int_repr(), tensor.q_scale(), tensor.q_zero_point()]
    scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return [tensor.int_repr(), scales, zeros, tensor.q_per_channel_axis()]
