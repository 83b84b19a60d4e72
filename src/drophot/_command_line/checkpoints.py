"""Read files of `torch.save` without running code in them, and find states among their entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

State = Mapping[str, Any]


def load(path: Path) -> object:
    """The content of a file of `torch.save`, on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f"There is no file {path}. Name a file or, for a network, module:function."
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder. Name a file in it.") from None
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of torch.save, or holds more than tensors, numbers and "
            f"containers, which is not safe to read. Save the `state_dict` of a network or a "
            f"tracker, not the object."
        ) from error
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or not a file of torch.save ({type(error).__name__}: {error})."
        ) from error


def find(content: object, is_state: Callable[[State], bool], key: str | None, what: str) -> State:
    """The one state in the content of a file, or the one that `key` names.

    Args:
        content: The result of `load`.
        is_state: Whether a mapping is such a state.
        key: The keys that lead to the state, joined by dots; `None` if there is only one.
        what: What is searched, for errors.
    """
    found = dict(_states(content, is_state))
    names = ", ".join(map(repr, found))
    if not found:
        raise ValueError(f"The file holds no {what}.")
    if key is not None:
        if list(found) == [""]:
            raise ValueError(f"The whole file is the {what}. Leave `--key` out, got {key!r}.")
        if key not in found:
            raise ValueError(f"`--key` must be {names}, got {key!r}.")
        return found[key]
    if len(found) > 1:
        raise ValueError(f"The file holds several: {names}. Choose one with --key.")
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
