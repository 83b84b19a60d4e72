"""The folder of a grid, whose files stay complete and checked even if processes are killed.

    STORE/grid.json       the configuration, to read and to compare
    STORE/records.jsonl   a record in each line, in the order in which they were computed
    STORE/data.pt         the data as tensors, for workers (see `drophot.grid.worker_data`)
    STORE/stages/         a file for each finished stage

The files in `stages` hold the results; `records.jsonl` is rebuilt from them when a run starts and
when it ends. Each file begins with the fingerprint of the configuration and the SHA-256 of its name
and content. A file that is incomplete, damaged, swapped or of another configuration therefore does
not count, and its stage is computed again. Files are created by renaming, so any number of
processes can share a store.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

from drophot._core.atomic_write import PART_SUFFIX, atomic_write
from drophot._core.json_values import Json
from drophot.grid.stages import Stage, to_compute
from drophot.records.json_lines import from_line, to_line
from drophot.records.record import Record, fingerprint

_NOTHING = "(nothing)"
# The age in seconds at which a file that was never renamed counts as abandoned, by the clock of the
# file system: the clock of this machine may differ from it by hours.
_STALE = 24 * 3600


@dataclass(frozen=True, slots=True)
class Store:
    """An opened folder."""

    folder: Path
    key: str
    """The fingerprint of its configuration."""

    def save(self, name: str, content: bytes) -> None:
        """Store the result of a stage under its name."""
        write_file(self.folder / "stages" / name, self._head(name, content) + b"\n" + content)

    def load(self, name: str) -> bytes | None:
        """The result of a stage, or `None` if it is missing, damaged or of another configuration.

        Raises:
            ValueError: If there is a folder of that name.
        """
        try:
            content = _read(self.folder / "stages" / name)
        except FileNotFoundError:
            return None
        head, line_end, content = content.partition(b"\n")
        return content if line_end and head == self._head(name, content) else None

    def missing(self, last: Iterable[Stage]) -> dict[Stage, Stage | None]:
        """The stages to compute for some runs: see `to_compute`."""
        return to_compute(last, lambda stage: self.load(stage.name) is not None)

    def check_writable(self) -> None:
        """Raise an `OSError` if the folder cannot be written to, before a stage is computed."""
        path = self.folder / "stages" / f"{uuid.uuid4().hex}{PART_SUFFIX}"
        try:
            try:
                path.touch(exist_ok=False)
            finally:  # also after Ctrl-C
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(*_still_intact(path.parent, error)) from error

    def append(self, record: Record) -> None:
        """Append a line to `records.jsonl`.

        Raises:
            OSError: If the disk is full. The record is already in `stages`.
        """
        path = self.folder / "records.jsonl"
        try:
            with path.open("ab", buffering=0) as file:
                file.write(to_line(record).encode() + b"\n")
        except OSError as error:
            raise OSError(*_still_intact(path, error)) from error

    def tidy(self, order: Mapping[str, int]) -> None:
        """Rebuild `records.jsonl` from the stages, and remove the files of killed processes.

        Args:
            order: The positions of the records by the names of their stages. Others come last.

        Raises:
            OSError: If the disk is full. A read-only medium is left unchanged.
        """
        names = [path.name for path in (self.folder / "stages").glob("*.json")]
        lines = list[str]()
        for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
            content = self.load(name)
            if content is not None:
                lines.append(to_line(from_line(content.decode())) + "\n")
        records = self.folder / "records.jsonl"
        _refresh(records, "".join(lines).encode())
        now = records.stat().st_mtime
        parts = f"*{PART_SUFFIX}"
        for path in (*self.folder.glob(parts), *(self.folder / "stages").glob(parts)):
            try:
                if now - path.stat().st_mtime > _STALE:
                    path.unlink()
            except OSError as error:  # another process may do the same
                if not isinstance(error, FileNotFoundError) and not _is_read_only(error):
                    raise

    def _head(self, name: str, content: bytes) -> bytes:
        found = hashlib.sha256(name.encode() + content).hexdigest()
        return f"drophot {self.key} {found}".encode()


def open_store(
    folder: Path,
    configuration: Mapping[str, Json],
    plan: Mapping[str, int] | None,
    modes: Mapping[str, Json] = MappingProxyType({}),
) -> Store:
    """Make a folder a store, or check that it is a store of this configuration.

    Args:
        folder: The folder, which is created if it does not exist.
        configuration: The settings and data that all results of the store depend on.
        plan: The extent of the grid, which reports read from the folder; `None` writes nothing.
        modes: The user's own objects by name, of which none may have changed: modes, scores and
            importances.

    Raises:
        ValueError: If the folder holds other files, or results of another configuration or mode.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`store` must be a folder, got the file {folder}. Name another folder.")
    path, stages = folder / "grid.json", folder / "stages"
    saved = _read_grid(path) if path.exists() else None
    if folder.exists() and not stages.is_dir():
        others = sorted(p.name for p in folder.iterdir() if not p.name.endswith(PART_SUFFIX))
        if others and (saved is None or stages.exists()):
            raise ValueError(
                f"`store` must be the folder of a grid, or a new or empty one, got {folder}, which "
                f"holds {others[0]!r} and no folder stages. Name another folder."
            )
    configuration, modes = json.loads(json.dumps([dict(configuration), dict(modes)]))
    key = fingerprint(configuration)
    if saved is not None:
        same = {name: mode for name, mode in saved.modes.items() if name in modes}
        there = saved.configuration.copy()
        here = dict(configuration)
        for kind in ("modes", "importance"):
            names = [
                name for name in same if name.startswith("importance ") == (kind == "importance")
            ]
            if names:
                there[kind], here[kind] = ({n: own[n] for n in names} for own in (same, modes))
        if fingerprint(there) != fingerprint(here):
            raise ValueError(
                f"`store` must be of the configuration of this grid, got another "
                f"{_difference(folder, there, here)}. Name another folder, or restore the value."
            )
        modes = {**saved.modes, **modes}
    if plan is not None:
        content = {"fingerprint": key, "configuration": configuration, "plan": dict(plan)}
        content |= {"modes": modes} if modes else {}
        if not stages.is_dir():
            stages.mkdir(parents=True)  # first, because it makes a folder a store
        _refresh(path, json.dumps(content, indent=1).encode())
    return Store(folder, key)


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a store atomically: it appears complete or not at all.

    Raises:
        OSError: If the disk is full or the file is not writable. An existing file is unchanged.
        ValueError: If there is a folder of that name.
    """
    if path.is_dir():
        raise ValueError(_folder_instead(path))
    for attempt in range(3):
        try:
            with atomic_write(path) as file:
                file.write(content)
            return
        except OSError as error:
            if isinstance(error, FileNotFoundError) and path.parent.is_dir() and attempt < 2:
                continue  # another process removed the temporary file as abandoned
            raise OSError(*_still_intact(path, error)) from error


def _refresh(path: Path, content: bytes) -> None:
    """Write a file that can be rebuilt, unless it is up to date or the medium is read-only."""
    try:
        if path.is_file() and path.read_bytes() == content:
            return
        write_file(path, content)
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
        f"`store` must hold a file {path.name}, but {path.parent} has a folder of that name. "
        f"Remove it, and run again."
    )


def _still_intact(path: Path, error: OSError) -> tuple[int | None, str, str]:
    what = f"{error.strerror}. The results in the store are intact; free some space and run again"
    return error.errno, what, str(path)


@dataclass(frozen=True, slots=True)
class _Grid:
    """The content of a grid.json."""

    configuration: dict[str, Json]
    modes: dict[str, Json]


def _read_grid(path: Path) -> _Grid | None:
    """A grid.json, or `None` if it is damaged; the stages know their configuration too."""
    try:
        content = json.loads(_read(path))
        configuration, modes = content["configuration"], content.get("modes", {})
        is_whole = content["fingerprint"] == fingerprint(configuration) and isinstance(modes, dict)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return _Grid(configuration, cast("dict[str, Json]", modes)) if is_whole else None


def _difference(folder: Path, old: Json, new: Json) -> str:
    """The first difference in words, preferably one that is readable."""
    found = list(_differences(old, new, ()))
    plain = [
        d for d in found if not any(isinstance(value, str) and _digest(value) for value in d[1:])
    ]
    (first, *path), there, here = (plain or found)[0]
    where = f"{'.'.join(path)} " if path else ""
    if not plain:
        return f"`{first}` in {folder}: {where}is not the same here as there"
    return f"`{first}` in {folder}: {where}{_shown(there)} there, {_shown(here)} here"


def _differences(
    old: Json, new: Json, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Json, Json]]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 0:
        old, new = ({str(i): v for i, v in enumerate(values)} for values in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(key for key in new if key not in old)):
            yield from _differences(old.get(key, _NOTHING), new.get(key, _NOTHING), (*path, key))
    elif json.dumps(old) != json.dumps(new):
        yield path, old, new


def _digest(value: str) -> re.Match[str] | None:
    return re.fullmatch(r"(.* )?[0-9a-f]{16}", value)


def _shown(value: Json) -> str:
    text = "nothing" if value == _NOTHING else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
