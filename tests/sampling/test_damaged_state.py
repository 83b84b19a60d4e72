"""States of samplers in which a value is damaged: an error names it, and nothing changes."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sampling_ranks as worker
from torch import Tensor

from drophot import AdaptiveSubset, CrestLoader, FreshSubset, LossSampling, Scored

N, K = worker.N, 16
NAN = float("nan")


def fresh() -> FreshSubset:
    return FreshSubset(N, 0.4)


def by_loss() -> LossSampling:
    return LossSampling(N, 0.4)


def adaptive() -> AdaptiveSubset:
    return AdaptiveSubset(worker.data(), worker.network(), 0.4, Scored("variability"), every=1)


def by_medoids() -> AdaptiveSubset:
    return AdaptiveSubset(worker.data(), worker.network(), 0.4, "k_center", every=1)


def crest() -> CrestLoader:
    return CrestLoader(worker.data(), worker.network(), batch_size=6, subset=0.3)


def used(make: Any) -> Any:
    """An object in the middle of its third epoch."""
    found = make()
    epochs = found.sampler() if isinstance(found, LossSampling) else found
    for _ in range(2):
        list(epochs)
    if isinstance(found, LossSampling):
        found.update(torch.arange(N), torch.arange(N).float())
    list(islice(epochs, 3))
    return found


def changed(state: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of nested dictionaries with another value at a path; a function gets the old value."""
    first, *rest = path
    old = state[first]
    if rest:
        value = changed(old, tuple(rest), value)
    elif callable(value):
        value = value(old.clone() if isinstance(old, Tensor) else old)
    return {**state, first: value}


def put(position: Any, value: Any) -> Any:
    def change(old: Tensor) -> Tensor:
        old[position] = value
        return old

    return change


def frozen(state: Any) -> Any:
    """Nested states as plain values that can be compared."""
    if isinstance(state, dict):
        return {name: frozen(value) for name, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(frozen, state))
    if isinstance(state, Tensor | np.ndarray):
        return str(state.dtype), str(torch.as_tensor(state).tolist())
    return state


COUNTS = [
    (("yielded",), -1),
    (("yielded",), 2.5),
    (("yielded",), True),
    (("yielded",), None),
    (("epoch",), "3"),
    (("epoch",), -1),
    (("epoch",), 0),  # begun, since some samples were yielded
    (("epoch",), NAN),
    (("num_samples",), 40),
    (("num_samples",), torch.ones(3)),
    (("seed",), None),
    (("seed",), False),  # equals 0
    (("num_replicas",), True),  # equals 1
    (("ratio",), NAN),
]
OF_CREST = {
    "selections": (-1, "two", None),
    "checks": (-1, 1.5),
    "check_every": (0, 10_000),
    "steps_since_selection": (-1,),
    "first_norm": (NAN, -1.0, "1"),
    "start_loss": (None, torch.zeros(1), -1.0),
    "batches": (put((0, 0), N), put((0, 0), -1), Tensor.float, lambda b: b[:, 1:], lambda b: b[:0]),
    "weights": (put((0, 0), NAN), put((0, 0), -1.0), lambda w: w[1:], Tensor.long),
    "check_on": (put(0, N), lambda c: c[:0], lambda c: c[None]),
    "origin": (Tensor.long, lambda o: o[None], None),
    "gradient": (lambda g: g[:-1],),
    "curvature": (0.5,),
    "averages": (None, lambda a: a[:1], lambda a: (a[0], a[1][:-1])),
    "generators": (None, lambda g: g[:1], lambda g: ({}, g[1]), lambda g: (g[0], g[1][:9])),
}
DAMAGES = [
    *((make, *count) for make in (fresh, by_loss, adaptive) for count in COUNTS),
    *((make, ("yielded",), K + 1) for make in (fresh, by_loss, adaptive)),
    (by_loss, ("losses",), lambda losses: losses[:-1]),
    (by_loss, ("losses",), [0.0] * N),
    (by_loss, ("losses",), Tensor.long),
    (by_loss, ("weights",), put(0, NAN)),
    (by_loss, ("weights",), put(0, -1.0)),
    (by_loss, ("weights",), lambda weights: weights[:, None]),
    (by_loss, ("order",), put(0, N)),
    (by_loss, ("order",), put(0, -1)),
    (by_loss, ("order",), Tensor.float),
    (by_loss, ("order",), lambda order: order[None]),
    (adaptive, ("indices",), put(-1, N)),
    (adaptive, ("indices",), put(0, -1)),
    (adaptive, ("indices",), lambda indices: indices[:-1]),
    (adaptive, ("indices",), lambda indices: indices[:0]),
    (adaptive, ("indices",), lambda indices: indices.flip(0)),
    (adaptive, ("indices",), lambda indices: put(1, indices[0])(indices)),
    (adaptive, ("indices",), lambda indices: indices[None]),
    (adaptive, ("indices",), Tensor.float),
    (adaptive, ("indices",), Tensor.tolist),
    (adaptive, ("tracker",), None),
    (adaptive, ("tracker",), 3),
    (adaptive, ("tracker", "history"), lambda history: history[:-1]),
    (adaptive, ("tracker", "history"), put(3, 0)),
    (adaptive, ("tracker", "history"), put(3, -1)),
    (adaptive, ("tracker", "means"), put(2, NAN)),
    (adaptive, ("tracker", "statistics"), 5),
    (adaptive, ("tracker", "targets"), Tensor.double),
    (by_medoids, ("tracker",), {}),
    (crest, ("yielded",), -1),
    (crest, ("yielded",), 8),
    (crest, ("selection",), None),
    *((crest, ("selection", name), bad) for name, values in OF_CREST.items() for bad in values),
]


@pytest.fixture(scope="module")
def examples() -> dict[Any, tuple[Any, Any]]:
    """Of each kind an object, and the state of another one."""
    return {
        make: (used(make), used(make).state_dict())
        for make in (fresh, by_loss, adaptive, by_medoids, crest)
    }


@pytest.mark.parametrize(("make", "path", "value"), DAMAGES)
def test_a_damaged_value_is_named_and_nothing_changes(
    make: Any, path: tuple[str, ...], value: Any, examples: dict[Any, tuple[Any, Any]]
) -> None:
    found, state = examples[make]
    before = frozen(found.state_dict())
    name = path[0] if path[0] == "tracker" else path[-1]
    with pytest.raises(ValueError, match=f"`state_dict.*{name}"):
        found.load_state_dict(changed(state, path, value))
    assert frozen(found.state_dict()) == before


@pytest.mark.parametrize("make", [fresh, by_loss, adaptive, by_medoids, crest])
def test_what_is_no_state_is_refused_and_a_state_is_not(
    make: Any, examples: dict[Any, tuple[Any, Any]]
) -> None:
    found, state = examples[make]
    for value in (None, [], 3):
        with pytest.raises(ValueError, match="`state_dict`"):
            found.load_state_dict(value)
    for empty in (make(), used(make)):
        found.load_state_dict(empty.state_dict())
    found.load_state_dict(state)
    assert frozen(found.state_dict()) == frozen(state)


def test_a_damaged_state_of_an_iterator_is_named() -> None:
    sampler = fresh()
    epoch = iter(sampler)
    for state, match in (
        ({"epoch": 0, "yielded": 3}, "epoch.* 0"),
        ({"epoch": 1, "yielded": -3}, "yielded.* -3"),
        ({"epoch": NAN, "yielded": 3}, "epoch.* nan"),
        ({"epoch": 1}, "without yielded"),
    ):
        with pytest.raises(ValueError, match=f"`state_dict.*{match}"):
            epoch.load_state_dict(state)
        assert sampler.epoch == 0
    epoch.load_state_dict({"epoch": 1, "yielded": K + 1})
    with pytest.raises(ValueError, match=f"yielded.* {K}.* {K + 1}"):
        next(epoch)
