"""The folder of a grid: what is in it is whole and checked, whoever writes and whoever is killed.

    STORE/grid.json       the configuration, to read, and to refuse another one
    STORE/records.jsonl   a record in each line, as they come
    STORE/data.pt         the data as tensors, for workers (see `drophot.grid.stages`)
    STORE/stages/         a file for each finished stage

The files in `stages` are what counts; the lines are made from them anew whenever a run starts or
ends. Each begins with the fingerprint of the configuration and the SHA-256 of its name and of what
follows, so that a file that was cut, damaged, swapped or made otherwise is as good as none, and its
stage is computed again.
Files appear by renaming, whole or not at all, so that any number of processes can share a store.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drophot.records import Record, fingerprint, from_line, to_line

_NOTHING = "(nothing)"
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

        Raises:
            ValueError: If there is a folder in its place.
        """
        try:
            content = _read(self.folder / "stages" / name)
        except FileNotFoundError:
            return None
        head, line_end, content = content.partition(b"\n")
        return content if line_end and head == self._head(name, content) else None

    def check_writable(self) -> None:
        """Refuse a folder that cannot be written to, before a stage is computed for it.

        Raises:
            OSError: If it cannot.
        """
        path = self.folder / "stages" / f".{uuid.uuid4().hex}.tmp"
        try:
            path.touch(exist_ok=False)
            path.unlink()
        except OSError as error:
            raise OSError(*_whole(path.parent, error)) from error

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

        Raises:
            OSError: If the disk is full. A medium that is read-only is left as it is.
        """
        names = [path.name for path in (self.folder / "stages").glob("*.json")]
        lines = []
        for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
            content = self.load(name)
            if content is not None:
                lines.append(to_line(from_line(content.decode())) + "\n")
        records = self.folder / "records.jsonl"
        _refresh(records, "".join(lines).encode())
        now = records.stat().st_mtime
        for path in (*self.folder.glob(".*.tmp"), *(self.folder / "stages").glob(".*.tmp")):
            try:
                if now - path.stat().st_mtime > _STALE:
                    path.unlink()
            except OSError as error:  # another process tidies too
                if not isinstance(error, FileNotFoundError) and not _is_read_only(error):
                    raise

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
    there = _configuration(path) if path.exists() else None
    if folder.exists() and not stages.is_dir():
        others = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp"))
        if others and (there is None or stages.exists()):
            raise ValueError(
                f"`store` should be a grid's folder, a new one or an empty one. Found "
                f"{others[0]!r} and no folder stages in {folder}; name another folder."
            )
    configuration = json.loads(json.dumps(configuration))
    key = fingerprint(configuration)
    if there is not None and fingerprint(there) != key:
        raise ValueError(
            f"`store` should be of this grid's configuration. Found another "
            f"{_difference(folder, there, configuration)}; name another folder or set it as it was."
        )
    if plan is not None:
        content = {"fingerprint": key, "configuration": configuration, "plan": dict(plan)}
        if not stages.is_dir():
            stages.mkdir(parents=True)  # first: it is what makes a folder a store
        _refresh(path, json.dumps(content, indent=1).encode())
    return Store(folder, key)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Args:
        path: The file; replaced if it is there.
        content: What is to be in it.

    Raises:
        OSError: If there is no room, or no right to write. What was there is as it was.
        ValueError: If there is a folder in its place.
    """
    if path.is_dir():
        raise ValueError(_folder_instead(path))
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


def _refresh(path: Path, content: bytes) -> None:
    """Write what the stages say too, if that is not there yet and the medium can be written to."""
    try:
        if path.is_file() and path.read_bytes() == content:
            return
        write_whole(path, content)
    except OSError as error:
        if not _is_read_only(error):
            raise


def _is_read_only(error: OSError) -> bool:
    return error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        if path.is_dir():
            raise ValueError(_folder_instead(path)) from None
        raise


def _folder_instead(path: Path) -> str:
    return (
        f"`store` should hold a file {path.name} in {path.parent}. Found a folder of that name; "
        f"remove it, and run again."
    )


def _whole(path: Path, error: OSError) -> tuple[int | None, str, str]:
    what = f"{error.strerror}; what the store held before is whole: make room and run again"
    return error.errno, what, str(path)


def _configuration(path: Path) -> Any:
    """What a grid.json says, or nothing if it is damaged: the stages know whose they are."""
    try:
        content = json.loads(_read(path))
        whole = content["fingerprint"] == fingerprint(content["configuration"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return content["configuration"] if whole else None


def _difference(folder: Path, old: Any, new: Any) -> str:
    """The first thing that differs, in words: one that can be read, if there is any."""
    found = list(_differences(old, new, ()))
    plain = [
        d for d in found if not any(isinstance(value, str) and _digest(value) for value in d[1:])
    ]
    (first, *path), there, here = (plain or found)[0]
    where = f"{'.'.join(path)} " if path else ""
    if not plain:
        return f"`{first}` in {folder}: {where}is not the same here as there"
    return f"`{first}` in {folder}: {where}{_shown(there)} there, {_shown(here)} here"


def _differences(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[tuple[Any, Any, Any]]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 0:
        old, new = ({str(i): v for i, v in enumerate(values)} for values in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(key for key in new if key not in old)):
            yield from _differences(old.get(key, _NOTHING), new.get(key, _NOTHING), (*path, key))
    elif json.dumps(old) != json.dumps(new):
        yield path, old, new


def _digest(value: str) -> re.Match[str] | None:
    return re.fullmatch(r"(.* )?[0-9a-f]{16}", value)


def _shown(value: Any) -> str:
    text = "nothing" if value == _NOTHING else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
