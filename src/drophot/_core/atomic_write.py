"""Atomic replacement of a file, safe with concurrent writers and killed processes."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed
    fcntl = None

PART_SUFFIX = ".part"
"""Of the names of temporary files."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a temporary file next to `path`, and move it to `path` at the end of the block.

    The temporary file has a unique name and is locked while it is written, so that later writers
    can tell abandoned files of killed processes, which they remove, from those in use. Links are
    followed. The mode is that of the existing file, or else the default of `open`. An error in the
    block leaves the existing file unchanged.
    """
    target = Path(os.path.realpath(path))
    mode: int | None = None
    try:
        found = target.stat()
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(f"`path` must be a file, got the directory {path}.")
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"`path` must be a regular file, got {path}, which is not.")
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "`path` must be a writable file", str(path))
        mode = stat.S_IMODE(found.st_mode)
    part, descriptor = _create_part(target, path)
    try:
        _remove_abandoned(target)
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None and hasattr(os, "fchmod"):
                with suppress(OSError):  # file systems without modes
                    os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
            if fcntl is not None:  # while it is locked
                part.replace(target)
        if fcntl is None:
            part.replace(target)
        _sync_directory(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _create_part(target: Path, path: Path) -> tuple[Path, int]:
    """Create and lock a temporary file next to the target; return its path and descriptor."""
    while True:
        part = target.with_name(f"{_stem(target)}.{secrets.token_hex(8)}{PART_SUFFIX}")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptor = os.open(part, flags, 0o666)
        except FileExistsError:
            continue
        except OSError as error:  # name the requested file instead of the temporary one
            raise type(error)(error.errno, error.strerror, str(path)) from None
        if fcntl is None:
            return part, descriptor
        with suppress(OSError):  # without file locks no writer removes the file, either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(part.stat(), os.fstat(descriptor)):
                return part, descriptor
        os.close(descriptor)  # another writer removed the file before it was locked


def _stem(target: Path) -> str:
    """The file's name, shortened so that a suffix fits."""
    return os.fsdecode(os.fsencode(target.name)[:200])


def _remove_abandoned(target: Path) -> None:
    """Remove temporary files that killed writers of the same file have left."""
    name = re.compile(re.escape(_stem(target)) + r"\.[0-9a-f]{16}" + re.escape(PART_SUFFIX))
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(part: Path) -> None:
    if fcntl is None:
        part.unlink()
        return
    with part.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(part.stat(), os.fstat(file.fileno())):
            part.unlink()


def _sync_directory(folder: Path) -> None:
    """Make the new name durable in case of a power failure."""
    with suppress(OSError):  # not supported on Windows and some file systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
