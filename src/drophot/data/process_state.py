"""What a data set holds that a copy of its process would share or lose, and what it looks like."""

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

from drophot.data.determinism import is_librarys, parts_of, reached
from drophot.data.indexing import IndexedDataset
from drophot.data.samples import is_plainly

_HANDLES = (io.IOBase, tarfile.TarFile, zipfile.ZipFile, sqlite3.Connection)
_VALUES = (str, bytes, int, float, complex, type(None), range, np.generic)
_WHOLE = 2**26  # bytes of an array that are looked at; of a larger one as many, spread over it


def can_be_copied(dataset: Any) -> bool:
    """Whether a copy of the process is known to read a data set as this one does.

    Args:
        dataset: The data set.

    Returns:
        Whether it is one of torchvision's own, or made of these, tensors or lists by torch's
        classes, and nothing that it or its transforms hold can be closed, as a file can.
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
    """Whether a data set is made of lists, so that reading it runs nobody's code and is cheap.

    Args:
        dataset: The data set.

    Returns:
        Whether it is.
    """
    if is_plainly(dataset, Subset) or is_plainly(dataset, IndexedDataset):
        return holds_its_samples(dataset.dataset)
    if is_plainly(dataset, ConcatDataset):
        return all(map(holds_its_samples, dataset.datasets))
    return type(dataset) in (list, tuple) or is_plainly(dataset, TensorDataset)


def values_of(dataset: Any) -> list[Any]:
    """What can be compared of what a data set and its code hold: numbers, words, arrays.

    Args:
        dataset: The data set.

    Returns:
        Equal to what this gave before, unless one of them has changed. Of large arrays only a part
        is looked at.
    """
    found: list[Any] = []
    for thing in reached(dataset):
        if isinstance(thing, list | dict | tuple):
            try:
                found.append(zlib.crc32(marshal.dumps(thing, 0)))
                continue
            except ValueError:  # it holds more than numbers and words
                found.append(len(thing))
        kind = thing if isinstance(thing, type) else type(thing)
        held = [value for value, _ in parts_of(thing, None)]
        for base in kind.__mro__:
            held += [] if is_librarys(base) else vars(base).values()
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
    """How far apart the rows are that are looked at."""
    return max(1, -(-int(rows.nbytes) // _WHOLE))
