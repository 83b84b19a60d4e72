"""Whose logits are counted: those of the batch, whatever else the loop does, or it is an error."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset

SIZE, B = 24, 8


def made(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.float(), (x[:, 0] > 0).long()


X, Y = made(1)
OTHER_X, OTHER_Y = made(2)


def loader(x: Tensor = X, y: Tensor = Y, **options: Any) -> DataLoader[Any]:
    return DataLoader(IndexedDataset(TensorDataset(x, y)), batch_size=B, **options)


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def assert_counted(tracker: DynamicsTracker, x: Tensor, y: Tensor, times: int = 1) -> None:
    """As if the network had been called on each sample, in evaluation mode, and `update`."""
    expected = DynamicsTracker(SIZE)
    for _ in range(times):
        for part in torch.arange(SIZE).split(B):
            expected.update(part, network()(x[part]), y[part])
    assert tracker.presentations.unique().tolist() == [times]
    for name in ("aum", "loss"):
        torch.testing.assert_close(tracker.scores(name), expected.scores(name))


def drive(batches: Iterable[Any], call: Callable[[Any], object]) -> None:
    for x, _ in batches:
        call(x)


Loop = Callable[[nn.Module, Iterable[Any]], None]


def second_forward(change: Callable[[Tensor], Tensor]) -> Loop:
    def loop(model: nn.Module, batches: Iterable[Any]) -> None:
        for x, _ in batches:
            model(x)
            model(change(x))

    return loop


def changed(change: Callable[[Tensor], Tensor]) -> Loop:
    def loop(model: nn.Module, batches: Iterable[Any]) -> None:
        for x, _ in batches:
            z = change(x)
            model(z)
            model(z)  # and once more, as sharpness-aware optimisers do

    return loop


def ahead(depth: int) -> Loop:
    """As a prefetcher: it holds some batches before the first is trained on."""

    def loop(model: nn.Module, batches: Iterable[Any]) -> None:
        held, rest = [], iter(batches)
        while held or depth:
            while len(held) <= depth and (batch := next(rest, None)) is not None:
                held.append(batch)
            if not held:
                return
            model(held.pop(0)[0])

    return loop


def recomputed(model: nn.Module, batches: Iterable[Any]) -> None:
    rest = iter(batches)
    now = next(rest, None)
    while now is not None:
        x = now[0].requires_grad_()
        loss = checkpoint(model, x, use_reentrant=True).square().sum()  # type: ignore[union-attr]
        now = next(rest, None)  # read while the device works
        loss.backward()  # runs the forward again


def before(change: Callable[[Tensor], Tensor]) -> Loop:
    def loop(model: nn.Module, batches: Iterable[Any]) -> None:
        for number, (x, _) in enumerate(batches):
            model(change(OTHER_X[number * B :][:B]))
            model(change(x))

    return loop


def lookahead(batches: Iterable[Any]) -> Iterator[Any]:
    """Each batch once the next is there, as a loop that asks whether it is the last."""
    previous = None
    for batch in batches:
        if previous is not None:
            yield previous
        previous = batch
    yield previous


COUNTED: dict[str, Loop] = {
    "plain": changed(lambda x: x),
    "a view": changed(lambda x: x.view(B, 2, 2).flatten(1)),
    "a copy": changed(lambda x: x.clone()),
    "another dtype and back": changed(lambda x: x.double().float()),
    "read ahead": ahead(1),
    "read far ahead": ahead(2),
    "recomputed": recomputed,
    "adversarial": second_forward(lambda x: x + 0.1),
    "a part": second_forward(lambda x: x[:3]),
    "other data afterwards": second_forward(lambda x: OTHER_X[: len(x)]),
    "pseudo-labels first": before(lambda x: x),
    "pseudo-labels first, in copies": before(torch.clone),
    "flattened copies": changed(lambda x: x.clone().view(B, 2, 2).flatten(1)),
    "a lookahead of one": lambda model, batches: drive(lookahead(batches), model),
    "all of them read first": lambda model, batches: drive(list(batches), model),
    "in another order": lambda model, batches: drive(list(batches)[::-1], model),
}


@pytest.mark.filterwarnings("ignore:No batch of this pass")  # at the end of those read first
@pytest.mark.parametrize("name", COUNTED)
def test_the_batchs_own_logits_are_counted(name: str) -> None:
    model, tracker = network(), DynamicsTracker(SIZE)
    with tracker.attach(model):
        for _ in range(2):
            COUNTED[name](model, tracker.watch(loader()))
    assert_counted(tracker, X, Y, times=2)


def test_what_the_loop_has_changed_is_counted_if_the_caller_says_that_it_changes() -> None:
    model, tracker = network(), DynamicsTracker(SIZE)
    with tracker.attach(model, changed=True):
        changed(lambda x: 2 * x + 1)(model, tracker.watch(loader()))
    assert_counted(tracker, 2 * X + 1, Y)


def ahead_and_changed(model: nn.Module, batches: Iterable[Any]) -> None:
    rest = (2 * x for x, _ in batches)
    held = [next(rest), next(rest)]
    for x in itertools.chain(held, rest):
        model(x)


def instead(model: nn.Module, batches: Iterable[Any]) -> None:
    for number, (x, _) in enumerate(batches):
        model(OTHER_X[:B] if number == 1 else x)


WRONG: dict[str, Loop] = {
    "rows in another order": changed(lambda x: x.flip(0)),
    "normalised, and nobody said so": changed(lambda x: 2 * x),
    "other data instead of the batch": instead,
    "joined with other data": changed(lambda x: torch.cat([x, x + 1])),
    "pseudo-labels first, then joined with them": lambda model, batches: drive(
        batches, lambda x: (model(OTHER_X[: len(x)]), model(torch.cat([x, OTHER_X[: len(x)]])))
    ),
    "pseudo-labels first, all of it normalised": before(lambda x: 2 * x),
    "read ahead and changed": ahead_and_changed,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.filterwarnings("ignore:No batch of this pass")
def test_what_cannot_be_told_apart_is_an_error(name: str, mode: str) -> None:
    model, tracker = network(), DynamicsTracker(SIZE)
    tracker.attach(model)
    called: Any = model
    if mode == "compiled":
        torch.compiler.reset()
        called = torch.compile(model, fullgraph=True, backend="eager")

    def work() -> None:
        WRONG[name](called, tracker.watch(loader()))
        tracker.scores("aum")

    with pytest.raises(ValueError, match=r"`watch`.*update\(index, logits, targets\)"):
        work()


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.clone()])
@pytest.mark.parametrize("nested", [False, True])
def test_two_trackers_on_one_model(change: Callable[[Tensor], Tensor], nested: bool) -> None:
    """Domain adaptation, replay, semi-supervision: each counts its own batches."""
    inner = network()
    model = nn.Sequential(inner) if nested else inner
    one, two = DynamicsTracker(SIZE), DynamicsTracker(SIZE)
    with one.attach(inner), two.attach(model):
        for (x, _), (z, _) in zip(
            one.watch(loader()), two.watch(loader(OTHER_X, OTHER_Y)), strict=True
        ):
            model(change(z))
            model(change(x))
            model(change(z))
    assert_counted(one, X, Y)
    assert_counted(two, OTHER_X, OTHER_Y)


def test_two_trackers_on_one_model_and_inputs_that_nobody_knows() -> None:
    model, one, two = network(), DynamicsTracker(SIZE), DynamicsTracker(SIZE)
    pairs = zip(one.watch(loader()), two.watch(loader()), strict=True)
    with one.attach(model), two.attach(model), pytest.raises(ValueError, match="`update"):
        drive(pairs, lambda pair: model(2 * pair[0]))
    assert not one.presentations.any()
    with pytest.raises(ValueError, match="`update"):
        _ = two.presentations
    assert not two.presentations.any()


def test_two_trackers_on_two_models_do_not_meet() -> None:
    """Co-teaching: both normalise their batches."""
    trackers, models = [DynamicsTracker(SIZE) for _ in range(2)], [network(), network()]
    for tracker, model in zip(trackers, models, strict=True):
        tracker.attach(model, changed=True)
    for (x, _), (z, _) in zip(*(t.watch(loader()) for t in trackers), strict=True):
        models[0](2 * x)
        models[1](2 * z)
    for tracker in trackers:
        assert_counted(tracker, 2 * X, Y)


def test_two_loaders_of_one_tracker() -> None:
    """Labelled and unlabelled parts of one data set."""
    model, tracker = network(), DynamicsTracker(SIZE)
    data = IndexedDataset(TensorDataset(X, Y))
    parts = [DataLoader(Subset(data, range(start, SIZE, 2)), batch_size=B) for start in (0, 1)]
    with tracker.attach(model):
        for (x, _), (z, _) in zip(*(tracker.watch(part) for part in parts), strict=True):
            model(z)
            model(x)
    assert_counted(tracker, X, Y)


def test_a_batch_that_was_left_out_is_not_counted_for_another() -> None:
    model, tracker = network(), DynamicsTracker(SIZE)
    with tracker.attach(model):
        for number, (x, _) in enumerate(tracker.watch(loader())):
            if number != 1:
                model(x.clone())
    assert tracker.presentations.view(3, B)[:, 0].tolist() == [1, 0, 1]


def test_keyword_inputs_and_mappings_are_recognised() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.inside(x * mask)

    data = [{"x": x, "mask": torch.ones(4), "labels": y} for x, y in zip(X, Y, strict=True)]
    model, tracker = Model(), DynamicsTracker(SIZE)
    batches = DataLoader(IndexedDataset(data), batch_size=B)  # type: ignore[arg-type]
    with tracker.attach(model):
        walk = iter(tracker.watch(batches))
        held = [next(walk) for _ in range(3)]  # all of them, with masks that are alike
        for batch in held:
            model(x=batch["x"].clone(), mask=batch["mask"].clone())
    assert_counted(tracker, X, Y)


def test_what_compiled_code_noted_last_is_not_lost() -> None:
    """The loop ends, and the tracker is read later."""
    torch.compiler.reset()
    model, tracker = network(), DynamicsTracker(SIZE)
    tracker.attach(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    limited(compiled, tracker.watch(loader()))
    assert tracker.presentations.sum() == 2 * B
    batches = iter(tracker.watch(loader()))
    next(batches)
    compiled(OTHER_X[:B])
    with pytest.raises(ValueError, match="`update"):
        _ = tracker.presentations
    tracker.reset()
    assert not tracker.presentations.any()


# --- the loader --------------------------------------------------------------------------------


class Files(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == 9:
            raise OSError("broken file")
        return X[i], Y[i]


def test_an_error_of_the_loader_does_not_end_the_pass() -> None:
    def read(batches: Iterator[Any]) -> int:
        found = 0
        while True:
            try:
                x, _ = next(batches)
            except StopIteration:
                return found
            except OSError:
                continue
            model(x)
            found += 1

    model, tracker = network(), DynamicsTracker(SIZE)
    with tracker.attach(model):
        watched = tracker.watch(DataLoader(IndexedDataset(Files()), batch_size=B))
        assert read(iter(watched)) == 2
    assert tracker.presentations.view(3, B)[:, 0].tolist() == [1, 0, 1]


class Endless:
    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(loader() for _ in itertools.count())


def whole(model: nn.Module, watched: Iterable[Any]) -> None:
    for x, _ in watched:
        model(x)


def left(model: nn.Module, watched: Iterable[Any]) -> None:
    for number, (x, _) in enumerate(watched):
        model(x)
        if number == 1:
            break


def limited(model: nn.Module, watched: Iterable[Any]) -> None:
    for x, _ in itertools.islice(watched, 2):
        model(x)


def by_hand(model: nn.Module, watched: Iterable[Any]) -> None:
    batches = iter(watched)
    for _ in range(2):
        model(next(batches)[0])


ENDS = {"whole": whole, "break": left, "islice": limited, "next": by_hand}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("source", [loader, Endless])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_counted_is_said_at_any_end_and_once(end: str, source: Any, training: bool) -> None:
    if end == "whole" and source is Endless:
        return
    model, tracker = network().train(training), ForgettingTracker(SIZE)
    with tracker.attach(model), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ENDS[end](model, tracker.watch(source()))
    assert ["No batch" in str(one.message) for one in found] == [True] * (not training)


def test_nothing_counted_is_said_while_an_endless_pass_goes_on() -> None:
    model, tracker = network(), ForgettingTracker(SIZE)
    batches = iter(tracker.watch(Endless()))
    with pytest.warns(UserWarning, match="No batch of this pass") as found:
        drive(itertools.islice(batches, 200), model)
    assert found[0].filename == __file__
    handle = tracker.attach(model)
    for _ in range(3):
        model(next(batches)[0])
    handle.remove()
    assert tracker.presentations.sum() == SIZE
    other = iter(tracker.watch(Endless()))
    for _ in range(2):
        next(other)
    with pytest.warns(UserWarning, match="No batch of this pass") as found:
        tracker.scores()
    assert found[0].filename == __file__


def test_batches_that_are_shown_again_are_not_silently_uncounted() -> None:
    model, tracker = network(), ForgettingTracker(SIZE)
    with tracker.attach(model):
        batches = itertools.cycle(tracker.watch(loader()))
        for _ in range(3):
            model(next(batches)[0])
        with pytest.warns(UserWarning, match=r"3 batches.*`itertools\.cycle`") as found:
            drive(itertools.islice(batches, 6), model)
        assert found[0].filename == __file__


def test_indices_that_several_data_sets_share_are_refused() -> None:
    one, two = (IndexedDataset(TensorDataset(X, Y)) for _ in range(2))
    joined = ConcatDataset([one, Subset(two, range(4))])
    whole = IndexedDataset(ConcatDataset([one.dataset, two.dataset]))
    parts = ConcatDataset([Subset(one, range(4)), Subset(one, range(4, SIZE))])
    tracker = ForgettingTracker(2 * SIZE)
    for data in (joined, Subset(joined, range(3)), joined + one):
        with pytest.raises(ValueError, match=r"2 IndexedDatasets|3 IndexedDatasets"):
            tracker.watch(DataLoader(data))
        with pytest.raises(ValueError, match="IndexedDatasets"):
            tracker.observe(network(), DataLoader(data))
    for good in (whole, parts, Subset(whole, [0])):
        tracker.watch(DataLoader(good))


# --- tensors that cannot be counted ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:No batch of this pass", "ignore:.*torch.jit.script")
@pytest.mark.parametrize("kind", ["grad", "jvp", "vmap"])
def test_transforms_of_torch_func_are_refused_in_a_sentence(kind: str) -> None:
    model, tracker = network(), DynamicsTracker(SIZE)
    weights = dict(model.named_parameters())

    def loss(weights: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    plain = {name: weight.detach() for name, weight in weights.items()}
    transforms = {
        "grad": lambda x: torch.func.grad(loss)(plain, x),
        "jvp": lambda x: torch.func.jvp(lambda w: loss(w, x), (plain,), (plain,)),
        "vmap": lambda x: torch.func.vmap(loss, in_dims=(None, 0))(plain, x[:, None]),
    }
    with tracker.attach(model), pytest.raises(RuntimeError, match=r"`torch\.func`.*`update`"):
        drive(tracker.watch(loader()), transforms[kind])
    assert not tracker.presentations.any()


def test_a_shared_mask_is_no_evidence() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network()

        def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
            return self.inside(x * mask)

    model, tracker = Model(), DynamicsTracker(SIZE)
    data = [{"x": x, "mask": torch.ones(1), "labels": y} for x, y in zip(X, Y, strict=True)]
    with tracker.attach(model):
        for b in tracker.watch(DataLoader(IndexedDataset(data), batch_size=B)):  # type: ignore[arg-type]
            model(b["x"] + 1, b["mask"], b["labels"])  # a noisy view first
            model(b["x"], b["mask"], b["labels"])
    assert_counted(tracker, X, Y)


def test_a_state_that_is_loaded_between_batch_and_forward_costs_no_batch() -> None:
    model, tracker = network(), ForgettingTracker(SIZE)
    saved = tracker.state_dict()
    with tracker.attach(model):
        for number, (x, _) in enumerate(tracker.watch(loader())):
            if number == 0:
                tracker.load_state_dict(saved)
            model(x)
    assert tracker.presentations.tolist() == [1] * SIZE


def test_the_first_batch_of_an_iterator_that_nobody_keeps() -> None:
    model, tracker = network(), ForgettingTracker(SIZE)
    with tracker.attach(model):
        model(next(iter(tracker.watch(loader())))[0])
    assert tracker.presentations.sum() == B
