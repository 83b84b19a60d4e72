"""Compressed checkpoints of sparse networks: one bit per weight, and the nonzero values."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from drophot._core.atomic_write import atomic_write
from drophot.prune.current_parameters import without_wrappers
from drophot.prune.prunable_weights import check_module

_FORMAT = "drophot compressed 1"
_HEADER = "drophot.json"
_DEFAULT_METADATA = {"version": 1}

# The errors that can be raised while reading a file that is damaged or something else.
_READ_ERRORS = (
    *(zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, EOFError, struct.error),
    *(OSError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError),
)


def compressed_bytes(tensor: Tensor) -> int:
    """The bytes that a dense tensor takes in a compressed file."""
    if not _may_be_sparse(tensor):
        return tensor.numel() * tensor.element_size()
    return _sparse_bytes(tensor.numel(), int(tensor.detach().count_nonzero()), tensor)


def save_compressed(model: nn.Module, path: Path | str) -> None:
    """Save a model's `state_dict` as one bit per weight and the values that are not zero.

    At a sparsity of 80 %, a file of 32-bit weights takes 0.2 + 1/32 = 0.231 of the dense one.
    Tensors that would not become smaller are written whole, and tensors that share memory are
    written once. The file is a zip archive of raw bytes and a description in JSON; it contains no
    code. It is written atomically, even if several threads or processes save to one path; the last
    one wins. A process that is killed may leave a file `NAME.….part` in the same folder, which the
    next call removes.

    Args:
        model: A pruned model, on any device.
        path: The file; an existing file is replaced.

    Raises:
        TypeError: If `model` is not a module, `path` not a path, or the `state_dict` holds anything
            but dense tensors.
        ValueError: If the metadata of the `state_dict` is too large for the file's description, or
            `path` is not a regular file.
        OSError: If the folder, or the existing file, cannot be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from drophot import magnitude_prune
        >>> model, other = nn.Linear(100, 100), nn.Linear(100, 100)
        >>> _ = magnitude_prune(model, 0.8)
        >>> with TemporaryDirectory() as folder:
        ...     save_compressed(model, f"{folder}/model.drophot")
        ...     load_compressed(other, f"{folder}/model.drophot")
        >>> torch.equal(model.weight, other.weight)
        True
    """
    check_module("model", model)
    path = _path(path)
    state = model.state_dict()
    for name, tensor in state.items():
        _check_dense(name, tensor)
    entries: dict[str, dict[str, Any]] = {}
    shared: dict[tuple[Any, ...], str] = {}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for number, (name, tensor) in enumerate(state.items()):
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and memory in shared:
                entries[name] = {"same as": shared[memory]}
                continue
            shared[memory] = name
            entries[name] = _write(archive, str(number), tensor.detach())
        described = {"format": _FORMAT, "tensors": entries, "metadata": _metadata(state)}
        header = json.dumps(described, default=_raise_not_json).encode()
        if len(header) > _longest_header(state):
            raise ValueError(
                f"`model` must have less metadata in its state_dict: its description takes "
                f"{len(header):,} bytes, of at most {_longest_header(state):,}. Use torch.save."
            )
        archive.writestr(_HEADER, header)


def load_compressed(model: nn.Module, path: Path | str) -> None:
    """Load a file of `save_compressed` into a model of the same architecture, in place.

    The tensors are read and checked, then passed to `model.load_state_dict`, so that hooks and
    modules with custom loading work as usual. Every tensor is equal to the one that was
    saved, except that negative zeros become positive. Files from untrusted sources are safe to
    load: how much is read is bounded by the model and by the size of the file.

    Args:
        model: The model, on any device.
        path: The file.

    Raises:
        TypeError: If `model` is not a module or `path` not a path.
        ValueError: If the file is damaged or was not written by `save_compressed`, if names, shapes
            or dtypes are not the model's (extra state may have other shapes), or if the model is
            lazy, on the meta device or has expanded buffers. Nothing is changed then. An error that
            a hook of the model raises has a note that the model may be loaded in part.
    """
    check_module("model", model)
    path = _path(path)
    state = model.state_dict()
    if lazy := [name for name, tensor in state.items() if is_lazy(tensor)]:
        raise ValueError(
            f"`model` must be initialized, but `{lazy[0]}` belongs to a lazy module. Run one batch "
            f"through the model first."
        )
    if empty := [name for name, tensor in state.items() if getattr(tensor, "is_meta", False)]:
        raise ValueError(
            f"`model` must not be on the meta device, but `{empty[0]}` is. Call "
            f"model.to_empty(device=...) first."
        )
    for name, tensor in state.items():
        _check_dense(name, tensor)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        repeated = zip(tensor.shape, tensor.stride(), strict=True)
        if name in state and any(size > 1 and not step for size, step in repeated):
            raise ValueError(
                f"`model` must not have expanded tensors, but `{name}` is expanded to "
                f"{tuple(tensor.shape)}. Replace it with a clone."
            )
    with path.open("rb") as file:
        try:
            found = _read(file, state)
        except _READ_ERRORS as error:
            raise ValueError(
                f"`path` must be a file written by save_compressed, but {path} is damaged or "
                f"something else ({type(error).__name__}: {error})."
            ) from error
    try:
        model.load_state_dict(found)
    except Exception as error:
        error.add_note(f"load_compressed: the model may be loaded in part from {path}.")
        raise


def is_compressed(path: Path) -> bool:
    """Whether a file was written by `save_compressed`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _HEADER in archive.namelist()
    except zipfile.BadZipFile:
        return False


def read_compressed(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `save_compressed`; the size of the file bounds what is read."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                header = json.loads(_content(archive, _HEADER, path.stat().st_size))
            entries = header["tensors"]
            state = {
                name: _as_described(entries[entry.get("same as", name)])
                for name, entry in entries.items()
            }
            return _read(file, state)
        except _READ_ERRORS as error:
            raise ValueError(
                f"`path` must be a file written by save_compressed, but {path} is damaged "
                f"({type(error).__name__}: {error})."
            ) from error


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`path` must be a path, got {type(path).__name__}. The model comes first, then the "
            f"path."
        )
    return Path(path)


def _metadata(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metadata of each module's part of a state, by path, where it is not the default."""
    metadata = getattr(state, "_metadata", {})
    return {path: dict(entry) for path, entry in metadata.items() if entry != _DEFAULT_METADATA}


def _write(archive: zipfile.ZipFile, number: str, tensor: Tensor) -> dict[str, Any]:
    flat = tensor.cpu().contiguous().reshape(-1)
    entry: dict[str, Any] = {
        "file": number,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    if _may_be_sparse(flat):
        nonzero = flat != 0
        count = int(nonzero.count_nonzero())
        if _sparse_bytes(flat.numel(), count, flat) < flat.numel() * flat.element_size():
            entry["nonzeros"] = count
            archive.writestr(f"{number}.mask", np.packbits(nonzero.numpy()).tobytes())
            flat = flat[nonzero]
    archive.writestr(number, _bytes(flat).numpy().tobytes() if flat.numel() else b"")
    return entry


def _read(file: BinaryIO, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that was saved, checked against the model's."""
    with zipfile.ZipFile(file) as archive:
        header = json.loads(_content(archive, _HEADER, _longest_header(state)))
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"`path` must be a file of the format {_FORMAT!r}, got "
                f"{str(header.get('format'))[:50]!r}. It may be from a later version of drophot."
            )
        entries = header["tensors"]
        if different := sorted(entries.keys() ^ state.keys()):
            raise ValueError(_names_error(different, entries.keys(), state.keys()))
        found: OrderedDict[str, Tensor] = OrderedDict()
        found._metadata = _saved_metadata(header, state)  # type: ignore[attr-defined]
        for name, entry in entries.items():
            source = entry.get("same as", name)
            saved = entries[source]
            own = state[name]
            if _is_extra(name) and _is_extra(source):
                own = _as_described(saved)
            dtype = str(own.dtype).removeprefix("torch.")
            if saved["dtype"] != dtype or saved["shape"] != list(own.shape):
                raise ValueError(
                    f"`model` must have `{name}` as {saved['dtype']} of shape "
                    f"{tuple(saved['shape'])}, as in the file, got {dtype} of shape "
                    f"{tuple(own.shape)}. "
                    + (
                        f"Call model.to(torch.{saved['dtype']}) first, and convert it afterwards."
                        if saved["shape"] == list(own.shape)
                        else "The file is of another model."
                    )
                )
            if source not in found:
                like = own if _is_extra(source) else state[source]
                found[source] = _tensor(archive, saved, like, source)
            found[name] = found[source]
    return found


def _names_error(different: list[str], in_file: Iterable[str], in_model: Iterable[str]) -> str:
    more = f" and {len(different) - 20:,} more" if len(different) > 20 else ""
    fix = "The file is of another model."
    if sorted(map(without_wrappers, in_file)) == sorted(map(without_wrappers, in_model)):
        fix = (
            "A wrapper such as DistributedDataParallel or torch.compile adds `module.` or "
            "`_orig_mod.` to the names of one of them. Save and load the module inside it."
        )
    return (
        f"`model` must have the tensors of the file, but the names differ in "
        f"{[name[:100] for name in different[:20]]}{more}. {fix}"
    )


def _saved_metadata(header: dict[str, Any], state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The modules' metadata (versions, mostly) when the file was written."""
    own = {path: dict(entry) for path, entry in getattr(state, "_metadata", {}).items()}
    if "metadata" not in header:  # files of earlier versions have none
        return own
    saved = header["metadata"]
    if not all(isinstance(entry, dict) for entry in saved.values()):
        raise ValueError(f"`path` is damaged: the metadata of its modules is {saved!r}.")
    return {path: dict(saved.get(path, _DEFAULT_METADATA)) for path in own}


def _tensor(archive: zipfile.ZipFile, entry: dict[str, Any], like: Tensor, name: str) -> Tensor:
    # The model, or the size of the file, bounds how much is read, never a number in the file.
    total, size = like.numel(), like.element_size()
    count = entry.get("nonzeros", total)
    if not isinstance(count, int) or not 0 <= count <= total:
        raise ValueError(f"`path` is damaged: `{name}` has {count!r} values of {total}.")
    content = _exactly(archive, entry["file"], count * size, name) if count else None
    values = torch.empty(count, dtype=like.dtype, device="cpu")
    if content is not None:
        _bytes(values).numpy()[:] = content
    if "nonzeros" not in entry:
        return values.view(like.shape)
    packed = _exactly(archive, f"{entry['file']}.mask", (total + 7) // 8, name)
    nonzero = torch.from_numpy(np.unpackbits(packed, count=total).view(bool))
    if int(nonzero.count_nonzero()) != count:
        raise ValueError(f"`path` is damaged: the mask of `{name}` has another number of values.")
    flat = torch.zeros(total, dtype=like.dtype, device="cpu")
    flat[nonzero] = values
    return flat.view(like.shape)


def _exactly(archive: zipfile.ZipFile, file: str, size: int, name: str) -> np.ndarray:
    if archive.getinfo(file).file_size != size:
        raise ValueError(
            f"`path` is damaged: `{name}` has {archive.getinfo(file).file_size:,} bytes instead of "
            f"{size:,}."
        )
    return np.frombuffer(_content(archive, file, size), dtype=np.uint8)


def _content(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A part of the file, which must be stored uncompressed and have at most `most` bytes."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"`path` must be a file written by save_compressed, with uncompressed parts, but "
            f"{name!r} is compressed by method {entry.compress_type}."
        )
    whole = os.fstat(archive.fp.fileno()).st_size if archive.fp is not None else 0
    if entry.file_size > min(most, whole) or entry.compress_size != entry.file_size:
        raise ValueError(
            f"`path` is damaged: {name!r} has {entry.file_size:,} bytes, of at most "
            f"{min(most, whole):,}."
        )
    return archive.read(name)


def _longest_header(state: Mapping[str, Any]) -> int:
    """The maximum size in bytes of the description of these tensors and of their metadata."""
    return (1 << 20) + sum(4096 + 12 * len(name) for name in state)


def _is_extra(name: str) -> bool:
    """Whether a tensor is a module's extra state, which may have any shape."""
    return name.rpartition(".")[2] == "_extra_state"


def _as_described(entry: dict[str, Any]) -> Tensor:
    """A meta tensor of the dtype and shape that a file describes."""
    dtype = getattr(torch, entry["dtype"])
    sizes = entry["shape"]
    if not isinstance(dtype, torch.dtype) or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"`path` is damaged: its extra state is {str(entry)[:100]}.")
    return torch.empty(sizes, dtype=dtype, device="meta")


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


def _may_be_sparse(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0


def _sparse_bytes(total: int, nonzeros: int, tensor: Tensor) -> int:
    size = tensor.element_size()
    return min(total * size, (total + 7) // 8 + nonzeros * size)


def _raise_not_json(value: Any) -> Any:
    raise TypeError(
        f"`model` must have metadata in its state_dict that JSON can hold, got "
        f"{type(value).__name__}. Use torch.save."
    )


def _check_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"`model` must have a state_dict of tensors only, but `{name}` is a "
            f"{type(tensor).__name__}. Use torch.save."
        )
    plain = type(tensor) in (Tensor, nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(
            f"`model` must have dense tensors with data, but `{name}` is a {type(tensor).__name__} "
            f"of {tensor.dtype}, {tensor.layout}, on {tensor.device}. Use torch.save."
        )
