"""Whether a data set gives the same samples each time, as far as that can be known."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from drophot.data.indexing import IndexedDataset
from drophot.data.samples import is_plainly, is_torchvisions, tensors_of

_DATASETS = {
    *("MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST", "USPS"),
    *("CIFAR10", "CIFAR100", "SVHN", "STL10"),
}
_TRANSFORMS = {
    *("ToTensor", "PILToTensor", "ToImage", "ToPILImage", "ToDtype", "ConvertImageDtype"),
    *("Normalize", "Resize", "CenterCrop", "Grayscale", "Pad", "ToPureTensor"),
}
# What makes random numbers that no generator tells of, by the name that code calls it by.
_FRESH = {
    *("default_rng", "RandomState", "Random", "SystemRandom", "urandom", "randbits"),
    *("token_bytes", "uuid4", "time_ns", "perf_counter"),
}
_READS = ("__getitem__", "__getitems__", "__call__", "forward")
_LIBRARIES = {
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "builtins",
    "drophot",
    *sys.stdlib_module_names,
}
_LIBRARIES -= {"__main__"}
_PLAIN = (str, bytes, int, float, complex, type(None), Tensor, np.ndarray, np.generic, range)
_ITEMS = 100  # of a container that are looked at
_THINGS = 20_000  # that are looked at in all


@cache
def _generators() -> tuple[type, ...]:
    # NumPy's are imported when they are first asked for.
    numpy = (np.random.Generator, np.random.RandomState, np.random.BitGenerator)
    return (random.Random, *numpy, torch.Generator)


def is_pure(dataset: Any) -> bool:
    """Whether a data set is known to give the same samples each time.

    Tensors, lists, and torchvision's own data sets with transforms that draw nothing.

    Args:
        dataset: The data set.

    Returns:
        Whether it is known.
    """
    if tensors_of(dataset) is not None or type(dataset) in (list, tuple):
        return True
    if is_plainly(dataset, Subset) or is_plainly(dataset, IndexedDataset):
        return is_pure(dataset.dataset)
    if is_plainly(dataset, ConcatDataset):
        return all(is_pure(part) for part in dataset.datasets)
    if is_torchvisions(dataset, _DATASETS):
        return _draws_nothing(dataset.transform) and _draws_nothing(dataset.target_transform)
    return False


def _draws_nothing(transform: Any) -> bool:
    if transform is None:
        return True
    if is_torchvisions(transform, {"Compose"}, "transforms"):
        return all(map(_draws_nothing, transform.transforms))
    if type(transform) is nn.Sequential:
        return all(map(_draws_nothing, transform))
    return is_torchvisions(transform, _TRANSFORMS, "transforms")


class Own:
    """What a data set, and the code that reads it, has of randomness and change of its own.

    Attributes:
        generators: Those that it holds.
        reason: Why its samples cannot be known to stay the same, if one was seen.
    """

    def __init__(self, dataset: Any) -> None:
        self.generators: list[Any] = []
        self.reason: str | None = None
        for thing in reached(dataset):
            if isinstance(thing, _generators()):
                self.generators.append(thing)
            elif callable(getattr(type(thing), "set_epoch", None)):
                self.reason = f"{type(thing).__name__} has set_epoch"
            elif isinstance(thing, CodeType) and (names := _FRESH.intersection(thing.co_names)):
                self.reason = f"{thing.co_name} calls {min(names)}"
        if any(isinstance(one, random.SystemRandom) for one in self.generators):
            self.reason = "it draws from the system's random numbers"
        self._before = self._state()

    def has_moved(self) -> bool:
        """Whether a generator stands elsewhere than when this was made."""
        return self._state() != self._before

    def _state(self) -> list[bytes]:
        return [_state(one) for one in self.generators]


def _state(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().cpu().numpy().tobytes()
    if isinstance(generator, random.SystemRandom):
        return b""
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return pickle.dumps(generator.get_state(legacy=False))
    bits = getattr(generator, "bit_generator", generator)
    return pickle.dumps(bits.state)


def reached(root: Any) -> Iterator[Any]:
    """The objects that a data set holds, and the code that runs when a sample is read."""
    queue: deque[tuple[Any, type | None]] = deque([(root, None)])
    seen: set[int] = set()
    while queue and len(seen) < _THINGS:
        thing, owner = queue.popleft()
        if isinstance(thing, (*_PLAIN, ModuleType)) or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        queue.extend(parts_of(thing, owner))


def parts_of(thing: Any, owner: type | None) -> list[tuple[Any, type | None]]:
    if isinstance(thing, dict):
        return [(value, None) for value in list(thing.values())[:_ITEMS]]
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return [(item, None) for item, _ in zip(thing, range(_ITEMS), strict=False)]
    if isinstance(thing, partial):
        return [(thing.func, None), (thing.args, None), (thing.keywords, None)]
    if isinstance(thing, MethodType):
        return [(thing.__self__, None), (thing.__func__, type(thing.__self__))]
    if isinstance(thing, FunctionType):
        return _of_function(thing, owner)
    if isinstance(thing, _generators()):
        return []
    if isinstance(thing, type):
        return _methods(thing, ("__init__", *_READS))
    kind = type(thing)
    held = list(getattr(thing, "__dict__", {}).values())
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            with suppress(Exception):  # an empty slot, or one that does more than hold
                held.append(getattr(thing, name))
    return [(value, None) for value in held] + _methods(kind, _READS)


def _of_function(function: FunctionType, owner: type | None) -> list[tuple[Any, type | None]]:
    if is_librarys(function):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    held = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for code in _codes(function.__code__):
        held.append(code)
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType) and not is_librarys(value):
                held += [vars(value)[n] for n in code.co_names if n in vars(value)]
            elif value is not None:
                held.append(value)
    mine = () if owner is None else owner.__mro__  # `super()` names it, and makes none of it
    found: list[tuple[Any, type | None]] = [
        (value, None) for value in held if not any(value is kind for kind in mine)
    ]
    names = tuple(name for code in _codes(function.__code__) for name in code.co_names)
    return found + (_methods(owner, names) if owner is not None else [])


def _methods(kind: type, names: tuple[str, ...]) -> list[tuple[Any, type | None]]:
    """What a class and its bases have by these names, as far as its user wrote them."""
    found: list[tuple[Any, type | None]] = []
    for base in kind.__mro__:
        if is_librarys(base):
            continue
        for name in names:
            value = base.__dict__.get(name)
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            if isinstance(value, property):
                value = value.fget
            if value is not None:
                found.append((value, kind))
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def is_librarys(thing: Any) -> bool:
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] in _LIBRARIES
