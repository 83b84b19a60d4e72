import io
from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from drophot import DynamicsTracker, ForgettingTracker, select

N, C = 5, 4
STATISTICS = ("aum", "el2n", "confidence", "variability", "loss")
TARGETS = torch.tensor([0, 3, 1, 2, 3])

# Batches of samples with repeats, empty ones included; logits by a seed.
histories = st.tuples(
    st.lists(st.lists(st.integers(0, N - 1), max_size=7), max_size=8), st.integers(0, 2**31)
)


def batches(history: Any, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    indices, seed = history
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.tensor(index, dtype=torch.int64),
            (4 * torch.randn(len(index), C, generator=generator)).to(dtype),
        )
        for index in indices
    ]


def fed(history: list[tuple[Tensor, Tensor]], size: int = N) -> DynamicsTracker:
    tracker = DynamicsTracker(size)
    for index, logits in history:
        tracker.update(index, logits, TARGETS[index])
    return tracker


def expected(history: list[tuple[Tensor, Tensor]]) -> dict[str, np.ndarray]:
    shown: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(N)]
    for index, logits in history:
        for sample, row in zip(index.tolist(), logits, strict=True):
            shown[sample].append((row.double().numpy(), int(TARGETS[sample])))
    nothing = dict.fromkeys(STATISTICS, float("nan"))
    rows = [references.dynamics(of) if of else nothing for of in shown]
    return {name: np.array([row[name] for row in rows]) for name in STATISTICS}


@settings(max_examples=30)
@given(histories)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_statistic_is_its_papers_formula(dtype: torch.dtype, history: Any) -> None:
    seen = batches(history, dtype)
    tracker = fed(seen)
    for name, values in expected(seen).items():
        found = tracker.scores(name, missing="nan")
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, values, rtol=2e-5, atol=2e-5)


@settings(max_examples=30)
@given(histories)
def test_forgetting_is_that_of_the_plain_tracker(history: Any) -> None:
    tracker, plain = DynamicsTracker(N), ForgettingTracker(N)
    for index, logits in batches(history):
        tracker.update(index, logits, TARGETS[index])
        plain.update(index, logits, TARGETS[index])
    for words in ("hardest", "zero"):
        expected = plain.scores(words, missing="nan").numpy()
        for found in (
            tracker.scores(words, missing="nan"),
            tracker.scores(never_learned=words, missing="nan"),
        ):
            np.testing.assert_array_equal(found, expected)
    for name in ("counts", "learned", "presentations"):
        assert torch.equal(getattr(tracker, name), getattr(plain, name))


@settings(max_examples=30)
@given(histories)
def test_one_batch_or_many_give_the_same(history: Any) -> None:
    seen = batches(history)
    if not seen:
        return
    whole = [(torch.cat([i for i, _ in seen]), torch.cat([z for _, z in seen]))]
    for name in STATISTICS:
        np.testing.assert_allclose(
            fed(seen).columns()[name], fed(whole).columns()[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_thousands_of_presentations_lose_no_digits() -> None:
    """Of two samples: one all but certain, with little spread; one with large logits that jumps."""
    generator = torch.Generator().manual_seed(0)
    tracker = DynamicsTracker(2)
    index, targets = torch.arange(2), torch.tensor([0, 0])
    shown: list[list[tuple[np.ndarray, int]]] = [[], []]
    for _ in range(2_000):
        calm = torch.tensor([[7.0, 0.0, 0.0]]) + 0.5 * torch.randn(1, 3, generator=generator)
        logits = torch.cat([calm, 1000 + 3 * torch.randn(1, 3, generator=generator)])
        tracker.update(index, logits, targets)
        for sample in (0, 1):
            shown[sample].append((logits[sample].double().numpy(), 0))
    for sample in (0, 1):
        for name, value in references.dynamics(shown[sample]).items():
            assert tracker.scores(name)[sample] == pytest.approx(value, rel=1e-5), name


def test_the_digits_of_a_sample_that_is_all_but_certain() -> None:
    """1 - p rounds to 0 in float32 from a margin of 17 on; the error does not."""
    tracker = DynamicsTracker(2)
    logits = torch.tensor([[30.0, 0.0, 0.0], [38.0, 0.0, 1.0]])
    tracker.update(torch.arange(2), logits, torch.tensor([0, 0]))
    rest = np.exp([[-30.0, -30.0], [-38.0, -37.0]])
    error = np.sqrt((rest**2).sum(1) + rest.sum(1) ** 2)
    np.testing.assert_allclose(tracker.scores("el2n"), error, rtol=1e-4)
    np.testing.assert_allclose(tracker.scores("loss"), rest.sum(1), rtol=1e-4)


def test_the_columns_of_all_samples() -> None:
    seen = batches(([[0, 1], [1, 3, 1]], 1))
    tracker = fed(seen)
    columns = tracker.columns()
    assert list(columns) == [
        *("index", "target", "presentations", "learned", "forgetting"),
        *("aum", "el2n", "confidence", "variability", "loss"),
    ]
    assert all(type(c) is np.ndarray and c.shape == (N,) for c in columns.values())
    assert columns["index"].tolist() == [0, 1, 2, 3, 4]
    assert columns["target"].tolist() == [0, 3, -1, 2, -1]
    assert columns["presentations"].tolist() == [1, 3, 0, 1, 0]
    assert columns["learned"].tolist() == tracker.learned.tolist()
    assert columns["forgetting"].tolist() == tracker.counts.tolist()
    for name in STATISTICS:
        np.testing.assert_array_equal(columns[name], tracker.scores(name, missing="nan"))
    columns["target"][:] = 7
    columns["aum"][:] = 7
    assert tracker.columns()["target"][0] == 0
    assert tracker.columns()["aum"][0] != 7
    pandas = pytest.importorskip("pandas")
    assert len(pandas.DataFrame(columns)) == N


def test_a_sample_never_presented_is_nan_and_select_says_so() -> None:
    tracker = fed(batches(([[0, 1, 2, 3]], 1)))
    for name in STATISTICS:
        found = tracker.scores(name, missing="nan")
        assert found.isnan().tolist() == [False] * 4 + [True]
        with pytest.raises(ValueError, match="NaN"):
            select(found, 0.5)
        with pytest.raises(ValueError, match="1 of 5"):
            tracker.scores(name)
    assert tracker.columns()["variability"][:4].tolist() == [0.0] * 4


@pytest.mark.slow
def test_a_settled_mean_still_moves() -> None:
    """Steps below half of a float32's last bit would be lost, and the mean stay where it was."""
    tracker, index, targets = DynamicsTracker(2), torch.arange(2), torch.zeros(2, dtype=torch.int64)
    shown = [10.0] * 500 + [10.002] * 1_500
    for margin in shown:
        logits = torch.tensor([[margin, 0.0], [1000 * margin, 0.0]])
        tracker.update(index, logits, targets)
    margins = np.array(shown, np.float32).astype(np.float64)
    large = np.array(1000 * margins, np.float32).astype(np.float64)
    expected = [margins.mean(), large.mean()]
    np.testing.assert_allclose(tracker.scores("aum"), expected, rtol=2e-7)


INF = float("inf")


@pytest.mark.parametrize(
    ("row", "margin", "confidence", "error", "loss"),
    [
        ([-INF, 1.0, 1.0], -INF, 0.0, 1.5**0.5, INF),  # its own class masked
        ([0.0, -INF, -INF], INF, 1.0, 0.0, 0.0),  # all others masked
        ([INF, 1.0, 2.0], INF, 1.0, 0.0, 0.0),
        ([0.0, INF, 2.0], -INF, 0.0, 2**0.5, INF),  # another one overflowed
        ([0.0, -INF, 0.0], 0.0, 0.5, 0.5**0.5, np.log(2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinite_logits_are_limits_and_what_is_infinite_stays_so(
    row: list[float], margin: float, confidence: float, error: float, loss: float, dtype: Any
) -> None:
    tracker, target = DynamicsTracker(1), torch.tensor([0])
    usual = {"aum": -1.0, "confidence": 1 / (1 + np.e), "loss": np.log(1 + np.e)}
    usual["el2n"] = 2**0.5 * (1 - usual["confidence"])
    first = {"aum": margin, "confidence": confidence, "el2n": error, "loss": loss}
    names = ("infinite", "usual", "infinite", "infinite")
    rows = {"infinite": row, "usual": [0.0, 1.0, -INF]}
    sums = dict.fromkeys(first, 0.0)
    for number, name in enumerate(names, 1):
        logits = torch.tensor([rows[name]] * 2, dtype=dtype)
        tracker.update(torch.tensor([0, 0]), logits, target.expand(2))
        for statistic in sums:
            sums[statistic] += (first if name == "infinite" else usual)[statistic]
            found = tracker.scores(statistic).item()
            assert found == pytest.approx(sums[statistic] / number, rel=1e-5, abs=1e-6), statistic
        assert tracker.scores("variability").isfinite()


def test_opposite_infinities_have_no_mean_and_only_where_they_are() -> None:
    tracker, index = DynamicsTracker(2), torch.arange(2)
    for row in ([INF, 0.0, 0.0], [-INF, 0.0, 0.0]):
        tracker.update(index, torch.tensor([row, [1.0, 0.0, 0.0]]), torch.tensor([0, 0]))
    assert tracker.scores("aum").isnan().tolist() == [True, False]
    assert tracker.scores("confidence").isfinite().all()
    assert tracker.scores("aum")[1] == 1


def test_a_state_from_before_means_had_tails_is_taken_over() -> None:
    tracker = fed(batches(([[0, 1, 2], [3, 4, 0]], 3)))
    old = {name: column for name, column in tracker.state_dict().items() if name != "tails"}
    again = DynamicsTracker(N)
    again.load_state_dict(old)
    for name in STATISTICS:
        assert torch.equal(again.scores(name), tracker.scores(name))


def test_a_nan_stays_with_its_sample() -> None:
    tracker = DynamicsTracker(2)
    logits = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    tracker.update(torch.arange(2), logits, torch.tensor([0, 1]))
    assert tracker.scores("aum").isnan().tolist() == [True, False]
    assert tracker.learned.tolist() == [False, True]


@given(histories, histories)
def test_a_restart_goes_on_bit_for_bit(first: Any, second: Any) -> None:
    one, two = batches(first), batches(second)
    file = io.BytesIO()
    torch.save(fed(one).state_dict(), file)
    file.seek(0)
    again = DynamicsTracker(N)
    again.load_state_dict(torch.load(file, weights_only=True))
    for index, logits in two:
        again.update(index, logits, TARGETS[index])
    whole = fed(one + two).state_dict()
    for name, column in again.state_dict().items():
        assert torch.equal(torch.as_tensor(column), torch.as_tensor(whole[name])), name


def test_the_states_of_the_two_trackers_are_not_mixed_up() -> None:
    with pytest.raises(ValueError, match="DynamicsTracker.*history, means, squares"):
        DynamicsTracker(N).load_state_dict(ForgettingTracker(N).state_dict())
    with pytest.raises(ValueError, match="ForgettingTracker.*history, targets.*means"):
        ForgettingTracker(N).load_state_dict(DynamicsTracker(N).state_dict())


def test_state_is_thirty_six_bytes_a_sample() -> None:
    tensors = [v for v in DynamicsTracker(1000).state_dict().values() if torch.is_tensor(v)]
    assert sum(tensor.nbytes for tensor in tensors) == 36 * 1000


def test_reset_is_as_new() -> None:
    tracker = fed(batches(([[0, 1, 2, 3, 4]], 3)))
    tracker.reset()
    assert np.isnan(tracker.columns()["aum"]).all()
    index, logits = batches(([[0, 1]], 5))[0]
    tracker.update(index, logits, TARGETS[index])
    other = fed([(index, logits)]).columns()
    np.testing.assert_array_equal(tracker.columns()["aum"], other["aum"])


def test_autocast_and_gradients_change_nothing() -> None:
    (index, logits), *_ = batches(([[0, 1, 2, 2]], 3))
    plain, inside = fed([(index, logits)]), DynamicsTracker(N)
    wanted = logits.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.update(index, wanted, TARGETS[index])
    wanted.sum().backward()
    assert wanted.grad is not None
    for name in STATISTICS:
        np.testing.assert_array_equal(plain.columns()[name], inside.columns()[name])
        assert not inside.scores(name, missing="nan").requires_grad


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_break() -> None:
    """Compiled once, for twenty batches, which repeat some samples and lack others."""
    tracker, plain = DynamicsTracker(N), DynamicsTracker(N)
    model = nn.Linear(3, C)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, y, i: tracker.update(i, model(x), y), fullgraph=True, backend="eager"
    )
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            index = torch.randint(N, (8,), generator=generator)
            inputs = torch.randn(8, 3, generator=generator)
            compiled(inputs, TARGETS[index], index)
            plain.update(index, model(inputs), TARGETS[index])
        for name in STATISTICS:
            np.testing.assert_array_equal(tracker.columns()[name], plain.columns()[name])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_an_index_of_any_dtype_where_nobody_looks(dtype: torch.dtype) -> None:
    """As on a GPU: what may be a fault is computed for every batch."""
    tracker = DynamicsTracker(N)
    update = torch.compile(tracker.update, fullgraph=True, backend="eager")
    update(torch.tensor([2, 3], dtype=dtype), torch.zeros(2, C), TARGETS[2:4])
    assert tracker.presentations.tolist() == [0, 0, 1, 1, 0]
    update(torch.tensor([2, 4], dtype=dtype), torch.zeros(2, C), torch.tensor([1, 9]))
    with pytest.raises(ValueError, match="`targets`.*9.*sample 4"):
        tracker.columns()


@pytest.mark.parametrize("target", [4, -1, 1000])
def test_a_target_that_is_no_class_is_an_error_and_leaves_no_trace(target: int) -> None:
    tracker = DynamicsTracker(N)
    index, targets = torch.tensor([2, 3]), torch.tensor([1, target])
    with pytest.raises(ValueError, match=f"`targets`.*{target}.*sample 3"):
        tracker.update(index, torch.zeros(2, C), targets)
    assert tracker.presentations.sum() == 0
    deferred = torch.compile(tracker.update, fullgraph=True, backend="eager")
    deferred(index, torch.zeros(2, C), targets)
    for read in (tracker.columns, tracker.state_dict, lambda: tracker.scores("aum")):
        with pytest.raises(ValueError, match=f"`targets`.*{target}.*sample 3"):
            read()


def test_wrong_use_is_that_of_the_plain_tracker() -> None:
    tracker = DynamicsTracker(N)
    with pytest.raises(ValueError, match=r"`index`.*\[0, 5\).*7"):
        tracker.update(torch.tensor([7]), torch.zeros(1, C), torch.tensor([0]))
    with pytest.raises(TypeError, match="`targets`.*torch.float32"):
        tracker.update(torch.tensor([0]), torch.zeros(1, C), torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"`logits`.*\(1, 1\)"):
        tracker.update(torch.tensor([0]), torch.zeros(1, 1), torch.tensor([0]))
    tracker.update(torch.tensor([0]), torch.zeros(1, C), torch.tensor([1]))
    with pytest.raises(ValueError, match="`targets`.*sample 0 with target 1.*IndexedDataset"):
        tracker.update(torch.tensor([0]), torch.zeros(1, C), torch.tensor([0]))
    assert tracker.presentations.tolist() == [1, 0, 0, 0, 0]
    assert tracker.columns()["loss"][0] == pytest.approx(np.log(C))
    with pytest.raises(TypeError, match="`update_correct`.*DynamicsTracker"):
        tracker.update_correct(torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(ValueError, match="`statistic`.*'margin'"):
        tracker.scores("margin")
