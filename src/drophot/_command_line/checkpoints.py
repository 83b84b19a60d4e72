"""Read checkpoints without running code in them, and find states among their entries."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

State = Mapping[str, Any]
_MAX_DESCRIPTION = 100_000_000  # bytes, which safetensors allows


def load(path: Path) -> object:
    """The content of a file of `torch.save` or safetensors, on the CPU."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name a file in it.")
    if not path.exists():
        raise ValueError(f"There is no file {path}. Check the path and the current folder.")
    if _is_safetensors(path):
        return _load_safetensors(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of files that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(_explain(path, error)) from error


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like one of safetensors: the length of a description in JSON.

    The description may be longer than the file, which is then truncated.
    """
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_DESCRIPTION


def _load_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(
            f"{path} is a file of safetensors, which is not installed. Install it with "
            f"`pip install safetensors`, or pass module:function, which builds the network."
        ) from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: safetensors cannot read it ({error}).") from error


def _explain(path: Path, error: Exception) -> str:
    """Why `torch.load` refused a file, from its first bytes and the names in its archive."""
    with path.open("rb") as file:
        head = file.read(2)
    if not head:
        return f"{path} is empty. Save or copy it again."
    names = None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    if any("/code/" in name or name.endswith("/archive_format") for name in names or ()):
        return (
            f"{path} holds a program of torch.jit or torch.export. Save the `state_dict` of the "
            f"network with torch.save."
        )
    is_pickle = any(name.endswith("/data.pkl") for name in names or ()) or head[0] == 0x80
    if is_pickle and isinstance(error, UnpicklingError):
        return (
            f"{path} holds a Python object or was written by pickle, which is not safe to read. "
            f"Save the `state_dict` of the network or the tracker with torch.save."
        )
    if is_pickle or (head == b"PK" and names is None):
        return f"{path} is damaged: torch.load cannot read it. Save or copy it again."
    return (
        f"{path} is not a checkpoint. Name a file that torch.save, save_compressed or safetensors "
        f"wrote."
    )


def find(path: Path, is_state: Callable[[State], bool], key: str | None, what: str) -> State:
    """The one state in a file, or the one that `key` names.

    Args:
        path: The file.
        is_state: Whether a mapping is such a state.
        key: The keys that lead to the state, joined by dots; `None` if there is only one.
        what: What is searched, for errors.
    """
    found = dict(_states(load(path), is_state))
    names = ", ".join(map(repr, found))
    if not found:
        raise ValueError(f"{path} holds no {what}. Name a file that does.")
    if key is not None:
        if list(found) == [""]:
            raise ValueError(f"The whole file is the {what}. Leave `--key` out, got {key!r}.")
        if key not in found:
            raise ValueError(f"`--key` must be {names}, got {key!r}.")
        return found[key]
    if len(found) > 1:
        raise ValueError(f"{path} holds several: {names}. Choose one with --key.")
    return next(iter(found.values()))


def _states(
    content: object, is_state: Callable[[State], bool], name: str = ""
) -> Iterator[tuple[str, State]]:
    if not isinstance(content, Mapping):
        return
    entries = {key: value for key, value in content.items() if isinstance(key, str)}
    if entries and len(entries) == len(content) and is_state(content):
        yield name, content
        return
    for key, value in entries.items():  # the entries of an optimizer's state have numbers as keys
        yield from _states(value, is_state, f"{name}.{key}" if name else key)
