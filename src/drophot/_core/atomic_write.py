"""A file that appears whole or not at all, whoever writes beside us and whoever is killed."""

from __future__ import annotations

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
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside the one that is meant, and put it in its place at the end.

    The file beside it has a name that nobody else has, and is locked for as long as it is written,
    so that a writer can tell what killed ones left behind from what others are writing: it removes
    the former. Links are followed; the mode is that of the file that was there, else what `open`
    would give.

    Args:
        path: The file.

    Yields:
        A binary file to write to. An error in the block leaves the old file.

    Raises:
        IsADirectoryError: If there is a folder of that name.
        PermissionError: If the file that is there cannot be written to; like every OSError of the
            file system.
        ValueError: If `path` is no regular file, as a device is none.
    """
    target = Path(os.path.realpath(path))
    mode: int | None = None
    try:
        found = target.stat()
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(f"`path` should be a file. Found the folder {path}.")
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"`path` should be a regular file. Found {path}, which is none.")
        if not os.access(target, os.W_OK):
            raise PermissionError(f"`path` should be writable. Found {path}, which is not.")
        mode = stat.S_IMODE(found.st_mode)
    part, descriptor = _created(target, path)
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
        _settle(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _created(target: Path, path: Path) -> tuple[Path, int]:
    """A new file beside the target, locked; and its descriptor."""
    while True:
        part = target.with_name(f"{_stem(target)}.{secrets.token_hex(8)}.part")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptor = os.open(part, flags, 0o666)
        except FileExistsError:
            continue
        except OSError as error:  # of the file that was asked for, not of one nobody knows
            raise type(error)(error.errno, error.strerror, str(path)) from None
        if fcntl is None:
            return part, descriptor
        with suppress(OSError):  # file systems without locks: then nobody removes it either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(part.stat(), os.fstat(descriptor)):
                return part, descriptor
        os.close(descriptor)  # another writer saw it before it was locked, and removed it


def _stem(target: Path) -> str:
    """As much of a file's name as leaves room for what is added to it."""
    return os.fsdecode(os.fsencode(target.name)[:200])


def _remove_abandoned(target: Path) -> None:
    """Remove what killed writers of the same file left."""
    name = re.compile(re.escape(_stem(target)) + r"\.[0-9a-f]{16}\.part")
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


def _settle(folder: Path) -> None:
    """Make the new name last through a loss of power."""
    with suppress(OSError):  # Windows opens no folders, and some file systems cannot do it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
