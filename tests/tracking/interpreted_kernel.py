"""The kernel of `update`, by Triton's interpreter on a CPU, against the plain operations.

`test_interpreted.py` runs these tests in another process, because Triton chooses its interpreter
when it is imported. To run them alone:

    TRITON_INTERPRET=1 python -m pytest tests/tracking/interpreted_kernel.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drophot import DynamicsTracker, ForgettingTracker
from drophot.tracking import Spread, fused_kernel, fused_update
from drophot.tracking.fused_kernel import launch
from drophot.tracking.state import State

KINDS = [ForgettingTracker, DynamicsTracker]
BUILT_IN = ("aum", "el2n", "confidence", "variability", "loss")
N = 5
Batch = tuple[Tensor, Tensor, Tensor]
# The interpreter takes a tenth of a second for a row.
few, fewer = settings(max_examples=10), settings(max_examples=6)

# NumPy, which the interpreter uses, warns of operations with NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@contextmanager
def on_a_gpu(monkeypatch: Any, kernel: bool) -> Iterator[None]:
    """Updates are as on a GPU: the kernel presents a batch, or no operation reads a value."""
    with monkeypatch.context() as patched:
        patched.setattr(fused_update, "_is_gpu", lambda tensor: kernel)
        patched.setattr(fused_update, "_try", launched)
        patched.setattr(State, "can_sync", False)
        yield


def launched(arguments: Any) -> bool:
    """Errors of the kernel are not caught here."""
    torch.ops.drophot.present.default(*arguments)
    return True


def presented(monkeypatch: Any, kernel: bool, tracker: Any, batches: list[Batch]) -> Any:
    with on_a_gpu(monkeypatch, kernel):
        for index, logits, targets in batches:
            tracker.update(index, logits, targets)
    return tracker


def outcome(tracker: Any) -> Any:
    """The counts, or the error that reading them raises."""
    try:
        return tracker.state_dict()
    except ValueError as error:
        return str(error)


def assert_equal(found: Any, expected: Any) -> None:
    """Counts and what follows from exact operations are equal, other values but for rounding."""
    saved, wanted = outcome(found), outcome(expected)
    if isinstance(wanted, str) or isinstance(saved, str):
        assert saved == wanted
        return
    for name in ("history", "targets"):
        assert torch.equal(saved[name], wanted[name])
    if not isinstance(expected, DynamicsTracker):
        return
    for name in expected.statistics:
        exact = name == "aum"
        torch.testing.assert_close(
            found.scores(name, missing="nan"),
            expected.scores(name, missing="nan"),
            rtol=0 if exact else 5e-6,
            atol=0 if exact else 2e-6 if name.endswith(("variability", "spread")) else 1e-18,
            equal_nan=True,
        )


def made(kind: Any, statistics: Any = None) -> Any:
    return kind(N) if statistics is None else kind(N, statistics=statistics)


@st.composite
def batches(draw: Any, wrong: str = "nothing") -> list[Batch]:
    """Some batches of few samples, so that they repeat within a batch, in any memory layout."""
    num_classes = draw(st.sampled_from([2, 3, 10, 33, 70]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    integers = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes = torch.randint(num_classes, (N,), generator=noise)
    few_rows = 0 if wrong == "nothing" else 2
    rows = st.lists(st.integers(0, N - 1), min_size=few_rows, max_size=5)
    found = []
    for _ in range(draw(st.integers(few_rows, 3))):
        index = torch.tensor(draw(rows), dtype=torch.int64)
        logits = scale * torch.randn(len(index), num_classes, generator=noise)
        targets = classes[index]
        if wrong != "nothing":
            row = draw(st.integers(0, len(index) - 1))
            CHANGES[wrong](draw, index[row], logits[row], targets[row])
        layout = draw(st.sampled_from(["plain", "transposed", "column", "every other"]))
        logits = logits.to(dtype)
        if layout == "transposed":
            logits = logits.t().contiguous().t()
        elif layout == "column":
            index = torch.stack([index, index + 1], 1)[:, 0]
            targets = torch.stack([targets + 1, targets], 1)[:, 1]
        elif layout == "every other":
            logits = torch.stack([logits, logits + 1], 2).flatten(1)[:, ::2]
        found.append((index.to(integers), logits, targets.to(integers)))
    return found


def wrong_logit(draw: Any, index: Tensor, logits: Tensor, target: Tensor) -> None:
    classes = st.sampled_from([[int(target)], [0], [-1], list(range(len(logits)))])
    logits[draw(classes)] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))


def wrong_index(draw: Any, index: Tensor, logits: Tensor, target: Tensor) -> None:
    index.fill_(draw(st.sampled_from([-1, N, N + 60])))


def wrong_target(draw: Any, index: Tensor, logits: Tensor, target: Tensor) -> None:
    others = [(int(target) + 1) % len(logits), -100, len(logits), 2**33 + int(target)]
    target.fill_(draw(st.sampled_from(others)))


CHANGES = {"logits": wrong_logit, "index": wrong_index, "targets": wrong_target}


@pytest.mark.parametrize("kind", KINDS)
@given(seen=batches())
@few
def test_the_kernel_equals_the_plain_operations(kind: Any, seen: list[Batch]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = presented(patch, True, made(kind), seen)
        assert_equal(found, presented(patch, False, made(kind), seen))


@given(seen=batches("logits"))
@fewer
def test_logits_that_are_not_finite(seen: list[Batch]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = presented(patch, True, made(DynamicsTracker), seen)
        assert_equal(found, presented(patch, False, made(DynamicsTracker), seen))


@pytest.mark.parametrize("wrong", ["index", "targets"])
@given(data=st.data())
@fewer
def test_wrong_values_give_the_same_errors(wrong: str, data: st.DataObject) -> None:
    seen = data.draw(batches(wrong))
    with pytest.MonkeyPatch.context() as patch:
        found = presented(patch, True, made(ForgettingTracker), seen)
        assert_equal(found, presented(patch, False, made(ForgettingTracker), seen))


def test_a_later_target_that_differs_is_an_error(monkeypatch: Any) -> None:
    index, logits = torch.tensor([3]), torch.zeros(1, 4)
    seen = [(index, logits, torch.tensor([target])) for target in (2, 1)]
    with pytest.raises(ValueError, match="sample 3 with target 2"):
        _ = presented(monkeypatch, True, made(ForgettingTracker), seen).counts


def test_logits_after_a_loss_are_an_error(monkeypatch: Any) -> None:
    tracker = DynamicsTracker(N, statistics=["loss"])
    tracker.update_loss(torch.tensor([3]), torch.ones(1))
    seen = [(torch.tensor([3]), torch.zeros(1, 4), torch.tensor([2]))]
    with pytest.raises(ValueError, match="`update_loss`.*sample 3 by both"):
        _ = presented(monkeypatch, True, tracker, seen).counts


def test_a_nan_is_never_correct_and_stays_with_its_sample(monkeypatch: Any) -> None:
    logits = torch.tensor([[5.0, 0.0, torch.nan], [5.0, 0.0, 0.0]])
    seen = [(torch.tensor([1, 2]), logits, torch.tensor([0, 0]))]
    found = presented(monkeypatch, True, made(DynamicsTracker), seen)
    assert found.learned.tolist() == [False, False, True, False, False]
    for name in BUILT_IN:
        assert found.scores(name, missing="nan").isnan().tolist() == [True, True, False, True, True]


SPREAD = Spread(score=DynamicsTracker(1).statistics["loss"], name="loss_spread")
AUM_SPREAD = Spread(score=DynamicsTracker(1).statistics["aum"], name="aum_spread")


@pytest.mark.parametrize(
    "statistics",
    [["aum"], ["el2n"], ["loss"], ["variability"], ["loss", "el2n"], [SPREAD, "aum", AUM_SPREAD]],
    ids=str,
)
def test_any_of_the_statistics(statistics: Any, monkeypatch: Any) -> None:
    index = torch.tensor([4, 0, 4, 1, 4])
    seen = [(index, 3 * torch.randn(5, 7), index) for _ in range(2)]
    found = presented(monkeypatch, True, made(DynamicsTracker, statistics), seen)
    assert_equal(found, presented(monkeypatch, False, made(DynamicsTracker, statistics), seen))


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_and_classes_than_a_program_reads_at_a_time(kind: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(fused_kernel, "launch", partial(launch, index_block=2, class_block=32))
    index = torch.tensor([2, 0, 1, 3, 4, 0, 3, 2])
    seen = [(index, 5 * torch.randn(8, 70), index * 17) for _ in range(2)]
    found = presented(monkeypatch, True, made(kind), seen)
    assert_equal(found, presented(monkeypatch, False, made(kind), seen))
    assert found.presentations.tolist() == [4, 2, 4, 4, 2]


def test_the_mean_of_many_presentations_keeps_its_last_digits(monkeypatch: Any) -> None:
    """Means and the digits that float32 lacks are equal bit for bit, as the margins are."""
    index = torch.arange(N).repeat(20_000)
    plain = DynamicsTracker(N, statistics=["aum"])
    plain.update(index, torch.randn(len(index), 3), index * 0)
    state = plain.state_dict()
    found = DynamicsTracker(N, statistics=["aum"])
    found.load_state_dict(state)
    index = torch.tensor([0, 1, 2, 3, 4, 0])
    seen = [(index, 10 * torch.randn(6, 3), index * 0) for _ in range(6)]
    saved = presented(monkeypatch, True, found, seen).state_dict()
    wanted = presented(monkeypatch, False, plain, seen).state_dict()
    for name in ("history", "means", "tails"):
        assert torch.equal(saved[name], wanted[name]), name
    assert not torch.equal(saved["tails"], state["tails"])


def test_a_confident_sample_keeps_its_digits(monkeypatch: Any) -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0], [38.0, 0.0, 1.0], [1e-4, 0.0, -1e-4], [-60.0, 0, 20]])
    seen = [(torch.arange(4), logits, torch.zeros(4, dtype=torch.int64))]
    found = presented(monkeypatch, True, DynamicsTracker(4), seen)
    probabilities = logits.double().softmax(1)
    rest = 1 - probabilities[:, 0]
    rest[:2] = probabilities[:2, 1:].sum(1)
    error = (probabilities[:, 1:].square().sum(1) + rest.square()).sqrt()
    torch.testing.assert_close(found.scores("el2n").double(), error, rtol=1e-6, atol=0)
    loss = -torch.log1p(-rest)
    loss[3] = 80
    torch.testing.assert_close(found.scores("loss").double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        found.scores("confidence").double(), probabilities[:, 0], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_history_that_has_overflowed_stays_an_error(kind: Any, monkeypatch: Any) -> None:
    """Two more presentations would make the counter of this sample 0, which is valid."""
    tracker, most = kind(N), 2**20 - 1
    index, logits = torch.zeros(most, dtype=torch.int64), torch.zeros(most, 2)
    for _ in range(2):
        tracker.update(index, logits, index)
    presented(monkeypatch, True, tracker, [(index[:2], logits[:2], index[:2])])
    with pytest.raises(ValueError, match="1048575"):
        _ = tracker.counts


class Operations(TorchDispatchMode):
    """Writes down every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_one_operation(kind: Any, monkeypatch: Any) -> None:
    tracker, index = kind(N), torch.tensor([1, 3, 1])
    logits, targets = torch.randn(3, 4, requires_grad=True).half(), index.int()
    with on_a_gpu(monkeypatch, True), Operations() as operations:
        tracker.update(index, logits, targets)
    assert operations.seen == ["drophot.present.default"]
    assert tracker.presentations.tolist() == [0, 2, 0, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_has_no_graph_break(kind: Any, monkeypatch: Any) -> None:
    torch.compiler.reset()
    model, found, plain = nn.Linear(3, 4), kind(N), kind(N)
    num_updates: list[int] = []  # in each graph

    def traced(graph: Any, inputs: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes]
        num_updates.append(targets.count(torch.ops.drophot.present.default))
        assert len(targets) < 20
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @torch.compile(fullgraph=True, backend=traced)
    def step(inputs: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        logits = model(inputs)
        found.update(index, logits, targets)
        return logits.sum()

    seen = [(torch.randn(3, 3), torch.tensor([4, 0, 4])) for _ in range(2)]
    with on_a_gpu(monkeypatch, True):
        for inputs, index in seen:
            step(inputs, index % 4, index).backward()
    for inputs, index in seen:
        plain.update(index, model(inputs), index % 4)
    assert set(num_updates) == {1}
    assert_equal(found, plain)


def test_the_operator_is_what_its_schema_says() -> None:
    """As `torch.compile` needs it: what it changes, and that it returns nothing."""
    index = torch.tensor([4, 0, 4])
    state = [torch.zeros(N, dtype=torch.int64), torch.full((N,), -1, dtype=torch.int32)]
    statistics = [torch.zeros(N, 4), torch.zeros(N, 4, dtype=torch.int8), torch.zeros(N)]
    arguments = (index, torch.randn(3, 5), index, *state, torch.tensor(2**62), statistics, 15, 4)
    torch.library.opcheck(torch.ops.drophot.present.default, arguments)
