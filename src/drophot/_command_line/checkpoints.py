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


class _Unread:
    """Placeholder for an object that torch refuses to load; its content is dropped."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def load(path: Path) -> object:
    """The content of a file of `torch.save` or safetensors, on the CPU.

    Objects of other classes, such as those among the hyperparameters of Lightning, are `_Unread`.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name a file in it.")
    if not path.exists():
        raise ValueError(f"There is no file {path}. Check the path and the current folder.")
    if _is_safetensors(path):
        return _load_safetensors(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of files that are refused below
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError as refused:
                try:
                    return _load_without_objects(path)
                except Exception:
                    raise refused from None
    except OSError:
        raise
    except Exception as error:
        raise ValueError(_explain(path, error)) from error


def _load_without_objects(path: Path) -> object:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # torch compares names, so that none of the modules is imported.
    with torch.serialization.safe_globals([_stand_in(name) for name in names]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, _Unread):
        raise UnpicklingError(f"{path} holds a single object.")
    return content


def _stand_in(name: str) -> type[_Unread]:
    """A class that torch takes for the one of that name."""
    module, _, name = name.rpartition(".")
    return type(name, (_Unread,), {"__module__": module})


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
    damaged = f"{path} is damaged: torch.load cannot read it. Save or copy it again."
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
        found = "was written by pickle"
        if names is not None:
            try:
                objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            except Exception:  # what it raises depends on the bytes of the pickle
                return damaged
            found = f"holds objects of {', '.join(sorted(objects))}"
        return (
            f"{path} {found}, which is not safe to read, as it could run code. If you trust the "
            f"file, read it in Python with torch.load(..., weights_only=False), and save the "
            f"`state_dict` of the network or the tracker with torch.save."
        )
    if is_pickle or (head == b"PK" and names is None):
        return damaged
    return (
        f"{path} is not a checkpoint. Name a file that torch.save, save_compressed or safetensors "
        f"wrote."
    )


def find(
    path: Path,
    is_state: Callable[[State], bool],
    key: str | None,
    what: str,
    is_preferred: Callable[[State], bool] = lambda _: True,
) -> State:
    """The one state in a file, or the one that `key` names.

    Args:
        path: The file.
        is_state: Whether a mapping is such a state.
        key: The keys that lead to the state, joined by dots; `None` if there is only one.
        what: What is searched, for errors.
        is_preferred: Whether a state counts, if there are several and `key` does not say.
    """
    content = load(path)
    found = dict(_states(content, is_state))
    names = ", ".join(map(repr, found))
    if not found:
        unread = ", ".join(dict.fromkeys(_unread(content)))
        reason = (
            f" Objects of {unread} were not read, because that could run code. Save the "
            f"`state_dict` separately with torch.save."
        )
        raise ValueError(
            f"{path} holds no {what}.{reason if unread else ' Name a file that does.'}"
        )
    if key is not None:
        if list(found) == [""]:
            raise ValueError(f"The whole file is the {what}. Leave `--key` out, got {key!r}.")
        if key not in found:
            raise ValueError(f"`--key` must be {names}, got {key!r}.")
        return found[key]
    preferred = {name: state for name, state in found.items() if is_preferred(state)} or found
    if len(preferred) > 1:
        names = ", ".join(map(repr, preferred))
        raise ValueError(f"{path} holds several: {names}. Choose one with --key.")
    return next(iter(preferred.values()))


def _states(
    content: object, is_state: Callable[[State], bool], name: str = ""
) -> Iterator[tuple[str, State]]:
    # The entries of an optimizer's state have numbers as keys, and are not searched.
    entries = _entries(content)
    is_whole = isinstance(content, Mapping) and len(entries) == len(content) > 0
    if is_whole and is_state(entries):
        yield name, entries
        return
    for key, value in entries.items():
        yield from _states(value, is_state, f"{name}.{key}" if name else key)


def _entries(content: object) -> dict[str, object]:
    """The entries of a mapping whose keys are strings, or of a list by their numbers."""
    if isinstance(content, Mapping):
        return {key: value for key, value in content.items() if isinstance(key, str)}
    if isinstance(content, (list, tuple)):  # which may be long lists of numbers
        kinds = (Mapping, list, tuple, _Unread)
        return {str(n): value for n, value in enumerate(content) if isinstance(value, kinds)}
    return {}


def _unread(content: object) -> Iterator[str]:
    """The classes of the objects that were not read."""
    kind = content if isinstance(content, type) else type(content)
    if issubclass(kind, _Unread):
        yield f"{kind.__module__}.{kind.__qualname__}"
    for value in _entries(content).values():
        yield from _unread(value)
