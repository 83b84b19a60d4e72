"""A loop that knows nothing of indices, against one that calls `update` itself."""

import copy
import pickle
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset

SIZE, EPOCHS = 50, 3
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def samples() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(1))
    return inputs, (inputs[:, 0] > 0).long()


class Dicts(Dataset[Any]):
    def __init__(self, target: str = "labels") -> None:
        self.target = target

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        inputs, targets = samples()
        return {"inputs": inputs[i], self.target: targets[i]}


def tuples() -> Dataset[Any]:
    return TensorDataset(*samples())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))


class Training:
    """A user's loop: a step of one's own, and whatever else happens in it."""

    def __init__(self, model: nn.Module | None = None, **loader: Any) -> None:
        self.model = network() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9)
        self.loader = {"batch_size": 8, "shuffle": True, **loader}

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(x)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), y).backward()
        self.optimizer.step()
        return logits

    def explicit(self, dataset: Dataset[Any]) -> DynamicsTracker:
        tracker = DynamicsTracker(SIZE)
        torch.manual_seed(5)
        for _ in range(EPOCHS):
            for x, y, index in DataLoader(IndexedDataset(dataset), **self.loader):
                tracker.update(index, self.step(x, y), y)
        return tracker

    def watched(self, dataset: Dataset[Any]) -> DynamicsTracker:
        tracker = DynamicsTracker(SIZE)
        torch.manual_seed(5)
        with tracker.attach(self.model):
            for _ in range(EPOCHS):
                for x, y in tracker.watch(DataLoader(IndexedDataset(dataset), **self.loader)):
                    self.step(x, y)
        return tracker


def assert_same(one: ForgettingTracker, other: ForgettingTracker) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, column in states[0].items():
        assert torch.equal(torch.as_tensor(column), torch.as_tensor(states[1][name])), name
    assert one.presentations.sum() > 0


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def drive(loader: Any, call: Callable[[Tensor], Any]) -> None:
    for x, _ in loader:
        call(x)


class Accumulated(Training):
    """Gradients of three batches to a step."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(x)
        (nn.functional.cross_entropy(logits, y) / 3).backward()
        self.batches += 1
        if self.batches % 3 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return logits


class SecondForward(Training):
    """Sharpness-aware, adversarial: the same batch again with other weights, before the step."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(x)
        nn.functional.cross_entropy(logits, y).backward()
        nn.functional.cross_entropy(self.model(x + 0.1), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model(x[:3])
        return logits


class Evaluated(Training):
    """Validation before and after the batch's own forward."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.evaluate()
        logits = super().step(x, y)
        self.evaluate()
        return logits

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(samples()[0])
        self.model.train()


class MixedPrecision(Training):
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(x)
            assert logits.dtype == torch.bfloat16
            loss = nn.functional.cross_entropy(logits, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return logits


class Closure(Training):
    """An optimiser that calls the model itself, several times a step."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def closure() -> float:
            self.optimizer.zero_grad()
            seen.append(self.model(x))
            loss = nn.functional.cross_entropy(seen[-1], y)
            loss.backward()
            return loss.item()

        torch.optim.LBFGS(self.model.parameters(), max_iter=3).step(closure)
        assert len(seen) > 1
        return seen[0]


@pytest.mark.parametrize(
    "kind", [Training, Accumulated, SecondForward, Evaluated, MixedPrecision, Closure]
)
def test_the_same_counts_and_weights_as_with_update_in_the_loop(kind: type[Training]) -> None:
    explicit, watched = kind(), kind()
    assert_same(watched.watched(tuples()), explicit.explicit(tuples()))
    assert_same_weights(watched.model, explicit.model)
    untracked = kind()
    torch.manual_seed(5)
    for _ in range(EPOCHS):
        for x, y in DataLoader(tuples(), **untracked.loader):
            untracked.step(x, y)
    assert_same_weights(untracked.model, watched.model)


def test_workers() -> None:
    explicit, watched = (Training(num_workers=2, persistent_workers=True) for _ in range(2))
    assert_same(watched.watched(tuples()), explicit.explicit(tuples()))
    assert_same_weights(watched.model, explicit.model)


@pytest.mark.gpu
def test_workers_and_pinned_memory_on_a_gpu() -> None:
    inputs, targets = samples()
    model, tracker = network().cuda(), DynamicsTracker(SIZE)
    loader = DataLoader(
        IndexedDataset(TensorDataset(inputs, targets)), 8, num_workers=2, pin_memory=True
    )
    with tracker.attach(model):
        for x, y in tracker.watch(loader):
            assert x.is_pinned()
            assert y.is_pinned()
            model(x.cuda(non_blocking=True))
    assert tracker.presentations.device.type == "cuda"
    assert tracker.presentations.unique().tolist() == [1]
    assert tracker.columns()["target"].tolist() == targets.tolist()


@pytest.mark.parametrize("order", ["compiled then attached", "attached then compiled", "in place"])
def test_compiled_models(order: str) -> None:
    torch.compiler.reset()
    explicit, watched = Training(), Training()
    expected = explicit.explicit(tuples())
    tracker, model = DynamicsTracker(SIZE), watched.model
    options: dict[str, Any] = {"fullgraph": True, "backend": "eager"}
    if order == "compiled then attached":
        watched.model = torch.compile(model, **options)  # type: ignore[assignment]
        tracker.attach(watched.model)
    else:
        tracker.attach(model)
        if order == "in place":
            model.compile(**options)
        else:
            watched.model = torch.compile(model, **options)  # type: ignore[assignment]
    torch.manual_seed(5)
    for _ in range(EPOCHS):
        for x, y in tracker.watch(DataLoader(IndexedDataset(tuples()), **watched.loader)):
            watched.step(x, y)
            watched.model.eval()
            watched.model(x)
            watched.model.train()
    assert_same(tracker, expected)
    assert_same_weights(model, explicit.model)


def test_dict_batches() -> None:
    """As Hugging Face's, by any of the usual names."""
    tracker = DynamicsTracker(SIZE)
    explicit = Training().explicit(tuples())
    for name in ("labels", "label", "target", "targets"):
        training = Training()
        torch.manual_seed(5)
        tracker.reset()
        with tracker.attach(training.model):
            for _ in range(EPOCHS):
                loader = DataLoader(IndexedDataset(Dicts(name)), **training.loader)
                for batch in tracker.watch(loader):
                    assert batch.keys() == {"inputs", name}
                    training.step(batch["inputs"], batch[name])
        assert_same(tracker, explicit)


def test_batches_of_other_kinds() -> None:
    """Whatever comes keeps its type, and the loader's own batch is left as it was."""
    index, targets = torch.arange(2), torch.tensor([0, 1])
    x = torch.zeros(2, 4)
    model, tracker = network(), ForgettingTracker(2)
    batches: list[Any] = [
        (x, targets, index),
        [x, targets, index],
        UserDict(inputs=x, labels=targets, index=index),
        {"inputs": x, "labels": targets, "index": index},
    ]
    seen = []
    with tracker.attach(model):
        for batch in tracker.watch(batches):
            seen.append(batch)
            model(x)
    assert [type(batch) for batch in seen] == [tuple, list, UserDict, dict]
    assert [len(batch) for batch in seen] == [2] * 4
    assert [len(batch) for batch in batches] == [3] * 4
    assert tracker.presentations.tolist() == [4, 4]


def test_targets_that_only_the_caller_can_find() -> None:
    tracker, model = ForgettingTracker(2), network()
    species, index = torch.tensor([0, 1]), torch.arange(2)
    x = torch.zeros(2, 4)
    with tracker.attach(model):
        batches: list[Any] = [{"x": x, "species": species, "labels": x, "index": index}]
        for batch in tracker.watch(batches, targets=lambda batch: batch["species"]):
            model(batch["x"])
        for _ in tracker.watch([(x, x, species, index)], targets=lambda batch: batch[2]):
            model(x)
    assert tracker.presentations.tolist() == [2, 2]
    with pytest.raises(ValueError, match="sample 0 with target 0"):
        tracker.update(index, torch.zeros(2, 2), species.flip(0))


class Answer(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inside, self.wrap = nn.Linear(4, 2), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inside(x))


@pytest.mark.parametrize(
    ("wrap", "logits", "named"),
    [
        (lambda z: {"logits": z}, lambda o: o["logits"], "a dict with the keys logits from Answer"),
        (lambda z: (z, 0), lambda o: o[0], "a tuple of 2 from Answer"),
        (lambda z: UserDict(a=z), lambda o: o["a"], "a UserDict with the keys a"),
    ],
)
def test_outputs_that_are_no_logits(wrap: Any, logits: Any, named: str) -> None:
    model, tracker = Answer(wrap), ForgettingTracker(2)
    batch = (torch.zeros(2, 4), torch.tensor([0, 1]), torch.arange(2))
    with tracker.attach(model), pytest.raises(TypeError, match=f"{named}.*logits=lambda output"):
        drive(tracker.watch([batch]), model)
    assert tracker.presentations.tolist() == [0, 0]
    with tracker.attach(model, logits=logits):
        drive(tracker.watch([batch]), model)
    assert tracker.presentations.tolist() == [1, 1]


def test_a_break_out_of_an_epoch() -> None:
    training, tracker = Training(), ForgettingTracker(SIZE)
    loader = DataLoader(IndexedDataset(tuples()), batch_size=10)
    with tracker.attach(training.model):
        for number, (x, y) in enumerate(tracker.watch(loader)):
            training.step(x, y)
            if number == 1:
                break
        training.model(samples()[0])  # something else, in training mode
        assert tracker.presentations.tolist() == [1] * 20 + [0] * 30
        for number, (x, y) in enumerate(tracker.watch(loader)):
            if number == 2:  # this one is left out
                break
            training.step(x, y)
        training.model(samples()[0][:10])
    assert tracker.presentations.tolist() == [2] * 20 + [0] * 30


def test_batches_that_are_left_out() -> None:
    training, tracker = Training(), ForgettingTracker(SIZE)
    with tracker.attach(training.model):
        loader = tracker.watch(DataLoader(IndexedDataset(tuples()), batch_size=10))
        for number, (x, y) in enumerate(loader):
            if number % 2:
                training.step(x, y)
    assert tracker.presentations.view(5, 10)[:, 0].tolist() == [0, 1, 0, 1, 0]


def test_nothing_is_counted_without_a_handle() -> None:
    training, tracker = Training(), ForgettingTracker(SIZE)
    handle = tracker.attach(training.model)
    loader = tracker.watch(DataLoader(IndexedDataset(tuples()), batch_size=10))
    for x, y in loader:
        training.step(x, y)
    handle.remove()
    with pytest.warns(UserWarning, match="[Nn]o batch of this pass"):
        drive(loader, training.model)
    assert tracker.presentations.unique().tolist() == [1]


def test_a_model_that_stays_in_evaluation_mode_is_noticed() -> None:
    tracker, model = ForgettingTracker(SIZE), network().eval()
    with tracker.attach(model), pytest.warns(UserWarning, match="called in training mode"):
        drive(tracker.watch(DataLoader(IndexedDataset(tuples()), batch_size=10)), model)
    assert not tracker.presentations.any()


def test_no_batches_no_warning() -> None:
    assert list(ForgettingTracker(3).watch([])) == []


def test_the_loader_is_still_there() -> None:
    loader = DataLoader(IndexedDataset(tuples()), batch_size=8)
    watched = ForgettingTracker(SIZE).watch(loader)
    assert len(watched) == 7
    assert watched.sampler is loader.sampler
    assert watched.dataset.dataset is loader.dataset.dataset
    with pytest.raises(AttributeError, match="colour"):
        _ = watched.colour
    pickle.dumps(watched)


def test_copies_and_pickles_of_a_model_are_not_tracked() -> None:
    """An average of the weights, or the model on disk."""
    training, tracker = Training(), ForgettingTracker(SIZE)
    with tracker.attach(training.model):
        copies = [copy.deepcopy(training.model), pickle.loads(pickle.dumps(training.model))]
        for x, y in tracker.watch(DataLoader(IndexedDataset(tuples()), batch_size=10)):
            before = tracker.presentations
            for other in copies:
                other(x)
            assert torch.equal(tracker.presentations, before)
            training.step(x, y)
    assert tracker.presentations.unique().tolist() == [1]
    for other in copies:
        (hook,) = other._forward_hooks.values()
        assert hook.tracker is None, "nor do they carry the tracker's memory with them"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2), "a tensor of torch.float32.*IndexedDataset"),
        ([torch.zeros(2)], "a list of 1.*IndexedDataset"),
        ({"inputs": torch.zeros(2)}, "a dict with the keys inputs"),
        ([torch.zeros(2), torch.zeros(2)], "index.*integers.*a tensor of torch.float32"),
        ([torch.zeros(2), [0, 1]], "index.*integers.*a list of 2"),
        ([torch.zeros(2), torch.tensor([0, 1])], "pair.*a list of 1.*`targets=lambda"),
        ([0, 0, 0, torch.tensor([0, 1])], "a list of 3.*`targets=lambda"),
        ({"x": 0, "index": torch.tensor([0])}, "the keys x.*`targets=lambda"),
        (
            {"label": 0, "target": 0, "index": torch.tensor([0])},
            "the keys label, target.*`targets=lambda",
        ),
    ],
)
def test_batches_that_cannot_be_taken_apart(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        next(iter(ForgettingTracker(3).watch([batch])))


def test_part_of_a_batch_is_an_error_not_a_guess() -> None:
    model, tracker = network(), ForgettingTracker(SIZE)
    loader = DataLoader(IndexedDataset(tuples()), batch_size=10)
    with tracker.attach(model), pytest.raises(ValueError, match="5 rows of logits .* batch of 10"):
        drive(tracker.watch(loader), lambda x: model(x[:5]))
    assert not tracker.presentations.any()


def test_a_wrong_index_is_an_error_in_the_forward_on_a_cpu() -> None:
    model, tracker = network(), ForgettingTracker(9)
    loader = DataLoader(IndexedDataset(tuples()), batch_size=10)
    with tracker.attach(model), pytest.raises(ValueError, match=r"`index`.*\[0, 9\).*9"):
        drive(tracker.watch(loader), model)


def test_attach_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"`model`.*torch\.nn\.Module.*function"):
        ForgettingTracker(3).attach(lambda x: x)


def batches_of(loader: Any) -> Iterator[Any]:
    yield from loader


def test_wrappers_that_do_not_read_ahead() -> None:
    """tqdm, enumerate, islice and generators hand batches on one at a time."""
    tqdm = pytest.importorskip("tqdm")
    training, tracker = Training(), ForgettingTracker(SIZE)
    loader = DataLoader(IndexedDataset(tuples()), batch_size=10)
    with tracker.attach(training.model):
        for x, y in tqdm.tqdm(batches_of(tracker.watch(loader)), disable=True):
            training.step(x, y)
    assert tracker.presentations.unique().tolist() == [1]
