"""What `fit` calls in each step, recorded into the graph of the step or called after it."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from helpers.graphs import graphs as graphs
from helpers.stand_in import Graph
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset, fit
from drophot.tracking import validation
from drophot.tracking.state import State
from drophot.training import capture_guards

N, BATCH, EPOCHS = 18, 4, 3  # the last batch of an epoch is smaller


@pytest.fixture(autouse=True)
def reads_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trackers do what they do on a GPU."""
    monkeypatch.setattr(State, "can_sync", property(lambda _: False))


def trained(tracker: ForgettingTracker, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(
        model,
        IndexedDataset(data),
        EPOCHS,
        optimizer=optimizer,
        batch_size=BATCH,
        on_batch=tracker.update,
        **options,
    )
    return model


class Norm:
    """A score that a graph would not call."""

    name, hard_end = "norm", "high"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return logits.norm(dim=1)


class Counted(ForgettingTracker):
    calls = 0

    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        self.calls += 1
        super().update(index, logits, targets)


STEPS = EPOCHS * -(-N // BATCH)
OPTIONS: list[dict[str, Any]] = [{}, {"before_step": lambda model: None}]


@pytest.mark.parametrize("kind", [ForgettingTracker, DynamicsTracker])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_tracker_is_updated_by_the_graph(
    kind: type[ForgettingTracker],
    options: dict[str, Any],
    graphs: list[Graph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = kind(N)
    trained(expected, cuda_graph=False, **options)
    calls = []
    check = validation.check_batch
    monkeypatch.setattr(validation, "check_batch", lambda *a: (calls.append(1), check(*a)))
    tracker = kind(N)
    trained(tracker, **options)
    (graph,) = graphs
    eager = STEPS - graph.replays
    assert len(calls) == eager + 1, "in the eager steps and in the capture"
    assert eager < STEPS / 2
    found = tracker.state_dict()
    for name, value in expected.state_dict().items():
        same = (
            torch.equal(value, found[name]) if isinstance(value, Tensor) else value == found[name]
        )
        assert same, name


@pytest.mark.parametrize(
    "make", [lambda: DynamicsTracker(N, statistics=[Norm()]), lambda: Counted(N)]
)
def test_python_code_of_the_user_is_called_in_each_step(
    make: Callable[[], Any], graphs: list[Graph]
) -> None:
    tracker = make()
    trained(tracker)
    assert graphs[0].replays
    counted = tracker if isinstance(tracker, Counted) else tracker.statistics["norm"]
    assert counted.calls == STEPS
    assert tracker.presentations.tolist() == [EPOCHS] * N


def test_a_state_that_is_replaced_is_followed_by_a_new_graph(graphs: list[Graph]) -> None:
    tracker = ForgettingTracker(N)

    def on_epoch(epoch: int) -> None:
        if epoch == 1:
            tracker._state.move(torch.device("cpu"))
            tracker._state.columns = {n: c.clone() for n, c in tracker._state.columns.items()}

    trained(tracker, on_epoch=on_epoch)
    assert len(graphs) == 2
    assert tracker.presentations.tolist() == [EPOCHS] * N


# --- a replaced `step` of the optimizer, and a failed capture in a `fit` inside a `fit` ---------


@pytest.mark.parametrize("later", [False, True])
def test_a_replaced_step_is_called(later: bool, graphs: list[Graph]) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, calls = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3), []

    def replace(_: int = 0) -> None:
        plain = type(optimizer).step

        def step(self: Any, *arguments: Any) -> Any:
            calls.append(1)
            return plain(self, *arguments)

        optimizer.step = MethodType(step, optimizer)

    if not later:
        replace()
    options: dict[str, Any] = {"on_epoch": replace} if later else {}
    fit(model, data, EPOCHS, optimizer=optimizer, batch_size=BATCH, **options)
    assert len(graphs) == later
    assert len(calls) == STEPS - later * STEPS // EPOCHS


def test_the_wrapper_of_a_scheduler_is_captured(graphs: list[Graph]) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    data = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)
    fit(model, data, EPOCHS, optimizer=optimizer, batch_size=BATCH, scheduler=scheduler)
    assert graphs[0].replays


class Generator:
    """Stands in for the random generator of a GPU."""

    def clone_state(self) -> object:
        return object()

    def graphsafe_set_state(self, _: object) -> None:
        pass


def test_a_failed_capture_inside_another_fit_leads_to_a_new_graph(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)

    def fail() -> None:
        with capture_guards.unchanged_on_error(optimizer, torch.device("cuda:0")):
            raise KeyError

    def on_epoch(epoch: int) -> None:
        if epoch == 1:
            with monkeypatch.context() as patched:
                patched.setattr("torch.cuda.default_generators", [Generator()])
                with pytest.raises(KeyError):
                    fail()

    trained(ForgettingTracker(N), on_epoch=on_epoch)
    assert len(graphs) == 2
