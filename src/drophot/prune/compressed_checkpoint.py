"""Checkpoints of sparse networks: a bit for each weight, and the values that are not zero."""

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
_NO_NOTE = {"version": 1}

# What reading a file that is not one of these, or no longer, can end in.
_DAMAGE = (
    *(zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, EOFError, struct.error),
    *(OSError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError),
)


def compressed_bytes(tensor: Tensor) -> int:
    """What a tensor takes in a compressed file: bit mask and values, or all of it if that is less.

    Args:
        tensor: Any dense tensor.

    Returns:
        Bytes.
    """
    if not _may_be_sparse(tensor):
        return tensor.numel() * tensor.element_size()
    return _sparse_bytes(tensor.numel(), int(tensor.detach().count_nonzero()), tensor)


def save_compressed(model: nn.Module, path: Path | str) -> None:
    """Write a model's `state_dict` with one bit for each weight and the values that are not zero.

    At a sparsity of 80 % a file of 32-bit weights takes 0.2 + 1/32 = 0.231 of the dense one.
    Tensors that would not be smaller are written whole, and tensors that share their memory once.
    The file is a plain zip archive of raw bytes and a description in JSON: nothing in it can run
    when it is read. It appears whole or not at all, also where several threads or processes save to
    one path; the last one wins. A process that is killed may leave a file `NAME.….part` in the same
    folder, which the next call removes.

    Args:
        model: Pruned, on any device.
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
        header = json.dumps(described, default=_refuse).encode()
        if len(header) > _longest_header(state):
            raise ValueError(
                f"`model` should note less in its state's metadata. Found a description of "
                f"{len(header):,} bytes, of at most {_longest_header(state):,}; save it with "
                f"torch.save."
            )
        archive.writestr(_HEADER, header)


def load_compressed(model: nn.Module, path: Path | str) -> None:
    """Load what `save_compressed` wrote into a model of the same architecture, in place.

    The tensors are read and checked, then given to `model.load_state_dict`, so that hooks and
    modules that load in their own way work as usual. Every tensor is equal to the one that was
    saved, except that negative zeros become positive. Files from untrusted sources are safe to
    load: how much is read is bounded by the model and by the size of the file.

    Args:
        model: On any device.
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
            f"`model` should know the shapes of its tensors. Found `{lazy[0]}` of a lazy module: "
            f"run one batch through the model first."
        )
    if empty := [name for name, tensor in state.items() if getattr(tensor, "is_meta", False)]:
        raise ValueError(
            f"`model` should have memory for its tensors. Found `{empty[0]}` on meta; call "
            f"model.to_empty(device=...) first."
        )
    for name, tensor in state.items():
        _check_dense(name, tensor)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        repeated = zip(tensor.shape, tensor.stride(), strict=True)
        if name in state and any(size > 1 and not step for size, step in repeated):
            raise ValueError(
                f"`model` should not have expanded tensors. Found `{name}` expanded to "
                f"{tuple(tensor.shape)}; replace it by a clone."
            )
    with path.open("rb") as file:
        try:
            found = _read(file, state)
        except _DAMAGE as error:
            raise ValueError(
                f"`path` should be a file that save_compressed wrote. Found {path}, which is "
                f"damaged or something else ({type(error).__name__}: {error})."
            ) from error
    try:
        model.load_state_dict(found)
    except Exception as error:
        error.add_note(f"load_compressed: the model may be loaded in part from {path}.")
        raise


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`path` should be a path. Found a {type(path).__name__}; the model comes first, then "
            f"the path."
        )
    return Path(path)


def _metadata(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What modules note of their part of a state, by path: versions above the first, most often."""
    notes = getattr(state, "_metadata", {})
    return {path: dict(note) for path, note in notes.items() if note != _NO_NOTE}


def _write(archive: zipfile.ZipFile, number: str, tensor: Tensor) -> dict[str, Any]:
    flat = tensor.cpu().contiguous().reshape(-1)
    entry: dict[str, Any] = {
        "file": number,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    if _may_be_sparse(flat):
        kept = flat != 0
        count = int(kept.count_nonzero())
        if _sparse_bytes(flat.numel(), count, flat) < flat.numel() * flat.element_size():
            entry["nonzeros"] = count
            archive.writestr(f"{number}.mask", np.packbits(kept.numpy()).tobytes())
            flat = flat[kept]
    archive.writestr(number, _bytes(flat).numpy().tobytes() if flat.numel() else b"")
    return entry


def _read(file: BinaryIO, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of the same tensors and notes as the one that was written."""
    with zipfile.ZipFile(file) as archive:
        header = json.loads(_content(archive, _HEADER, _longest_header(state)))
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"`path` should be a file of the format {_FORMAT!r}. Found "
                f"{str(header.get('format'))[:50]!r}; it may be of a later drophot."
            )
        entries = header["tensors"]
        if strange := sorted(entries.keys() ^ state.keys()):
            raise ValueError(_other_names(strange, entries.keys(), state.keys()))
        found: OrderedDict[str, Tensor] = OrderedDict()
        found._metadata = _noted(header, state)  # type: ignore[attr-defined]
        for name, entry in entries.items():
            source = entry.get("same as", name)
            own = entries[source]
            mine = state[name]
            if _is_extra(name) and _is_extra(source):
                mine = _as_described(own)
            dtype = str(mine.dtype).removeprefix("torch.")
            if own["dtype"] != dtype or own["shape"] != list(mine.shape):
                raise ValueError(
                    f"`model` should have `{name}` as the file does, {own['dtype']} "
                    f"{tuple(own['shape'])}. Found {dtype} {tuple(mine.shape)}"
                    + (
                        f": call model.to(torch.{own['dtype']}) first, and convert it afterwards."
                        if own["shape"] == list(mine.shape)
                        else "; the file is of another model."
                    )
                )
            if source not in found:
                like = mine if _is_extra(source) else state[source]
                found[source] = _tensor(archive, own, like, source)
            found[name] = found[source]
    return found


def _other_names(strange: list[str], there: Iterable[str], here: Iterable[str]) -> str:
    """What to tell a user whose file and model have tensors of other names."""
    more = f" and {len(strange) - 20:,} more" if len(strange) > 20 else ""
    cure = "; it is of another model."
    if sorted(map(without_wrappers, there)) == sorted(map(without_wrappers, here)):
        cure = (
            ": a wrapper such as DistributedDataParallel or torch.compile adds `module.` or "
            "`_orig_mod.` to the names of one of them. Save and load the module inside it."
        )
    return (
        f"`model` should have the tensors of the file. Found a difference in "
        f"{[name[:100] for name in strange[:20]]}{more}{cure}"
    )


def _noted(header: dict[str, Any], state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the modules noted when the file was written, by which they know how to read it."""
    own = {path: dict(note) for path, note in getattr(state, "_metadata", {}).items()}
    if "metadata" not in header:  # written before that was
        return own
    notes = header["metadata"]
    if not all(isinstance(note, dict) for note in notes.values()):
        raise ValueError(f"`path` should be whole. Found {notes!r} for what modules noted.")
    return {path: dict(notes.get(path, _NO_NOTE)) for path in own}


def _tensor(archive: zipfile.ZipFile, entry: dict[str, Any], like: Tensor, name: str) -> Tensor:
    # The model says how much there is to read, or the size of the file: not what the file says.
    total, size = like.numel(), like.element_size()
    count = entry.get("nonzeros", total)
    if not isinstance(count, int) or not 0 <= count <= total:
        raise ValueError(f"`path` should be whole. Found {count!r} values of {total} in `{name}`.")
    content = _exactly(archive, entry["file"], count * size, name) if count else None
    values = torch.empty(count, dtype=like.dtype, device="cpu")
    if content is not None:
        _bytes(values).numpy()[:] = content
    if "nonzeros" not in entry:
        return values.view(like.shape)
    packed = _exactly(archive, f"{entry['file']}.mask", (total + 7) // 8, name)
    kept = torch.from_numpy(np.unpackbits(packed, count=total).view(bool))
    if int(kept.count_nonzero()) != count:
        raise ValueError(f"`path` should be whole. Found another number of values in `{name}`.")
    flat = torch.zeros(total, dtype=like.dtype, device="cpu")
    flat[kept] = values
    return flat.view(like.shape)


def _exactly(archive: zipfile.ZipFile, file: str, size: int, name: str) -> np.ndarray:
    if archive.getinfo(file).file_size != size:
        raise ValueError(
            f"`path` should be whole. Found {archive.getinfo(file).file_size:,} bytes of "
            f"{size:,} for `{name}`."
        )
    return np.frombuffer(_content(archive, file, size), dtype=np.uint8)


def _content(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A part of the file, if it is stored as it is and no larger than it may be."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"`path` should be a file of save_compressed, with its parts stored as they are. Found "
            f"{name!r} compressed by method {entry.compress_type}; it is of something else."
        )
    whole = os.fstat(archive.fp.fileno()).st_size if archive.fp is not None else 0
    if entry.file_size > min(most, whole) or entry.compress_size != entry.file_size:
        raise ValueError(
            f"`path` should be whole. Found {entry.file_size:,} bytes for {name!r}, of at most "
            f"{min(most, whole):,}."
        )
    return archive.read(name)


def _longest_header(state: Mapping[str, Any]) -> int:
    """How many bytes a description of these tensors may have: some for each, and for notes."""
    return (1 << 20) + sum(4096 + 12 * len(name) for name in state)


def _is_extra(name: str) -> bool:
    """Whether a tensor is a module's extra state, which may have any shape."""
    return name.rpartition(".")[2] == "_extra_state"


def _as_described(entry: dict[str, Any]) -> Tensor:
    """A tensor without memory, of the dtype and the shape that a file describes."""
    dtype = getattr(torch, entry["dtype"])
    sizes = entry["shape"]
    if not isinstance(dtype, torch.dtype) or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"`path` should be whole. Found {str(entry)[:100]} for extra state.")
    return torch.empty(sizes, dtype=dtype, device="meta")


def _bytes(flat: Tensor) -> Tensor:
    """The bytes of a tensor of one dimension, whatever its dtype."""
    return flat.view(torch.uint8)


def _may_be_sparse(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0


def _sparse_bytes(total: int, nonzeros: int, tensor: Tensor) -> int:
    size = tensor.element_size()
    return min(total * size, (total + 7) // 8 + nonzeros * size)


def _refuse(note: Any) -> Any:
    raise TypeError(
        f"`model` should note in its state's metadata what JSON can hold. Found a "
        f"{type(note).__name__}; save it with torch.save."
    )


def _check_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"`model` should have a state of tensors only. Found `{name}`, a "
            f"{type(tensor).__name__}; save it with torch.save."
        )
    plain = type(tensor) in (Tensor, nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(
            f"`model` should have dense tensors with data. Found `{name}`, a "
            f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout}, on {tensor.device}; "
            f"save it with torch.save."
        )
