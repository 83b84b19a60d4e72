"""The folder of a grid: what is in it is whole and checked, whoever writes and whoever is killed.

    STORE/grid.json       the configuration, to read, and to refuse another one
    STORE/records.jsonl   a record in each line, as they come
    STORE/data.pt         the data as tensors, for workers (see `drophot._stages`)
    STORE/stages/         a file for each finished stage

The files in `stages` are what counts; the lines are made from them anew whenever a run starts or
ends. Each begins with the fingerprint of the configuration and the SHA-256 of its name and of what
follows, so that a file that was cut, damaged, swapped or made otherwise is as good as none, and its
stage is computed again.
Files appear by renaming, whole or not at all, so that any number of processes can share a store.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drophot.records import Record, fingerprint, from_line, to_line

# Seconds after which a file that was never renamed belongs to nobody, by the clock of the file
# system itself: that of another machine may be hours off.
_STALE = 24 * 3600


@dataclass(frozen=True, slots=True)
class Store:
    """An opened folder.

    Args:
        folder: Where it is.
        key: The fingerprint of its configuration.
    """

    folder: Path
    key: str

    def save(self, name: str, content: bytes) -> None:
        """Keep what a stage gave.

        Args:
            name: The stage's file.
            content: What to keep.
        """
        write_whole(self.folder / "stages" / name, self._head(name, content) + b"\n" + content)

    def load(self, name: str) -> bytes | None:
        """What a stage gave.

        Args:
            name: The stage's file.

        Returns:
            What was kept, or `None` if it is not there, damaged or of another configuration.
        """
        try:
            head, line_end, content = (self.folder / "stages" / name).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        return content if line_end and head == self._head(name, content) else None

    def append(self, record: Record) -> None:
        """Add a record's line.

        Args:
            record: The record.

        Raises:
            OSError: If there is no room; the record itself is safe in `stages`.
        """
        path = self.folder / "records.jsonl"
        try:
            with path.open("ab", buffering=0) as file:
                file.write(to_line(record).encode() + b"\n")
        except OSError as error:
            raise OSError(*_whole(path, error)) from error

    def tidy(self, order: Mapping[str, int]) -> None:
        """Make the lines anew from the stages, and remove what killed processes left.

        Args:
            order: Where the records of these files come; those of others come last.
        """
        names = [path.name for path in (self.folder / "stages").glob("*.json")]
        lines = []
        for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
            content = self.load(name)
            if content is not None:
                lines.append(to_line(from_line(content.decode())) + "\n")
        write_whole(self.folder / "records.jsonl", "".join(lines).encode())
        now = (self.folder / "records.jsonl").stat().st_mtime
        for path in (*self.folder.glob(".*.tmp"), *(self.folder / "stages").glob(".*.tmp")):
            try:
                if now - path.stat().st_mtime > _STALE:
                    path.unlink()
            except FileNotFoundError:  # another process tidies too
                pass

    def _head(self, name: str, content: bytes) -> bytes:
        found = hashlib.sha256(name.encode() + content).hexdigest()
        return f"drophot {self.key} {found}".encode()


def open_store(
    folder: Path, configuration: Mapping[str, Any], plan: Mapping[str, int] | None
) -> Store:
    """Make a folder a store, or find that it is one of this configuration.

    Args:
        folder: Where it is; made if it is not there.
        configuration: What all of its results depend on.
        plan: What is to be said of the grid beside it, for a report; `None` only looks.

    Returns:
        The store.

    Raises:
        ValueError: If the folder holds other things, or another configuration.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`store` should be a folder. Found the file {folder}; name another one.")
    path, stages = folder / "grid.json", folder / "stages"
    if folder.exists() and not stages.is_dir():
        others = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp"))
        if others:
            raise ValueError(
                f"`store` should be a grid's folder, a new one or an empty one. Found "
                f"{others[0]!r} and no stages in {folder}; name another folder."
            )
    configuration = json.loads(json.dumps(configuration))
    key = fingerprint(configuration)
    if path.exists() and (there := _configuration(path)) is not None and there != configuration:
        name, old, new = _difference(there, configuration)
        raise ValueError(
            f"`store` should be of this grid's configuration. Found another {name} in {folder}: "
            f"{old!r} there, {new!r} here; name another folder or set it as it was."
        )
    if plan is not None:
        stages.mkdir(parents=True, exist_ok=True)  # first: it is what makes a folder a store
        content = {"fingerprint": key, "configuration": configuration, "plan": dict(plan)}
        write_whole(path, json.dumps(content, indent=1).encode())
    return Store(folder, key)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Args:
        path: The file; replaced if it is there.
        content: What is to be in it.

    Raises:
        OSError: If there is no room, or no right to write. What was there is as it was.
    """
    for attempt in range(3):
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            return
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError) and path.parent.is_dir() and attempt < 2:
                continue  # somebody took it for what a killed process left
            if isinstance(error, OSError):
                raise OSError(*_whole(path, error)) from error
            raise


def digest(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of tensors' bytes, shapes and types.

    Args:
        tensors: On any device.

    Returns:
        16 hexadecimal digits of it.
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _whole(path: Path, error: OSError) -> tuple[int | None, str, str]:
    what = f"{error.strerror}; what the store held before is whole: make room and run again"
    return error.errno, what, str(path)


def _configuration(path: Path) -> Any:
    """What a grid.json says, or nothing if it is damaged: the stages know whose they are."""
    try:
        content = json.loads(path.read_bytes())
        whole = content["fingerprint"] == fingerprint(content["configuration"])
    except (ValueError, KeyError, TypeError):
        return None
    return content["configuration"] if whole else None


def _difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any]:
    """The first field that differs, by its path."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(key for key in new if key not in old)):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return f"`{name}`", old, new
