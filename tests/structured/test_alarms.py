"""A user's time limit stops pruning at any moment, and the model is unchanged."""

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import drophot
from drophot.structured import prune_channels

SOURCE = str(Path(drophot.__file__).parent)
SIGNAL = signal.SIGTERM  # any that Python can handle everywhere
INPUTS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class LimitError(Exception):
    """The error of the user's alarm."""


def ring(kind: type[Exception], *_: Any) -> None:
    raise kind("time is up")


class Handler:
    def __call__(self, *_: Any) -> None:
        raise LimitError("time is up")

    def method(self, *_: Any) -> None:
        self()


@pytest.fixture
def handle() -> Iterator[Callable[[Any], object]]:
    before = signal.getsignal(SIGNAL)
    yield partial(signal.signal, SIGNAL)
    signal.signal(SIGNAL, before)


class Rolled(nn.Module):
    """An operator without a rule, which is tried, and one that keeps its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 8)
        self.norm, self.three = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cummax(self.one(x), 0).values).flatten(1)
        return self.three(self.two(x).relu() + x)


def at_call(number: int, counted: Counter[str]) -> Callable[[FrameType, str, Any], None]:
    """Raise the signal at the n-th call of a function of drophot."""

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if frame.f_code.co_flags & CO_GENERATOR:
            return  # Python ignores what a generator raises that is thrown away
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            counted["calls"] += 1
            if counted["calls"] == number:
                signal.raise_signal(SIGNAL)

    return watch


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LimitError, TimeoutError, RuntimeError, ValueError])
def test_an_alarm_at_any_moment_comes_out_as_it_is(
    handle: Callable[[Any], object], kind: type[Exception]
) -> None:
    handle(partial(ring, kind))
    counted: Counter[str] = Counter()

    def stopped(number: int) -> BaseException | None:
        counted.clear()
        torch.manual_seed(0)
        model = Rolled()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        sys.setprofile(at_call(number, counted))
        try:
            prune_channels(model, 0.5, INPUTS)
        except Exception as error:
            found = error
        else:
            found = None
        finally:
            sys.setprofile(None)
        after = model.state_dict()
        same = [
            after[n].shape == t.shape and bool((after[n] == t).all()) for n, t in before.items()
        ]
        assert all(same) == (found is not None), number
        return found

    stopped(0)  # fills the caches of functions, so that later runs have equally many calls
    assert stopped(0) is None
    total = counted["calls"]
    assert total > 1000
    for number in (*range(1, total, total // 40), total - 3):
        found = stopped(number)
        assert type(found) is kind, (number, found)
        assert str(found) == "time is up"


@pytest.mark.parametrize(
    "handler",
    [Handler(), Handler().method, partial(ring, LimitError)],
    ids=["object", "method", "partial"],
)
def test_whatever_the_handler_is(handle: Callable[[Any], object], handler: Any) -> None:
    """An alarm in the network's own code, where other errors mean that channels are kept."""
    handle(handler)

    class Rings(Rolled):
        def forward(self, x: Tensor) -> Tensor:
            if self.one.out_features < 8:
                signal.raise_signal(SIGNAL)
            return super().forward(x)

    with pytest.raises(LimitError, match="time is up"):
        prune_channels(Rings(), 0.5, INPUTS)


def test_an_error_of_the_networks_own_is_none(handle: Callable[[Any], object]) -> None:
    handle(Handler())

    class Refuses(Rolled):
        def forward(self, x: Tensor) -> Tensor:
            if self.one.out_features < 8:
                raise LimitError("too few")
            return super().forward(x)

    with pytest.raises(ValueError, match="fails with fewer channels"):
        prune_channels(Refuses(), 0.5, INPUTS)
