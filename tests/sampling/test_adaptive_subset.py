"""A coreset that is selected again during training, compared with a loop that does so by hand."""

import io
from itertools import islice
from typing import Any

import pytest
import torch
from helpers import sampling_ranks as worker
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from drophot import (
    AdaptiveSubset,
    FreshSubset,
    IndexedDataset,
    Scored,
    Stratified,
    features,
    k_center,
    select,
)
from drophot.coreset import Evidence
from drophot.sampling import adaptive_subset
from drophot.tracking import Last

N, RATIO, K = worker.N, 0.4, 16
DATA, TARGETS = worker.data(), worker.data().tensors[1]


def train(sampler: Any, model: nn.Module, epochs: int, after: Any = None) -> list[list[int]]:
    """The samples of each epoch; `after` is called with the model after each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = TensorDataset(*DATA.tensors, torch.arange(N))
    shown: list[list[int]] = []
    for _ in range(epochs):
        shown.append([])
        for inputs, targets, index in DataLoader(data, batch_size=4, sampler=sampler):
            shown[-1] += index.tolist()
            model.train()
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if after is not None:
            after(model)
    return shown


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    model.eval()
    return model(DATA.tensors[0])


def margin(logits: Tensor) -> Tensor:
    others = logits.clone()
    others[torch.arange(N), TARGETS] = -torch.inf
    return logits[torch.arange(N), TARGETS] - others.amax(1)


REFERENCES = {
    "loss": lambda logits: F.cross_entropy(logits, TARGETS, reduction="none"),
    "el2n": lambda logits: (logits.softmax(1) - F.one_hot(TARGETS, 3)).norm(dim=1),
    "aum": margin,
    "confidence": lambda logits: logits.softmax(1)[torch.arange(N), TARGETS],
}


@pytest.mark.parametrize("statistic", REFERENCES)
@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_latest_model_selects_every_few_epochs(statistic: Any, every: int) -> None:
    model = worker.network()
    passes: list[Tensor] = []
    sampler = AdaptiveSubset(DATA, model, RATIO, Scored(statistic), every=every)
    shown = train(sampler, model, 6, lambda m: passes.append(REFERENCES[statistic](logits_of(m))))
    assert all(len(set(epoch)) == len(epoch) == K for epoch in shown)
    for epoch in range(every, 6):
        expected = select(passes[epoch // every * every - 1], RATIO)
        assert sorted(shown[epoch]) == expected.tolist(), epoch
    assert all(sorted(epoch) == sorted(shown[0]) for epoch in shown[:every])
    assert len({tuple(epoch) for epoch in shown}) == 6, "in another order in each epoch"


@pytest.mark.parametrize("positions", [range(N - 1, -1, -1), range(5, 25)])
def test_the_samples_of_a_subset_are_those_of_its_positions(positions: Any) -> None:
    model = worker.network()
    part = Subset(IndexedDataset(DATA), list(positions))
    sampler = AdaptiveSubset(part, model, RATIO, Scored("loss"), every=1)
    list(sampler)
    losses = REFERENCES["loss"](logits_of(model))[list(positions)]
    assert sorted(sampler) == select(losses, RATIO).tolist()


def test_forgetting_counts_over_all_selections() -> None:
    model = worker.network()
    right: list[Tensor] = []
    sampler = AdaptiveSubset(DATA, model, RATIO, "high", every=1)
    shown = train(sampler, model, 8, lambda m: right.append(logits_of(m).argmax(1) == TARGETS))
    for epoch in range(1, 8):
        seen = torch.stack(right[:epoch]).int()
        events = (seen.diff(dim=0) < 0).sum(0)
        never = seen.sum(0) == 0
        events[never] = max(epoch, int(events.max()) + 1)
        found = events[shown[epoch]].sort().values
        assert torch.equal(found, events.sort().values[-K:]), "ties aside, the most forgotten"


def test_a_selection_that_failed_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_subset, "_BATCH", N // 2)

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.fails = worker.network(), False

        def forward(self, inputs: Tensor) -> Tensor:
            if self.fails:
                raise KeyboardInterrupt
            return self.network(inputs)

    states = []
    for fails in (False, True):
        model = Interrupted()
        sampler = AdaptiveSubset(DATA, model, RATIO, Scored("variability"), every=1)
        list(sampler)
        if fails:
            handle = model.register_forward_hook(lambda m, *_: setattr(m, "fails", True))
            with pytest.raises(KeyboardInterrupt):  # after the first batch
                list(sampler)
            handle.remove()
            model.fails = False
        list(sampler)
        list(sampler)
        states.append(sampler.state_dict())
    assert states[0]["indices"].tolist() == states[1]["indices"].tolist()
    for name, value in states[0]["tracker"].items():
        other = states[1]["tracker"][name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


def test_variability_and_own_scores_are_over_all_selections() -> None:
    for mode in (Scored("variability"), Scored(Last(score="el2n"))):
        model = worker.network()
        passes: list[Tensor] = []
        sampler = AdaptiveSubset(DATA, model, RATIO, mode, every=2)
        shown = train(sampler, model, 7, lambda m: passes.append(logits_of(m)))  # noqa: B023
        confidence = torch.stack([REFERENCES["confidence"](logits) for logits in passes[1:6:2]])
        own = mode.statistic_name == "last_el2n"
        scores = REFERENCES["el2n"](passes[5]) if own else confidence.std(0, correction=0)
        assert sorted(shown[6]) == select(scores, RATIO).tolist()


class Spy:
    """The mode "k_center", which keeps the seeds that it receives."""

    name, needs = "spy", ("model", "targets")

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        self.seeds.append(seed)
        found = features(evidence.model, evidence.dataset)
        return k_center(found, ratio, targets=evidence.targets, seed=seed).indices


def test_a_selector_of_features_receives_the_model_and_the_classes() -> None:
    model, spy = worker.network(), Spy()
    vectors: list[Tensor] = []
    sampler = AdaptiveSubset(DATA, model, RATIO, spy, every=1)
    shown = train(sampler, model, 4, lambda m: vectors.append(features(m, DATA)))
    assert len(set(spy.seeds)) == 3
    for epoch, seed, found in zip(shown[1:], spy.seeds, vectors, strict=False):
        assert sorted(epoch) == k_center(found, RATIO, targets=TARGETS, seed=seed).indices.tolist()
    model = worker.network()
    short = train(AdaptiveSubset(DATA, model, RATIO, "k_center", every=1), model, 4)
    assert short == shown


class ByGradient:
    """Runs the model as a user may, with gradients and in a mode that it leaves behind."""

    name, needs = "by_gradient", ("model", "targets")

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        assert evidence.model is not None
        assert evidence.scores is None
        evidence.model.eval()
        torch.rand(3)
        norms = []
        for inputs, target, _ in evidence.dataset:
            loss = F.cross_entropy(evidence.model(inputs[None]), target[None])
            norms.append(
                sum(g.norm() for g in torch.autograd.grad(loss, evidence.model.parameters()))
            )
        return torch.stack(norms).topk(K).indices


@pytest.mark.parametrize("mode", ["high", "k_center", Scored("loss"), ByGradient()])
def test_a_selection_changes_neither_the_model_nor_random_numbers(mode: Any) -> None:
    model = worker.network().train()
    model[1].eval()
    sampler = AdaptiveSubset(DATA, model, RATIO, mode, every=1)
    list(sampler)
    before = [value.clone() for value in model.state_dict().values()]
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    list(sampler)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["high", Scored("loss"), "k_center", Scored("variability")])
@pytest.mark.parametrize("stop", [(0, 3), (2, 7), (3, 1), (5, 15)])
def test_it_resumes_in_the_middle_of_an_epoch(mode: Any, stop: tuple[int, int]) -> None:
    def run(stop: tuple[int, int] | None) -> list[list[int]]:
        model = worker.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def new(seed: int = 2) -> AdaptiveSubset:
            return AdaptiveSubset(DATA, model, RATIO, mode, every=2, seed=seed)

        def steps(order: Any) -> None:
            for index in order:
                shown[-1].append(index)
                model.train()
                inputs, targets = DATA[torch.tensor([index, (index + 1) % N])]
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()

        sampler, shown = new(), []
        for epoch in range(6):
            shown.append([])
            if stop is not None and epoch == stop[0]:
                steps(islice(sampler, stop[1]))
                file = io.BytesIO()
                torch.save(sampler.state_dict(), file)
                sampler = new()
                sampler.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            steps(sampler)
        return shown

    assert run(stop) == run(None)


def test_the_first_selection_is_random_and_follows_the_seed() -> None:
    def first(seed: int, mode: Any = "high") -> list[int]:
        return list(AdaptiveSubset(DATA, worker.network(), RATIO, mode, every=1, seed=seed))

    assert first(0) == first(0) == first(0, Scored("loss"))
    assert first(0) != first(1)
    sampler = AdaptiveSubset(DATA, worker.network(), RATIO, "random", every=2)
    epochs = [sorted(sampler) for _ in range(6)]
    assert epochs[0] == epochs[1] != epochs[2] == epochs[3] != epochs[4] == epochs[5]
    assert sampler.indices.tolist() == epochs[5]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"mode": "crest"}, ValueError, "`mode`.*k_center.*'crest'"),
        ({"mode": Stratified(cutoff=0.7)}, ValueError, "cutoff=0.7.*0.4"),
        ({"mode": Scored("aum", Stratified(hard="low", cutoff=0.7))}, ValueError, "cutoff=0.7"),
        ({"every": 0}, ValueError, "`every`.* 0"),
        ({"every": 1.5}, TypeError, "`every`.*1.5"),
        ({"ratio": 40}, ValueError, "`ratio`.*40"),
        ({"model": worker.network}, TypeError, "`model`.*function"),
        ({"dataset": TensorDataset(torch.ones(0, 2))}, ValueError, "`dataset`"),
        ({"rank": 1}, ValueError, "`rank`.*rank=1"),
    ],
)
def test_wrong_arguments_are_named(change: Any, error: Any, match: str) -> None:
    arguments = {"dataset": DATA, "model": worker.network(), "ratio": RATIO, "every": 1}
    with pytest.raises(error, match=match):
        AdaptiveSubset(**(arguments | change))


def test_a_state_of_other_settings_is_refused() -> None:
    def new(mode: Any = "high", every: int = 2) -> AdaptiveSubset:
        return AdaptiveSubset(DATA, worker.network(), RATIO, mode, every=every)

    for other, match in (
        (new("low"), "mode=high.*mode=low"),
        (new(every=1), "every=2.*every=1"),
        (FreshSubset(N, RATIO), "without.*indices"),
    ):
        with pytest.raises(ValueError, match=f"`state_dict`.*AdaptiveSubset.*{match}"):
            new().load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="`num_replicas`.* 1, got 2"):
        list(AdaptiveSubset(DATA, worker.network(), RATIO, every=1, num_replicas=2))
