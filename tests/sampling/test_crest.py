"""CREST, held against its definitions written plainly: medoids, gradient, curvature, check."""

from itertools import islice
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from drophot import CrestLoader, IndexedDataset, fit
from drophot.sampling.batched_medoids import medoids


def data(size: int = 240, width: int = 4, classes: int = 3) -> TensorDataset:
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, width, generator=draws)
    return TensorDataset(inputs, inputs[:, :classes].argmax(1))


def network(width: int = 4, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, classes))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    inputs, targets, _, weights = batch
    optimizer.zero_grad()
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    (losses * weights).mean().backward()
    optimizer.step()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


class Spy(CrestLoader):
    """Remembers the subsets and Hutchinson's draws, for the plain reference."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.subsets: list[list[Tensor]] = []
        self.draws: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def _select(self) -> None:
        self.subsets, self.draws = [], []
        super()._select()

    def _subset(self) -> list[Tensor]:
        self.subsets.append(super()._subset())
        return self.subsets[-1]

    def _random_signs(self, like: Tensor) -> Tensor:
        self.draws.append(super()._random_signs(like))
        return self.draws[-1]


class Plain:
    """The paper's definitions, a sample and a mini-batch at a time."""

    def __init__(self, given: TensorDataset, model: nn.Module, steps: int) -> None:
        self.inputs, self.targets = given.tensors
        self.model, self.steps = model, steps
        self.gradients: list[Tensor] = []
        self.curvatures: list[Tensor] = []
        self.norms: list[float] = []

    def select(
        self, subsets: list[list[Tensor]], draws: list[Tensor], m: int, batches: Tensor
    ) -> None:
        self.batches, self.weights = [], []
        for parts, found in zip(subsets, batches.tolist(), strict=True):
            batch, weights = [], []
            for part in parts:
                # Two samples that are each other's nearest have one gain: either is the medoid.
                chosen = [part.tolist().index(sample) for sample in found if sample in part]
                due = m * len(part) / sum(map(len, parts))
                assert abs(len(chosen) - due) < 1, "what is left over goes by chance"
                errors = self.errors(part).numpy()
                weights += references.weights_of_medoids(errors, chosen)
                batch += part[chosen].tolist()
            self.batches.append(batch)
            self.weights.append(np.array(weights) / np.mean(weights))
        parameters = list(self.model.parameters())
        each = len(parameters)
        gradient = curvature = torch.zeros_like(flat(parameters))
        for number, (batch, weights) in enumerate(zip(self.batches, self.weights, strict=True)):
            losses = [
                w * F.cross_entropy(self.model(self.inputs[i : i + 1]), self.targets[i : i + 1])
                for i, w in zip(batch, weights.tolist(), strict=True)
            ]
            loss = torch.stack(losses).sum() / len(batch)
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
            gradient = gradient + flat(grads).detach() / len(self.batches)
            z = flat(draws[number * each : (number + 1) * each])
            bent = flat(torch.autograd.grad(flat(grads) @ z, parameters))
            curvature = curvature + z * bent / len(self.batches)
        self.gradients.append(gradient)
        self.curvatures.append(curvature)
        times = len(self.gradients)
        slope = square = torch.zeros_like(gradient)
        for g, h in zip(self.gradients, self.curvatures, strict=True):
            slope, square = 0.9 * slope + 0.1 * g, 0.999 * square + 0.001 * h**2
        self.slope = slope / (1 - 0.9**times)
        self.bend = (square / (1 - 0.999**times)) ** 0.5
        self.norms.append(float(self.bend.norm()))
        self.every = ceil(min(self.norms[0] / self.norms[-1], self.steps))
        self.check_on = torch.cat(subsets[0])
        self.start, self.origin = self.loss(), flat(parameters).detach().clone()

    def errors(self, places: Tensor) -> Tensor:
        rows = self.model(self.inputs[places]).softmax(1).detach()
        return rows - torch.eye(3)[self.targets[places]]

    def loss(self) -> float:
        return F.cross_entropy(
            self.model(self.inputs[self.check_on]), self.targets[self.check_on]
        ).item()

    def off(self) -> float:
        delta = flat(list(self.model.parameters())).detach() - self.origin
        modelled = self.start + self.slope @ delta + 0.5 * delta @ (self.bend * delta)
        return abs(float(modelled) - self.loss()) / self.loss()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "seed"), [(0.1, 0), (0.1, 1), (0.5, 0), (0.5, 1)])
def test_crest_is_its_definition_step_by_step(lr: float, seed: int) -> None:
    """Choices, weights, gradient, curvature, intervals and decisions, along a whole training."""
    given, model = data(), network()
    loader = Spy(given, model, 0.5, batch_size=8, subset=0.2, threshold=0.05, seed=seed)
    plain = Plain(given, model, len(loader))
    optimizer = sgd(model, lr)
    selections = since = checks = 0
    for _ in range(4):
        for batch in loader:
            # What the loader has done before it gave this batch:
            due = selections and since % plain.every == 0
            checks += bool(due)
            if not selections or (due and plain.off() > 0.05):
                plain.select(loader.subsets, loader.draws, 8, loader._batches)
                selections, since = selections + 1, 0
            since += 1
            assert (loader.selections, loader.checks) == (selections, checks)
            assert loader.check_every == plain.every
            torch.testing.assert_close(loader._gradient, plain.slope, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(loader._curvature, plain.bend, rtol=1e-3, atol=1e-4)
            index = batch[2].tolist()
            number = [sorted(b) for b in plain.batches].index(sorted(index))
            expected = dict(zip(plain.batches[number], plain.weights[number], strict=True))
            for sample, weight in zip(index, batch[3].tolist(), strict=True):
                assert weight == pytest.approx(expected[sample], rel=1e-5)
            step(model, optimizer, batch)
    assert selections > 1, "the model has moved on"
    assert checks > selections or lr > 0.1, "and stayed for a while"


def test_every_set_and_interval_follows_the_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    """T1 = ceil(h H0 / H), at most an epoch, and P = min(5 T1, steps an epoch)."""
    model = network()
    loader = CrestLoader(data(), model, batch_size=8, subset=0.2, interval=2.0)
    norms = iter([4.0, 4.0, 1.0, 100.0, 1e-9, 0.0])
    scale = [0.0]
    monkeypatch.setattr(loader, "_is_outdated", lambda: True)
    real = loader._model_loss

    def bent(device: torch.device) -> None:
        # A curvature of known size: the square's average is set as if all had been this one.
        scale[0] = next(norms)
        real_sqrt = Tensor.sqrt
        monkeypatch.setattr(
            Tensor, "sqrt", lambda t: torch.full_like(t, scale[0] / t.numel() ** 0.5)
        )
        real(device)
        monkeypatch.setattr(Tensor, "sqrt", real_sqrt)

    monkeypatch.setattr(loader, "_model_loss", bent)
    found = []
    for _ in range(6):
        loader._select()
        found.append((len(loader._batches), loader.check_every))
    steps = len(loader)
    assert steps == 30
    # P follows the interval that was there when it was chosen.
    assert found == [(5, 2), (10, 2), (10, 8), (30, 1), (5, steps), (30, steps)]


def test_the_gradient_is_counted_once_and_nobodys_gradient_is_touched() -> None:
    given, model = data(), network()
    before = [torch.randn_like(p) for p in model.parameters()]
    for parameter, value in zip(model.parameters(), before, strict=True):
        parameter.grad = value.clone()
    loader = CrestLoader(given, model, 0.1, batch_size=6, subset=0.2)
    next(iter(loader))
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, value)
    inputs, targets = given.tensors
    total = torch.zeros_like(loader._gradient)
    for places, weights in zip(loader._batches, loader._weights, strict=True):
        model.zero_grad()
        losses = F.cross_entropy(model(inputs[places]), targets[places], reduction="none")
        (losses * weights).mean().backward()
        total += flat([p.grad for p in model.parameters()]) / len(loader._batches)
    torch.testing.assert_close(loader._gradient, total)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99), st.data())
@settings(max_examples=30)
def test_medoids_of_many_groups_are_those_of_each(
    size: int, subsets: int, seed: int, draw: st.DataObject
) -> None:
    lengths = draw.draw(st.lists(st.integers(1, size), min_size=1, max_size=3))
    wanted = [[draw.draw(st.integers(0, length)) for length in lengths] for _ in range(subsets)]
    chance = np.random.default_rng(seed)
    groups = [[torch.tensor(chance.random((n, 3))) for n in lengths] for _ in range(subsets)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "drophot.sampling.batched_medoids._MAX_DISTANCES",
            draw.draw(st.sampled_from([1, 1 << 24])),
        )
        chosen, weights = medoids(groups, wanted)
    assert len(chosen) == len(weights) == subsets
    for group, places, counts, sizes in zip(groups, chosen, weights, wanted, strict=True):
        for part, place, count, many in zip(group, places, counts, sizes, strict=True):
            assert len(place) == len(count) == many
            if many:
                points = part.numpy()
                away = references.apart(points, points)
                for number in range(many):  # of two equal gains either will do
                    gains = references.facility_gains(points, place[:number].tolist(), away.max())
                    assert gains[place[number]] == pytest.approx(gains.max(), abs=1e-9)
                owner = away[:, place.numpy()].argmin(1)
                owner[place.numpy()] = np.arange(many)
                assert count.tolist() == [(owner == k).sum() for k in range(many)]


def test_random_subsets_have_every_class_in_its_proportion() -> None:
    targets = torch.tensor(300 * [0] + 90 * [1] + 10 * [2])
    given = TensorDataset(torch.randn(400, 4), targets)
    loader = Spy(given, network(), batch_size=10, subset=0.1)
    next(iter(loader))
    seen = set()
    for parts in loader.subsets:
        assert [len(part) for part in parts] == [30, 9, 1]
        for kind, part in enumerate(parts):
            assert len(part.unique()) == len(part)
            assert (targets[part] == kind).all()
            seen |= set(part.tolist())
    assert len(seen) > 100, "each subset is another one"


@pytest.mark.slow
def test_every_class_is_trained_on_in_its_proportion_however_rare() -> None:
    """More classes than places in a batch, and one of few samples: none is left out for good."""
    sizes = [100] * 8 + [1000, 3]
    targets = torch.arange(10).repeat_interleave(torch.tensor(sizes))
    given = TensorDataset(torch.randn(len(targets), 4), targets)
    loader = CrestLoader(given, network(classes=10), batch_size=6, subset=0.02)
    seen = torch.zeros(10)
    for _ in range(100):
        loader._select()
        seen += targets[loader._batches].flatten().bincount(minlength=10)
    assert (seen > 0).all()
    due = torch.tensor(sizes) / len(targets) * seen.sum()
    assert (seen[:9] / due[:9] - 1).abs().max() < 0.25


def test_a_long_tail_takes_no_more_memory_than_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [[torch.randn(size, 3) for size in (400, *[5] * 30)]]
    held = []
    real = torch.cdist

    def watch(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        held.append(a.shape[0] * a.shape[1] ** 2)
        return real(a, b, **options)

    monkeypatch.setattr(torch, "cdist", watch)
    medoids(groups, [[40, *[1] * 30]])
    assert sum(held) == 400**2 + 30 * 5**2


def test_equal_vectors_have_a_medoid_each_that_stands_for_itself() -> None:
    (chosen,), (weights,) = medoids([[torch.zeros(6, 2)]], [[3]])
    assert sorted(chosen[0].tolist()) == [0, 1, 2]
    assert weights[0].sum() == 6
    assert (weights[0] >= 1).all()


def test_a_training_that_has_diverged_goes_on() -> None:
    for wrong in (float("nan"), 1e30):
        model = network()
        loader = CrestLoader(data(), model, batch_size=8, subset=0.2)
        steps = 0
        for _ in loader:
            steps += 1
            if steps == 2:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.fill_(wrong)
        assert steps == len(loader)
        assert loader.check_every == 1


def test_attention_has_the_second_derivatives() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.encoder(inputs[:, None])[:, 0])

    loader = CrestLoader(data(60), Attends(), batch_size=8, subset=0.5)
    next(iter(loader))
    assert loader.selections == 1
    assert loader._curvature.norm() > 0


def test_a_model_without_second_derivatives_is_named() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags, self.head = nn.EmbeddingBag(10, 5), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.bags(inputs.abs().mul(3).long().clamp(0, 9)))

    with pytest.raises(RuntimeError) as caught:
        next(iter(CrestLoader(data(), Bags(), batch_size=8, subset=0.2)))
    note = caught.value.__notes__[0]
    for word in ("second derivatives", "`model`", "Bags"):
        assert word in note


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.eye(3)[torch.arange(30) % 3], TypeError, "`targets` .*float32"),
        (torch.rand(30), TypeError, "`targets` .*float32"),
        (torch.arange(30) % 2 * 2 - 1, ValueError, "`dataset`.* -1"),
    ],
)
def test_targets_that_are_no_classes_are_refused_at_once(targets, error, message) -> None:
    with pytest.raises(error, match=message):
        CrestLoader(TensorDataset(torch.randn(30, 4), targets), network())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_small_integers_are_classes_too(dtype: torch.dtype) -> None:
    given = TensorDataset(torch.randn(30, 4), (torch.arange(30) % 3).to(dtype))
    _, targets, _, _ = next(iter(CrestLoader(given, network(), batch_size=6)))
    assert len(targets) == 6


def test_a_random_transform_leaves_the_world_outside_alone() -> None:
    class Augmented(Dataset[Any]):
        targets = list(range(3)) * 20

        def __len__(self) -> int:
            return 60

        def __getitem__(self, place: int) -> Any:
            return torch.randn(4), self.targets[place]

    model = network()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    CrestLoader(Augmented(), model, batch_size=6)
    assert torch.rand(1) == expected


def test_a_batch_is_what_the_dataset_has_at_its_index() -> None:
    given = data()
    for dataset in (given, IndexedDataset(given), list(zip(*given.tensors, strict=True))):
        for inputs, targets, index, weights in CrestLoader(dataset, network(), 0.2, batch_size=5):
            assert torch.equal(inputs, given.tensors[0][index])
            assert torch.equal(targets, given.tensors[1][index])
            assert weights.mean().item() == pytest.approx(1)
            assert len(weights) == 5
    part = Subset(IndexedDataset(given), [7, 9, 100, 101, 102])
    for inputs, _, index, _ in CrestLoader(part, network(), batch_size=2):
        assert torch.equal(inputs, given.tensors[0][index]), "indices are the original ones"


class Noisy(Dataset[Any]):
    """Random augmentation, which must not be frozen."""

    targets = torch.arange(50) % 2

    def __len__(self) -> int:
        return 50

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.randn(4), place % 2


def test_data_that_is_augmented_is_read_anew() -> None:
    loader = CrestLoader(Noisy(), network(classes=2), batch_size=10, subset=1.0)
    first, second = islice(iter(loader), 2)
    assert first[0].shape == second[0].shape == (10, 4)
    same = [i for i in first[2].tolist() if i in second[2].tolist()]
    for sample in same:
        a, b = (part[0][part[2] == sample] for part in (first, second))
        assert not torch.equal(a, b)


def test_an_epoch_is_as_long_as_one_on_a_share_and_goes_on_where_the_last_ended() -> None:
    loader = CrestLoader(data(), network(), 0.25, batch_size=8)
    assert len(loader) == ceil(60 / 8) == len(list(loader))
    selections = loader.selections
    list(loader)
    assert loader.selections == selections, "a model that is not trained has not moved on"
    assert loader.checks == 2 * len(loader) - 1


def test_the_model_and_the_global_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    for _ in CrestLoader(data(), model, 0.1, batch_size=8):
        pass
    assert torch.equal(torch.rand(1), (torch.manual_seed(3), torch.rand(1))[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_one_seed_gives_one_training() -> None:
    def trained(seed: int) -> Tensor:
        model = network()
        loader = CrestLoader(data(), model, 0.3, batch_size=8, seed=seed)
        fit(model, loader, 3, optimizer=sgd(model))
        return flat([p.detach() for p in model.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_it_trains_a_network_with_parameters_that_are_frozen_or_unused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    model[0].weight.requires_grad_(False)
    loader = CrestLoader(data(), model, batch_size=8)
    for _ in range(5):
        for batch in loader:
            step(model, sgd(model, 0.5), batch)
    inputs, targets = data().tensors
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.7


def test_it_is_no_dataset_and_works_beside_a_dataloader() -> None:
    assert not isinstance(CrestLoader(data(), network()), DataLoader)
    assert not hasattr(CrestLoader, "__getitem__"), "by which fit tells a loader from a dataset"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "`ratio` .* 0"),
        ({"subset": 2}, ValueError, "`subset` .* 2"),
        ({"batch_size": 0}, ValueError, "`batch_size` .* 0"),
        ({"batch_size": 1.5}, TypeError, "float"),
        ({"threshold": -1}, ValueError, "`threshold` .*-1"),
        ({"interval": 0}, ValueError, "`interval` .* 0"),
        ({"dataset": TensorDataset(torch.zeros(0, 4), torch.zeros(0))}, ValueError, "at least one"),
        ({"model": nn.Flatten()}, ValueError, "`model`.* Flatten"),
    ],
)
def test_wrong_input_is_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CrestLoader(**({"dataset": data(), "model": network()} | arguments))
