import copy
import io
import pickle
import random
from collections.abc import Iterator
from math import nan
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset, select

N = 6

# A history with partial epochs, repeats within a batch and empty batches.
histories = st.lists(
    st.lists(st.tuples(st.integers(0, N - 1), st.booleans()), max_size=9), max_size=25
)


def feed(tracker: ForgettingTracker, history: list[list[tuple[int, bool]]]) -> None:
    for batch in history:
        index = torch.tensor([sample for sample, _ in batch], dtype=torch.int64)
        tracker.update_correct(index, torch.tensor([right for _, right in batch], dtype=torch.bool))


def logits_for(targets: Tensor, correct: Tensor, num_classes: int = 3) -> Tensor:
    """Logits that are right where `correct` says so."""
    predicted = torch.where(correct, targets, (targets + 1) % num_classes)
    return nn.functional.one_hot(predicted, num_classes).float() + torch.rand(len(targets), 1)


@given(histories)
def test_counts_equal_the_definition(history: list[list[tuple[int, bool]]]) -> None:
    tracker = ForgettingTracker(N)
    feed(tracker, history)
    counts, learned, presented = references.forgetting(N, (p for batch in history for p in batch))
    assert tracker.counts.tolist() == counts
    assert tracker.learned.tolist() == learned
    assert tracker.presentations.tolist() == presented
    above = max(counts) + 1
    hardest = [
        count if right else max(shown, above)
        for count, right, shown in zip(counts, learned, presented, strict=True)
    ]
    for word, scores in (("zero", counts), ("hardest", hardest)):
        if all(presented):
            assert tracker.scores(word).tolist() == scores
            assert tracker.scores(word).dtype == torch.int64
        else:
            with pytest.raises(ValueError, match=f"{presented.count(0)} of {N}"):
                tracker.scores(word)
        missing = [nan if not shown else s for s, shown in zip(scores, presented, strict=True)]
        found = tracker.scores(word, missing="nan")
        np.testing.assert_array_equal(found, np.array(missing, np.float32))


@given(histories, st.randoms())
def test_update_and_update_correct_agree_on_any_dtype(history: Any, chance: Any) -> None:
    targets = torch.tensor([chance.randrange(3) for _ in range(N)])
    plain = ForgettingTracker(N)
    feed(plain, history)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tracker = ForgettingTracker(N)
        for batch in history:
            index = torch.tensor([sample for sample, _ in batch], dtype=torch.int64)
            correct = torch.tensor([right for _, right in batch], dtype=torch.bool)
            logits = logits_for(targets[index], correct).to(dtype).requires_grad_()
            tracker.update(index, logits, targets[index])
        assert torch.equal(tracker.counts, plain.counts)
        assert torch.equal(tracker.learned, plain.learned)


@given(histories)
def test_one_batch_or_many_give_the_same(history: list[list[tuple[int, bool]]]) -> None:
    many, one, single = (ForgettingTracker(N) for _ in range(3))
    feed(many, history)
    flat = [p for batch in history for p in batch]
    feed(one, [flat])
    feed(single, [[p] for p in flat])
    assert torch.equal(many.counts, one.counts)
    assert torch.equal(many.counts, single.counts)
    assert torch.equal(many.presentations, one.presentations)


def test_a_shuffled_loader_and_a_perfect_classifier_give_no_event() -> None:
    """The released code compares predictions by position and counts 8.07 events a sample here."""
    targets = torch.arange(500) % 10
    data = IndexedDataset(TensorDataset(nn.functional.one_hot(targets, 10).float(), targets))
    loader = DataLoader(data, batch_size=64, shuffle=True)
    tracker = ForgettingTracker(len(data))
    by_position, last = torch.zeros(500), None
    for _ in range(10):
        predictions = []
        for logits, y, index in loader:
            tracker.update(index, logits, y)
            predictions.append(logits.argmax(1))
        predictions = torch.cat(predictions)
        by_position += 0 if last is None else (predictions != last).float()
        last = predictions
    assert tracker.counts.sum() == 0
    assert tracker.presentations.unique().tolist() == [10]
    assert tracker.learned.all()
    assert 7.5 < by_position.mean() < 8.7  # what the positions would have said


def test_indices_that_do_not_follow_their_samples_are_caught() -> None:
    targets = torch.arange(100) % 10
    tracker = ForgettingTracker(100)
    tracker.update(torch.arange(100), torch.zeros(100, 10), targets)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    before = tracker.state_dict()
    with pytest.raises(ValueError, match="`targets`.*sample.*IndexedDataset"):
        tracker.update(torch.arange(100), torch.zeros(100, 10), targets[order])
    after = tracker.state_dict()
    assert torch.equal(before["history"], after["history"]), "a refused batch leaves no trace"
    tracker.update(order, torch.zeros(100, 10), targets[order])


def test_the_first_presentation_is_no_event_and_ties_go_to_the_first_class() -> None:
    tracker = ForgettingTracker(2)
    tracker.update(torch.tensor([0, 1]), torch.zeros(2, 3), torch.tensor([0, 1]))
    assert tracker.counts.tolist() == [0, 0]
    assert tracker.learned.tolist() == [True, False]


def test_a_nan_is_never_right() -> None:
    tracker = ForgettingTracker(3)
    logits = torch.tensor([[nan, nan], [1.0, nan], [nan, 1.0]])
    tracker.update(torch.arange(3), logits, torch.tensor([0, 1, 1]))
    tracker.update(torch.tensor([0]), torch.full((1, 2), -torch.inf), torch.tensor([0]))
    assert not tracker.learned.any()


def test_targets_of_any_integer_dtype_and_index_of_any() -> None:
    tracker = ForgettingTracker(300)
    signed = (torch.int8, torch.int16, torch.int32, torch.int64)
    dtypes = (*signed, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    for dtype in dtypes:
        tracker.update(
            torch.tensor([7], dtype=dtype), torch.eye(3)[[2]], torch.tensor([2], dtype=dtype)
        )
    assert tracker.presentations[7] == len(dtypes)
    assert tracker.counts.sum() == 0


def test_scores_of_runs_add_up_and_never_learned_is_above_every_count() -> None:
    tracker = ForgettingTracker(2)
    for epoch in range(9):
        tracker.update_correct(torch.arange(2), torch.tensor([epoch % 2 == 0, False]))
    assert tracker.scores().tolist() == [4, 9]
    assert (tracker.scores() + tracker.scores()).tolist() == [8, 18]
    assert tracker.scores("zero").tolist() == [4, 0]


def test_never_learned_is_the_hardest_however_often_samples_were_presented() -> None:
    """A sampler with replacement: one is forgotten twenty times, one seldom comes at all."""
    tracker = ForgettingTracker(3)
    for turn in range(40):
        tracker.update_correct(torch.tensor([0]), torch.tensor([turn % 2 == 0]))
    tracker.update_correct(torch.tensor([1, 1, 2]), torch.tensor([False, False, True]))
    assert tracker.scores().tolist() == [20, 21, 0]
    assert select(tracker.scores(), 1 / 3).tolist() == [1]
    assert tracker.scores("zero").tolist() == [20, 0, 0]


@pytest.mark.parametrize("kind", [ForgettingTracker, DynamicsTracker])
def test_scores_of_samples_that_were_never_presented(kind: Any) -> None:
    tracker, train = kind(10), torch.tensor([1, 2, 4, 5, 9])
    with pytest.raises(ValueError, match="`scores`.*10 of 10.*`tracker.attach.*`tracker.watch"):
        tracker.scores()
    for _ in range(2):
        tracker.update(train, torch.eye(2)[train % 2], torch.zeros_like(train))
    with pytest.raises(ValueError, match='5 of 10 .*missing="nan".*among='):
        tracker.scores()
    scores = tracker.scores(missing="nan")
    assert scores.isnan().nonzero()[:, 0].tolist() == [0, 3, 6, 7, 8]
    assert scores[train].tolist() == [2, 0, 0, 2, 2]
    with pytest.raises(ValueError, match="`missing`.*'zero'"):
        tracker.scores(missing="zero")
    tracker.update(torch.arange(10), torch.eye(2)[torch.arange(10) % 2], torch.zeros(10).long())
    assert tracker.scores().dtype == torch.int64


# --- observe -----------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def indexed_data(size: int = 40) -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 4, generator=generator)
    return IndexedDataset(TensorDataset(inputs, (inputs[:, 0] > 0).long()))


def test_observe_judges_the_state_as_it_stands() -> None:
    model, data = small_network(), indexed_data()
    inputs, targets = data.dataset.tensors
    tracker = ForgettingTracker(len(data))
    expected: list[tuple[int, bool]] = []
    for step in range(4):
        with torch.no_grad():
            model[3].weight.add_(torch.randn(3, 8, generator=torch.Generator().manual_seed(step)))
            right = copy.deepcopy(model).eval()(inputs).argmax(1) == targets
        expected += list(enumerate(right.tolist()))
        tracker.observe(model, DataLoader(data, batch_size=7, shuffle=True))
    counts, learned, _ = references.forgetting(len(data), expected)
    assert sum(counts) > 0, "the case should have events"
    assert tracker.counts.tolist() == counts
    assert tracker.learned.tolist() == learned


def test_observe_leaves_no_trace() -> None:
    model, data = small_network(), indexed_data()
    model.train()
    model[1].eval()  # a frozen BatchNorm
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    ForgettingTracker(len(data)).observe(model, DataLoader(data, batch_size=7, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, False, True, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


class Noisy(Dataset[Any]):
    """Draws its augmentation from every kind of generator that there is."""

    def __init__(self) -> None:
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)
        self.old, self.torch = np.random.RandomState(0), torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        own = torch.randn(1, generator=self.torch)
        drawn = [self.python.random(), self.numpy.random(), self.old.random_sample()]
        return torch.tensor([*drawn, float(own)]), i % 3


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_observe_moves_no_generator_of_the_loaders(options: dict[str, Any]) -> None:
    """The training's next batches are those that they would have been."""

    def seen(observed: bool) -> list[Any]:
        torch.manual_seed(0)
        data, order = IndexedDataset(Noisy()), torch.Generator().manual_seed(1)
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(2))
        batches = BatchSampler(sampler, 4, drop_last=False)
        loaders = [
            DataLoader(data, 4, shuffle=True, generator=order, **options),
            DataLoader(data, 4, sampler=sampler),
            DataLoader(data, batch_sampler=batches),
        ]
        tracker, model, found = ForgettingTracker(12), small_network(), []
        for _ in range(2):
            for loader in loaders[: 1 if options else 3]:
                found += [batch for one in loader for batch in one]
                if observed:
                    tracker.observe(model, loader)
        return found

    plain, observed = seen(False), seen(True)
    assert all(torch.equal(*pair) for pair in zip(plain, observed, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m, d, b: (m, d), "`loader`.*IndexedDataset.*DataLoader"),
        (lambda m, d, b: (m, d.dataset), "`loader`.*TensorDataset.*DataLoader"),
        (lambda m, d, b: (b, m), "`model`.*DataLoader.*first"),
        (lambda m, d, b: (m, [([0, 1], torch.zeros(2), torch.arange(2))]), "inputs .* a list of 2"),
    ],
)
def test_arguments_of_observe_that_are_something_else(arguments: Any, message: str) -> None:
    data = indexed_data()
    with pytest.raises(TypeError, match=message):
        ForgettingTracker(40).observe(*arguments(small_network(), data, DataLoader(data, 8)))


def test_a_tracker_in_the_place_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"`num_samples`.*TensorDataset.*`len\(dataset"):
        ForgettingTracker(indexed_data().dataset)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"DynamicsTracker.*`.?scores\(\)`"):
        select(DynamicsTracker(3), 0.5)  # type: ignore[arg-type]


def test_observe_puts_the_mode_back_after_an_error() -> None:
    model = small_network().train()
    with pytest.raises(TypeError, match=r"`loader`.*\(inputs, targets, index\).*list of 2"):
        ForgettingTracker(40).observe(model, DataLoader(indexed_data().dataset, batch_size=8))
    assert model.training
    with pytest.raises(ValueError, match="`loader`"):
        ForgettingTracker(40).observe(model, [])


# --- state -------------------------------------------------------------------------------------


@given(histories, histories)
def test_a_restart_goes_on_as_if_nothing_had_happened(first: Any, second: Any) -> None:
    whole, before = ForgettingTracker(N), ForgettingTracker(N)
    feed(whole, first + second)
    feed(before, first)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = ForgettingTracker(N)
    after.load_state_dict(torch.load(file, weights_only=True))
    feed(after, second)
    assert torch.equal(after.counts, whole.counts)
    assert torch.equal(after.presentations, whole.presentations)
    assert torch.equal(after.learned, whole.learned)


def test_loading_a_state_leaves_an_old_fault_behind() -> None:
    tracker, good = ForgettingTracker(4), ForgettingTracker(4)
    unchecked = torch.compile(tracker.update, fullgraph=True, backend="eager")
    unchecked(torch.tensor([0, 9]), torch.zeros(2, 3), torch.tensor([0, 0]))
    good.update(torch.tensor([1]), torch.zeros(1, 3), torch.tensor([0]))
    tracker.load_state_dict(good.state_dict())
    assert tracker.presentations.tolist() == [0, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ForgettingTracker, DynamicsTracker])
@pytest.mark.parametrize("target", [-100, -1, 3, 1 << 20, -(1 << 40), 1 << 40])
@pytest.mark.parametrize("later", [False, True])
def test_a_target_that_is_no_class_is_refused_by_both(kind: Any, target: int, later: bool) -> None:
    """`ignore_index`, another head's classes; also where nobody looks, and after a good one."""
    shown = max(min(target, (1 << 31) - 1), -(1 << 31))
    index, logits = torch.tensor([2, 3]), torch.eye(3)[:2]
    good, bad = torch.tensor([0, 1]), torch.tensor([0, target])
    tracker, unchecked = kind(4), kind(4)
    if later:
        tracker.update(index, logits, good)
        unchecked.update(index, logits, good)
    with pytest.raises(ValueError, match=rf"`targets`.*{shown}.*sample 3.*keep"):
        tracker.update(index, logits, bad)
    assert tracker.presentations.sum() == 2 * later
    tracker.update(index, logits, good)
    update = torch.compile(unchecked.update, fullgraph=True, backend="eager")
    update(index, logits, bad)
    update(index, logits, good)
    with pytest.raises(ValueError, match=rf"`targets`.*{shown}.*sample 3"):
        unchecked.sync()
    keep = bad.clamp(0, 2) == bad
    kind(4).update(index[keep], logits[keep], bad[keep])


def test_the_target_check_survives_a_restart() -> None:
    tracker = ForgettingTracker(2)
    tracker.update(torch.tensor([1]), torch.zeros(1, 3), torch.tensor([2]))
    again = ForgettingTracker(2)
    again.load_state_dict(tracker.state_dict())
    with pytest.raises(ValueError, match="sample 1 with target 2"):
        again.update(torch.tensor([1]), torch.zeros(1, 3), torch.tensor([0]))


def test_state_dict_is_a_copy_and_reading_changes_nothing() -> None:
    tracker = ForgettingTracker(2)
    tracker.update_correct(torch.tensor([0]), torch.tensor([True]))
    state = tracker.state_dict()
    tracker.counts.add_(7)
    tracker.presentations.add_(7)
    tracker.update_correct(torch.tensor([0]), torch.tensor([False]))
    assert tracker.counts.tolist() == [1, 0]
    tracker.load_state_dict(state)
    assert tracker.counts.tolist() == [0, 0]
    tracker.update_correct(torch.tensor([0]), torch.tensor([False]))
    assert state["history"][0] != tracker.state_dict()["history"][0]


def test_reset_is_as_new() -> None:
    tracker = ForgettingTracker(2)
    tracker.update(torch.tensor([0]), torch.zeros(1, 3), torch.tensor([2]))
    tracker.reset()
    assert tracker.presentations.tolist() == [0, 0]
    tracker.update(torch.tensor([0]), torch.zeros(1, 3), torch.tensor([1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        (
            {"history": torch.zeros(3, dtype=torch.int64)},
            r"2 samples.*history.*\(2,\).*\(3,\)",
        ),
        ({"history": torch.zeros(2)}, "torch.float32"),
        ({"targets": None}, "NoneType"),
    ],
)
def test_a_foreign_state_is_refused_before_anything_changes(
    change: dict[str, Any], message: str
) -> None:
    tracker = ForgettingTracker(2)
    tracker.update_correct(torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(ValueError, match=message):
        tracker.load_state_dict({**ForgettingTracker(2).state_dict(), **change})
    assert tracker.presentations.tolist() == [1, 0]


def test_copies_and_pickles_are_independent() -> None:
    tracker = ForgettingTracker(2)
    tracker.update_correct(torch.tensor([0]), torch.tensor([True]))
    for other in (copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))):
        other.update_correct(torch.tensor([0]), torch.tensor([False]))
        assert other.counts.tolist() == [1, 0]
    assert tracker.counts.tolist() == [0, 0]


@pytest.mark.parametrize("kind", [ForgettingTracker, DynamicsTracker])
def test_a_tracker_sent_to_another_process_shares_no_memory(kind: type[ForgettingTracker]) -> None:
    """As by `mp.spawn` and queues, whose pickler moves tensors into memory that all share."""
    index, targets = torch.arange(2), torch.tensor([0, 1])
    tracker = kind(2)
    tracker.update(index, torch.eye(2), targets)
    sent = bytes(ForkingPickler.dumps(tracker))
    others = [pickle.loads(sent) for _ in range(2)]
    for number, other in enumerate([*others, tracker]):
        for _ in range(number):
            other.update(index, torch.eye(2), targets)
    shown = [int(other.presentations[0]) for other in (*others, tracker)]
    assert shown == [1, 2, 3]
    with pytest.raises(ValueError, match="sample 1 with target 1"):
        others[0].update(torch.tensor([1]), torch.eye(2)[:1], torch.tensor([0]))


def test_state_is_twelve_bytes_a_sample() -> None:
    for size in (1, 1000):
        tensors = [v for v in ForgettingTracker(size).state_dict().values() if torch.is_tensor(v)]
        assert sum(tensor.nbytes for tensor in tensors) == 12 * size


def test_more_presentations_than_fit_are_an_error_not_a_number() -> None:
    tracker = ForgettingTracker(2)
    batch = torch.zeros(1 << 18, dtype=torch.int64)
    flips = torch.arange(1 << 18) % 2 == 0
    for _ in range(3):
        tracker.update_correct(batch, flips)
    tracker.update_correct(batch[:-1], flips[:-1])
    assert tracker.presentations[0] == (1 << 20) - 1
    assert tracker.counts[0] == (1 << 19) - 1
    for times in (1, 1 << 18, 1 << 19, 1 << 20, (1 << 20) - (1 << 18) - 1, 1):  # past 2 ** 21
        for part in torch.arange(times).split(1 << 18):
            tracker.update_correct(batch[: len(part)], flips[: len(part)])
        with pytest.raises(ValueError, match="1048575 times"):
            _ = tracker.counts
    huge = torch.zeros(1 << 21, dtype=torch.int64)
    with pytest.raises(ValueError, match="1048575 rows.*2097152"):
        ForgettingTracker(2).update_correct(huge, huge > 0)


# --- where it runs -----------------------------------------------------------------------------


def test_a_compiled_step_has_no_graph_break() -> None:
    tracker, plain = ForgettingTracker(50), ForgettingTracker(50)
    model = nn.Linear(4, 3)
    compiled = torch.compile(
        lambda x, y, i: tracker.update(i, model(x), y), fullgraph=True, backend="eager"
    )
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (50,), generator=generator)
    for _ in range(20):
        index = torch.randint(50, (8,), generator=generator)
        inputs = torch.randn(8, 4, generator=generator)
        compiled(inputs, targets[index], index)
        plain.update(index, model(inputs), targets[index])
    assert plain.counts.sum() > 0
    assert torch.equal(tracker.counts, plain.counts)


def test_what_a_compiled_step_could_not_raise_is_raised_on_reading() -> None:
    """The way of the GPU: the step does not look, the readers do."""
    for bad, message in (
        (9, r"`index`.*\[0, 4\).*9"),
        (-2, "`index`.*-2"),
        (1, "`targets`.*sample 1"),
    ):
        tracker = ForgettingTracker(4)
        update = torch.compile(
            lambda i, x, y, t=tracker: t.update(i, x, y), fullgraph=True, backend="eager"
        )
        update(torch.tensor([0, 1]), torch.zeros(2, 3), torch.tensor([0, 1]))
        update(torch.tensor([0, bad]), torch.zeros(2, 3), torch.tensor([0, 2]))
        update(torch.tensor([2, 3]), torch.zeros(2, 3), torch.tensor([0, 2]))
        readers: list[Any] = [
            lambda t=tracker: t.scores(),
            lambda t=tracker: t.counts,
            lambda t=tracker: t.learned,
            lambda t=tracker: t.presentations,
            lambda t=tracker: t.state_dict(),
        ]
        for read in readers:
            with pytest.raises(ValueError, match=message):
                read()
        tracker.reset()
        assert tracker.counts.tolist() == [0] * 4


def test_the_state_follows_the_first_batch_and_then_stays() -> None:
    tracker, fixed = ForgettingTracker(2), ForgettingTracker(2, device="cpu")
    index, logits, targets = torch.tensor([0]), torch.eye(3)[[0]], torch.tensor([0])
    tracker.update(index, logits.to("meta"), targets)
    assert repr(tracker) == "ForgettingTracker(2, device='meta')"
    tracker.update(index, logits, targets)
    assert repr(tracker) == "ForgettingTracker(2, device='meta')"
    fixed.update(index, logits, targets)
    assert repr(fixed) == "ForgettingTracker(2, device='cpu')"


def test_a_first_update_in_inference_mode_does_not_spoil_later_ones() -> None:
    for device in ("cpu", "meta"):  # where it is, and where it has to move
        tracker = ForgettingTracker(2)
        logits, targets = torch.eye(3, device=device), torch.zeros(1, dtype=torch.int64)
        with torch.inference_mode():
            tracker.update(torch.tensor([0]), logits[[0]], targets)
        tracker.update(torch.tensor([0]), logits[[1]], targets)
        if device == "cpu":
            assert tracker.counts.tolist() == [1, 0]


@pytest.mark.parametrize("kind", [ForgettingTracker, DynamicsTracker])
def test_a_tracker_made_in_inference_mode_can_be_updated_outside(kind: Any) -> None:
    index, targets = torch.arange(2), torch.tensor([0, 1])
    with torch.inference_mode():
        made = kind(2)
        copied = copy.deepcopy(kind(2))
        loaded = kind(2)
        loaded.load_state_dict(made.state_dict())
    for tracker in (made, copied, loaded):
        tracker.update(index, torch.eye(2), targets)
        tracker.reset()
        tracker.update(index, torch.eye(2).flip(0), targets)
        assert tracker.presentations.tolist() == [1, 1]


def test_autograd_is_left_alone() -> None:
    tracker = ForgettingTracker(2)
    logits = torch.zeros(2, 3, requires_grad=True)
    tracker.update(torch.arange(2), logits, torch.tensor([0, 1]))
    logits.sum().backward()
    assert not tracker.counts.requires_grad
    assert torch.equal(logits.grad, torch.ones(2, 3))  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_training_with_the_tracker_gives_the_same_weights(seed: int) -> None:
    def batches() -> Iterator[Any]:
        yield from DataLoader(indexed_data(), batch_size=7, shuffle=True)

    def weights(tracker: ForgettingTracker | None) -> list[Tensor]:
        model = small_network()
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(2):
            for inputs, targets, index in batches():
                logits = model(inputs)
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, targets).backward()
                optimizer.step()
                if tracker is not None:
                    tracker.update(index, logits, targets)
            if tracker is not None:
                tracker.observe(model, batches())
        return list(model.state_dict().values())

    tracked = weights(tracker := ForgettingTracker(40))
    assert tracker.presentations.unique().tolist() == [4]
    for one, other in zip(tracked, weights(None), strict=True):
        assert torch.equal(one, other)


# --- wrong use ---------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "index": torch.tensor([0, 1]),
    "logits": torch.zeros(2, 3),
    "targets": torch.tensor([0, 1]),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": torch.tensor([0, 5])}, ValueError, r"`index`.*\[0, 5\).*5"),
        ({"index": torch.tensor([-1, 1])}, ValueError, r"`index`.*-1"),
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, "`index`.*torch.float32"),
        ({"index": torch.tensor([True, False])}, TypeError, "`index`.*torch.bool"),
        ({"index": [0, 1]}, TypeError, "`index`.*a list of 2"),
        ({"index": torch.tensor([0])}, ValueError, "`index`.*2 rows of `logits`.*1"),
        ({"index": torch.tensor([[0], [1]])}, ValueError, r"`index`.*\(2, 1\)"),
        ({"index": torch.tensor(0)}, ValueError, r"`index`.*\(B,\).*\(\)"),
        ({"logits": torch.zeros(2)}, ValueError, r"`logits`.*\(B, C\).*\(2,\)"),
        ({"logits": torch.zeros(2, 1)}, ValueError, r"`logits`.*\(2, 1\).*`update_correct`"),
        ({"logits": torch.zeros(2, 3, 4, 4)}, ValueError, "`update_correct`"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "`logits` .*torch.int64"),
        ({"logits": {"logits": 0}}, TypeError, "`logits`.*a dict"),
        ({"targets": torch.tensor([0])}, ValueError, "`targets`.*2 rows.*1"),
        ({"targets": torch.zeros(2)}, TypeError, "`targets`.*torch.float32"),
        ({"targets": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"`targets` .*\(2, 3\)"),
    ],
)
def test_wrong_use_names_the_argument_and_leaves_no_trace(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    tracker = ForgettingTracker(5)
    with pytest.raises(error, match=message):
        tracker.update(**(GOOD | change))
    assert tracker.presentations.sum() == 0


@pytest.mark.parametrize(
    ("index", "correct", "error", "message"),
    [
        (torch.tensor([0]), torch.tensor([1.0]), TypeError, "`correct`.*bool.*torch.float32"),
        (torch.tensor([0]), [True], TypeError, "`correct`.*list of 1"),
        (torch.tensor([0]), torch.tensor([[True]]), ValueError, r"shape \(B,\)"),
        (torch.tensor([0, 1]), torch.tensor([True]), ValueError, "`index`.*1 rows of `correct`.*2"),
        (torch.tensor([7]), torch.tensor([True]), ValueError, r"`index`.*\[0, 5\).*7"),
    ],
)
def test_wrong_use_of_update_correct(
    index: Any, correct: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ForgettingTracker(5).update_correct(index, correct)


def test_wrong_sizes_and_words() -> None:
    with pytest.raises(ValueError, match="`num_samples`.*0"):
        ForgettingTracker(0)
    with pytest.raises(TypeError):
        ForgettingTracker(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`never_learned`.*'easiest'"):
        ForgettingTracker(2).scores("easiest")  # type: ignore[arg-type]
    assert repr(ForgettingTracker(2)) == "ForgettingTracker(2, device='cpu')"
