"""What a dataset holds: handles that processes cannot share, and values to compare."""

from __future__ import annotations

import io
import marshal
import sqlite3
import tarfile
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from drophot.data.determinism import is_from_library, parts_of, reached
from drophot.data.indexing import IndexedDataset
from drophot.data.samples import is_plainly

_HANDLES = (io.IOBase, tarfile.TarFile, zipfile.ZipFile, sqlite3.Connection)
_VALUES = (str, bytes, int, float, complex, type(None), range, np.generic)
_MAX_BYTES = 2**26  # compared per array; of a larger array, rows spread over it


def can_be_copied(dataset: Any) -> bool:
    """Whether a copy of a dataset in another process is known to give the same samples.

    It must be a dataset of torchvision, tensors or a list, possibly wrapped by torch's classes, and
    nothing that it or its transforms hold can be closed, as a file can.
    """
    return _is_known(dataset) and not any(map(_is_handle, reached(dataset)))


def _is_known(dataset: Any) -> bool:
    if type(dataset) in (list, tuple) or is_plainly(dataset, TensorDataset):
        return True
    if is_plainly(dataset, Subset) or is_plainly(dataset, IndexedDataset):
        return _is_known(dataset.dataset)
    if is_plainly(dataset, ConcatDataset):
        return all(map(_is_known, dataset.datasets))
    plain = not {"__getitem__", "__getitems__"} & getattr(dataset, "__dict__", {}).keys()
    return plain and type(dataset).__module__.startswith("torchvision.datasets.")


def _is_handle(thing: Any) -> bool:
    if isinstance(thing, type):
        return False
    kind = type(thing)
    return isinstance(thing, _HANDLES) or hasattr(kind, "close") or hasattr(kind, "fileno")


def holds_its_samples(dataset: Any) -> bool:
    """Whether a dataset is made of lists or tensors, so that reading it is cheap and safe."""
    if is_plainly(dataset, Subset) or is_plainly(dataset, IndexedDataset):
        return holds_its_samples(dataset.dataset)
    if is_plainly(dataset, ConcatDataset):
        return all(map(holds_its_samples, dataset.datasets))
    return type(dataset) in (list, tuple) or is_plainly(dataset, TensorDataset)


def values_of(dataset: Any) -> list[Any]:
    """The numbers, strings and arrays that a dataset and its code hold, to detect changes.

    Two results are equal unless a value has changed. Of large arrays only some rows are compared.
    """
    found: list[Any] = []
    for thing in reached(dataset):
        if isinstance(thing, list | dict | tuple):
            try:
                found.append(zlib.crc32(marshal.dumps(thing, 0)))
                continue
            except ValueError:  # it holds other objects
                found.append(len(thing))
        kind = thing if isinstance(thing, type) else type(thing)
        held = [value for value, _ in parts_of(thing, None)]
        for base in kind.__mro__:
            held += [] if is_from_library(base) else vars(base).values()
        found += [_value(one) for one in held if isinstance(one, (*_VALUES, Tensor, np.ndarray))]
    return found


def _value(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        version = 0 if thing.is_inference() else thing._version
        if thing.device.type != "cpu" or thing.layout != torch.strided or thing.is_quantized:
            return id(thing), version
        rows = thing.detach().reshape(1) if thing.dim() == 0 else thing.detach()
        part = rows[:: _step(rows)].resolve_conj().resolve_neg().contiguous()
        return version, thing.shape, zlib.crc32(part.view(-1).view(torch.uint8).numpy().data)
    if isinstance(thing, np.ndarray):
        if thing.dtype.hasobject:
            return id(thing), thing.shape
        rows = np.atleast_1d(thing)
        part = np.ascontiguousarray(rows[:: _step(rows)])
        return thing.shape, zlib.crc32(part.tobytes())
    return type(thing), thing if isinstance(thing, str | bytes) else repr(thing)


def _step(rows: Any) -> int:
    """The distance between the rows that are compared."""
    return max(1, -(-int(rows.nbytes) // _MAX_BYTES))
