"""Scores of a user's own in a tracker, against a loop over the samples."""

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.one_process import assert_same
from helpers.own_score import Batch, C, Entropy, N, Power, accumulating, batches, main, tracker
from helpers.processes import ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from drophot import DynamicsTracker, IndexedDataset
from drophot._core import random_state
from drophot.tracking import Score, Spread

DEFAULT = ("aum", "el2n", "confidence", "variability", "loss")


@pytest.fixture(autouse=True)
def _no_compiled_steps_are_left() -> Iterator[None]:
    """Steps with other scores are other steps, and torch compiles a function only a few times."""
    yield
    torch.compiler.reset()


def fed(tracker: DynamicsTracker, seen: list[Batch]) -> DynamicsTracker:
    for batch in seen:
        tracker.update(*batch)
    return tracker


def values(score: Score, seen: list[Batch]) -> list[list[float]]:
    """A score of each presentation of each sample, one row at a time."""
    found: list[list[float]] = [[] for _ in range(N)]
    for index, logits, targets in seen:
        for row, sample in enumerate(index.tolist()):
            one = score(logits[row : row + 1].double(), targets[row : row + 1])
            found[sample].append(float(one))
    return found


def test_a_score_is_the_mean_of_a_loop_over_the_samples() -> None:
    seen = batches(1)
    found = fed(tracker(), seen)
    for score in (Entropy(), Power(2)):
        expected = [np.mean(of) if of else np.nan for of in values(score, seen)]
        scores = found.scores(score.name, missing="nan")
        assert scores.dtype == torch.float32
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
    expected = [np.std(of) if of else np.nan for of in values(Power(2), seen)]
    np.testing.assert_allclose(found.scores("power_spread", missing="nan"), expected, atol=1e-6)


def test_a_score_equal_to_a_built_in_one_has_its_bits() -> None:
    class Same:
        def __init__(self, name: str) -> None:
            self.name, self.hard_end, self.built_in = f"own_{name}", "high", name

        def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
            return DynamicsTracker(1).statistics[self.built_in](logits, targets)

    own: list[Any] = [Same(name) for name in DEFAULT if name != "variability"]
    own.append(Spread(score=Same("confidence"), name="own_variability"))
    own[2] = own[-1].score  # the score and its spread are of the same values
    found = fed(DynamicsTracker(N, statistics=[*DEFAULT, *own]), batches(2))
    for name in DEFAULT:
        scores = found.scores(name, missing="nan")
        assert torch.equal(
            scores.nan_to_num(-1), found.scores(f"own_{name}", missing="nan").nan_to_num(-1)
        )


def test_own_scores_leave_the_built_in_ones_alone() -> None:
    seen = batches(3)
    plain, own = fed(DynamicsTracker(N), seen), fed(tracker(), seen)
    for name in ("forgetting", "aum", "variability"):
        a, b = plain.scores(name, missing="nan"), own.scores(name, missing="nan")
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="'el2n'"):
        own.scores("el2n", missing="nan")


@pytest.mark.parametrize(
    "names", [["aum"], ["variability"], ["loss", "el2n"], ["forgetting", "aum"]]
)
def test_some_of_the_built_in_ones(names: list[str]) -> None:
    seen = batches(4)
    found, whole = fed(DynamicsTracker(N, statistics=names), seen), fed(DynamicsTracker(N), seen)
    for name in names:
        a, b = found.scores(name, missing="nan"), whole.scores(name, missing="nan")
        np.testing.assert_array_equal(a, b)
    assert set(found.statistics) == {*names} - {"forgetting"}


def test_the_order_of_the_built_in_names_does_not_matter() -> None:
    state = fed(DynamicsTracker(N), batches(4)).state_dict()
    assert "statistics" not in state
    DynamicsTracker(N, statistics=reversed(DEFAULT)).load_state_dict(state)


def test_statistics_tell_their_hard_ends() -> None:
    ends = {name: score.hard_end for name, score in DynamicsTracker(2).statistics.items()}
    high = dict.fromkeys(DEFAULT, "high")
    assert ends == high | {"aum": "low", "confidence": "low"}
    ends = {name: score.hard_end for name, score in tracker().statistics.items()}
    assert ends["entropy"] == "high"
    assert ends["power"] == "low"
    assert ends["power_spread"] == "high"


def test_columns_hold_them_too() -> None:
    found = fed(tracker(), batches(5))
    columns = found.columns()
    assert list(columns)[5:] == ["aum", "variability", "entropy", "power_spread", "power"]
    for name in list(columns)[5:]:
        np.testing.assert_array_equal(columns[name], found.scores(name, missing="nan"))


def test_a_sample_never_presented_has_no_score() -> None:
    found = fed(tracker(), [(torch.tensor([0]), torch.zeros(1, C), torch.tensor([0]))])
    with pytest.raises(ValueError, match=f"{N - 1} of {N}"):
        found.scores("entropy")
    for name in ("entropy", "power_spread"):
        assert found.scores(name, missing="nan").isnan().sum() == N - 1


def test_a_checkpoint_continues_bit_for_bit() -> None:
    first, second = batches(6), batches(7)
    file = io.BytesIO()
    torch.save(fed(tracker(), first).state_dict(), file)
    file.seek(0)
    again = tracker()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_states(fed(again, second), fed(tracker(), first + second))


def test_a_copy_and_a_pickle_continue_bit_for_bit() -> None:
    first, second = batches(6), batches(7)
    expected = fed(tracker(), first + second)
    found = fed(tracker(), first)
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert_states(fed(copied, second), expected)


def assert_states(found: DynamicsTracker, expected: DynamicsTracker) -> None:
    state, wanted = found.state_dict(), expected.state_dict()
    assert state.pop("statistics") == wanted.pop("statistics")
    assert_same(state, wanted, 0.0)


@pytest.mark.parametrize(
    ("statistics", "named"),
    [
        ([Entropy()], r"entropy.*aum"),
        (["aum", "loss"], r"aum, loss"),
        (DEFAULT, "entropy"),
    ],
)
def test_a_state_of_other_statistics_is_refused_by_name(statistics: Any, named: str) -> None:
    state = fed(tracker(), batches(8)).state_dict()
    other = DynamicsTracker(N, statistics=statistics)
    with pytest.raises(ValueError, match=named):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="power_spread"):
        tracker().load_state_dict(other.state_dict())
    assert other.presentations.sum() == 0


def test_reset_clears_them() -> None:
    found = fed(tracker(), batches(9))
    found.reset()
    assert found.scores("entropy", missing="nan").isnan().all()
    assert_states(fed(found, batches(9)), fed(tracker(), batches(9)))


def test_watch_attach_and_observe_include_them() -> None:
    generator = torch.Generator().manual_seed(0)
    data = IndexedDataset(
        TensorDataset(torch.randn(N, 3, generator=generator), torch.arange(N) % C)
    )
    loader, model = DataLoader(data, batch_size=7), nn.Linear(3, C)
    expected = tracker()
    for x, y, index in loader:
        expected.update(index, model(x), y)

    attached, observed = tracker(), tracker()
    with attached.attach(model):
        for x, _ in attached.watch(loader):
            model(x)
    observed.observe(model, loader)
    assert_states(attached, expected)
    assert_states(observed, expected)


def test_ranks_equal_one_process_that_saw_everything(tmp_path: Path) -> None:
    ranks(2, main, tmp_path, folder=tmp_path)
    expected, other = tracker(), accumulating()
    for epoch in range(3):
        for rank in range(2):
            fed(expected, batches(10 * epoch + rank))
            fed(other, batches(10 * epoch + rank))
    assert other.scores("dual", missing="nan").isfinite().any()
    wanted = {k: v for k, v in expected.state_dict().items() if k != "statistics"}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for state in (found["state"], found["loaded"]):
            assert names_in(state.pop("statistics")) == list(expected.statistics)
        assert_same(found["state"], wanted, 1e-5)
        assert names_in(found["accumulated"].pop("statistics")) == list(other.statistics)
        accumulated = {k: v for k, v in other.state_dict().items() if k != "statistics"}
        assert_same(found["accumulated"], accumulated, 1e-5)
        assert_same(found["loaded"], found["state"], 0.0)
        assert "statistics" in found["error"]
        assert ("entropy" if rank else "power") in found["error"]
        assert f"decay={0.5 + rank / 4}" in found["other"]


def names_in(labels: list[str]) -> list[str]:
    return [label.partition("=")[0] for label in labels]


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_break() -> None:
    found = tracker()
    torch.compiler.reset()
    update = torch.compile(found.update, fullgraph=True, backend="eager")
    for batch in batches(10):
        update(*batch)
    assert_states(found, fed(tracker(), batches(10)))


def test_a_step_reads_nothing_from_the_device() -> None:
    """A meta tensor has no values: reading one fails, where on a GPU it would wait."""
    index = torch.zeros(8, dtype=torch.int64, device="meta")
    found = DynamicsTracker(N, device="meta", statistics=["aum", Entropy()])
    found.update(index, torch.zeros(8, C, device="meta"), index)


class Returns:
    """A score that returns what it is told to."""

    name, hard_end = "told", "high"

    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        self.result = result

    def __call__(self, logits: Tensor, targets: Tensor) -> Any:
        return self.result(logits)


@pytest.mark.parametrize(
    ("result", "error", "named"),
    [
        (lambda z: z, ValueError, r"'told'.*\(3,\).*\(3, 4\)"),
        (lambda z: z.mean(), ValueError, r"'told'.*\(3,\).*\(\)"),
        (lambda z: z[:, :1], ValueError, r"'told'.*\(3, 1\)"),
        (lambda z: z.argmax(1), TypeError, "'told'.*int64"),
        (lambda z: [0.0] * len(z), TypeError, "'told'.*list of 3"),
        (lambda z: z[:, 0] / z[:, 0], ValueError, "'told'.*sample 7"),
        (lambda z: -z[:, 0].log(), ValueError, "'told'.*sample 7"),
        (lambda z: 1e300 * (1 - z[:, 0].double()), ValueError, "'told'.*sample 7"),
    ],
)
def test_a_bad_result_is_an_error_that_names_the_score_and_counts_nothing(
    result: Any, error: type[Exception], named: str
) -> None:
    logits = torch.eye(C)[[0, 1, 0]]  # the second row is of sample 7
    batch = (torch.tensor([5, 7, 6]), logits, torch.tensor([0, 0, 0]))
    found = DynamicsTracker(N, statistics=["aum", Entropy(), Returns(result)])
    with pytest.raises(error, match=named):
        found.update(*batch)
    assert found.presentations.sum() == 0
    if "sample" in named:  # as on a GPU, where the step does not wait
        update = torch.compile(found.update, fullgraph=True, backend="eager")
        update(*batch)
        for read in (found.columns, found.state_dict, found.sync, lambda: found.scores("aum")):
            with pytest.raises(ValueError, match=named):
                read()
        found.reset()
        assert found.presentations.sum() == 0


class Named:
    hard_end = "high"

    def __init__(self, name: Any, hard_end: Any = "high") -> None:
        self.name, self.hard_end = name, hard_end

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits[:, 0]


@pytest.mark.parametrize(
    ("statistics", "error", "named"),
    [
        (["margin"], ValueError, "`statistics`.*'margin'"),
        ("aum", TypeError, "`statistics`.*'aum'"),
        (None, TypeError, "`statistics`.*None"),
        ([], ValueError, "`statistics`.*ForgettingTracker"),
        (["forgetting"], ValueError, "`statistics`.*ForgettingTracker"),
        (["aum", "aum"], ValueError, "`statistics`.*'aum'"),
        ([Entropy(), Entropy()], ValueError, "`statistics`.*'entropy'"),
        ([Entropy], TypeError, r"`statistics`.*`Entropy\(\)`"),
        ([abs], TypeError, "`statistics`.*`hard_end`"),
        ([0], TypeError, "`statistics`.*int"),
        ([Named("aum")], ValueError, "`name`.*'aum'"),
        ([Named("forgetting")], ValueError, "`name`.*'forgetting'"),
        ([Named("presentations")], ValueError, "`name`.*'presentations'"),
        ([Named("id")], ValueError, "`name`.*'id'"),
        ([Named("top-two")], ValueError, "`name`.*'top-two'"),
        ([Named("")], ValueError, "`name`.*''"),
        ([Named(3)], ValueError, "`name`.*3"),
        ([Named("own", "hard")], ValueError, "`hard_end`.*'own'.*'hard'"),
        ([Spread(score=Named("own"), name="own")], ValueError, "'own'"),
        ([Spread(score=Named("own"), name="aum")], ValueError, "`name`.*'aum'"),
        ([Spread(score=Named("top-two"), name="own")], ValueError, "`name`.*'top-two'"),
        ([Named("own"), Spread(score=Named("own"), name="other")], ValueError, "'own'"),
    ],
)
def test_what_is_no_set_of_statistics_is_an_error(
    statistics: Any, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        DynamicsTracker(N, statistics=statistics)


def test_a_score_is_called_once_per_batch_with_float32_and_valid_classes() -> None:
    calls: list[tuple[Any, ...]] = []

    class Seen:
        name, hard_end = "seen", "low"

        def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
            calls.append((logits.dtype, logits.requires_grad, targets.dtype, targets.tolist()))
            return logits[:, 0]

    score: Any = Seen()
    found = DynamicsTracker(N, statistics=[score, Spread(score=score, name="spread")])
    logits = torch.zeros(2, C, dtype=torch.bfloat16, requires_grad=True)
    found.update(torch.tensor([1, 2]), logits, torch.tensor([0, 3], dtype=torch.int32))
    assert calls == [(torch.float32, False, torch.int64, [0, 3])]
    with pytest.raises(ValueError, match="`targets`.*9.*sample 2"):
        found.update(torch.tensor([1, 2]), logits, torch.tensor([0, 9]))
    assert calls[1][-1] == [0, 3], "a target that is not a class is raised by the tracker"


class Noise:
    """A score that draws from the global generator of each library."""

    hard_end = "high"

    def __init__(self, name: str = "noise", draws: int = 1) -> None:
        self.name, self.draws = name, draws

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        numbers = torch.zeros(len(logits))
        for _ in range(self.draws):
            numbers = torch.rand(len(logits)) + np.random.rand() + random.random()  # noqa: NPY002
        return numbers


def test_random_numbers_of_a_score_are_not_those_of_the_training() -> None:
    found = DynamicsTracker(N, statistics=[Noise()])
    for batch in batches(6):
        before = random_state.state()
        found.update(*batch)
        assert random_state.state() == before


def test_random_numbers_of_a_score_are_new_in_each_batch_and_repeat_after_a_seed() -> None:
    found = DynamicsTracker(2, statistics=[Noise()])
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        for number in range(2):
            found.update(torch.tensor([number]), torch.zeros(1, 2), torch.tensor([0]))
        seen.append(found.scores("noise").tolist())
        found.reset()
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]


def test_no_score_changes_the_random_numbers_of_another_one() -> None:
    seen = []
    for others in ([], [Noise("before", draws=3)]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        found = fed(DynamicsTracker(N, statistics=[*others, Noise()]), batches(6))
        seen.append(found.scores("noise", missing="nan"))
    np.testing.assert_array_equal(*seen)


def test_a_score_that_fails_leaves_the_random_numbers_of_the_training() -> None:
    class Failing(Noise):
        def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
            super().__call__(logits, targets)
            raise KeyError("mine")

    before = random_state.state()
    with pytest.raises(KeyError, match="mine"):
        fed(DynamicsTracker(N, statistics=[Failing()]), batches(6))
    assert random_state.state() == before


def test_random_numbers_of_a_score_continue_from_a_checkpoint() -> None:
    first, second = batches(12)[:6], batches(12)[6:]
    found = fed(DynamicsTracker(N, statistics=[Noise()]), first)
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    whole = fed(found, second).scores("noise", missing="nan")
    torch.rand(3)  # another process is at another place
    file.seek(0)
    resumed = DynamicsTracker(N, statistics=[Noise()])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    np.testing.assert_array_equal(fed(resumed, second).scores("noise", missing="nan"), whole)


class Changing(Entropy):
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.zero_().sum(1)


def test_a_score_that_changes_its_arguments_is_refused_by_name() -> None:
    found = DynamicsTracker(2, statistics=[Changing()])
    with pytest.raises(ValueError, match="'entropy'.*`logits`"):
        found.update(torch.arange(2), torch.ones(2, 3), torch.tensor([0, 1]))
    assert found.presentations.tolist() == [0, 0]


class OneArgument:
    name, hard_end = "one_argument", "high"

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[:, 0]


def test_a_score_that_cannot_take_its_arguments_is_refused_when_it_is_passed() -> None:
    score: Any = OneArgument()
    with pytest.raises(TypeError, match=r"'one_argument'.*targets.*\(self, logits|'one_argument'"):
        DynamicsTracker(2, statistics=[score])
