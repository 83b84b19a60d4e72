"""Whether a dataset gives the same samples each time, as far as this can be determined."""

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
from drophot.data.samples import is_from_torchvision, is_plainly, tensors_of

_DATASETS = {
    *("MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST", "USPS"),
    *("CIFAR10", "CIFAR100", "SVHN", "STL10"),
}
_TRANSFORMS = {
    *("ToTensor", "PILToTensor", "ToImage", "ToPILImage", "ToDtype", "ConvertImageDtype"),
    *("Normalize", "Resize", "CenterCrop", "Grayscale", "Pad", "ToPureTensor"),
}
# Functions whose random numbers come from no generator that can be compared, by name.
_UNTRACEABLE = {
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
_MAX_ITEMS = 100  # examined per container
_MAX_OBJECTS = 20_000  # examined in total


@cache
def _generators() -> tuple[type, ...]:
    # NumPy imports its generators when they are first used.
    numpy = (np.random.Generator, np.random.RandomState, np.random.BitGenerator)
    return (random.Random, *numpy, torch.Generator)


def is_pure(dataset: Any) -> bool:
    """Whether a dataset is known to give the same samples each time.

    These are tensors, lists, and datasets of torchvision with deterministic transforms.
    """
    if tensors_of(dataset) is not None or type(dataset) in (list, tuple):
        return True
    if is_plainly(dataset, Subset) or is_plainly(dataset, IndexedDataset):
        return is_pure(dataset.dataset)
    if is_plainly(dataset, ConcatDataset):
        return all(is_pure(part) for part in dataset.datasets)
    if is_from_torchvision(dataset, _DATASETS):
        return _is_deterministic(dataset.transform) and _is_deterministic(dataset.target_transform)
    return False


def _is_deterministic(transform: Any) -> bool:
    if transform is None:
        return True
    if is_from_torchvision(transform, {"Compose"}, "transforms"):
        return all(map(_is_deterministic, transform.transforms))
    if type(transform) is nn.Sequential:
        return all(map(_is_deterministic, transform))
    return is_from_torchvision(transform, _TRANSFORMS, "transforms")


class OwnRandomness:
    """The randomness of a dataset and of the code that reads it, apart from global generators.

    Attributes:
        generators: The generators that they hold.
        reason: Why the samples may change, if such a reason was found.
    """

    def __init__(self, dataset: Any) -> None:
        self.generators: list[Any] = []
        self.reason: str | None = None
        for thing in reached(dataset):
            if isinstance(thing, _generators()):
                self.generators.append(thing)
            elif callable(getattr(type(thing), "set_epoch", None)):
                self.reason = f"{type(thing).__name__} has set_epoch"
            elif isinstance(thing, CodeType) and (
                names := _UNTRACEABLE.intersection(thing.co_names)
            ):
                self.reason = f"{thing.co_name} calls {min(names)}"
        if any(isinstance(one, random.SystemRandom) for one in self.generators):
            self.reason = "it draws from the system's random numbers"
        self._before = self._state()

    def has_moved(self) -> bool:
        """Whether the state of a generator has changed since this object was created."""
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
    """The objects that a dataset holds, and the code that runs when a sample is read."""
    queue: deque[tuple[Any, type | None]] = deque([(root, None)])
    seen: set[int] = set()
    while queue and len(seen) < _MAX_OBJECTS:
        thing, owner = queue.popleft()
        if isinstance(thing, (*_PLAIN, ModuleType)) or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        queue.extend(parts_of(thing, owner))


def parts_of(thing: Any, owner: type | None) -> list[tuple[Any, type | None]]:
    if isinstance(thing, dict):
        return [(value, None) for value in list(thing.values())[:_MAX_ITEMS]]
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return [(item, None) for item, _ in zip(thing, range(_MAX_ITEMS), strict=False)]
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
            with suppress(Exception):  # an empty slot, or a descriptor that fails
                held.append(getattr(thing, name))
    return [(value, None) for value in held] + _methods(kind, _READS)


def _of_function(function: FunctionType, owner: type | None) -> list[tuple[Any, type | None]]:
    if is_from_library(function):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    held = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for code in _codes(function.__code__):
        held.append(code)
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType) and not is_from_library(value):
                held += [vars(value)[n] for n in code.co_names if n in vars(value)]
            elif value is not None:
                held.append(value)
    mine = () if owner is None else owner.__mro__  # `super()` refers to the class itself
    found: list[tuple[Any, type | None]] = [
        (value, None) for value in held if not any(value is kind for kind in mine)
    ]
    names = tuple(name for code in _codes(function.__code__) for name in code.co_names)
    return found + (_methods(owner, names) if owner is not None else [])


def _methods(kind: type, names: tuple[str, ...]) -> list[tuple[Any, type | None]]:
    """The attributes of these names that user code defines in a class and its bases."""
    found: list[tuple[Any, type | None]] = []
    for base in kind.__mro__:
        if is_from_library(base):
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


def is_from_library(thing: Any) -> bool:
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] in _LIBRARIES
