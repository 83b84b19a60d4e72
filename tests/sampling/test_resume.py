"""Samplers and loaders that stop within an epoch, and several ranks that share an epoch."""

import io
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sampling_ranks as worker
from helpers.processes import ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from drophot import AdaptiveSubset, CrestLoader, FreshSubset, LossSampling
from drophot._core.ratios import num_kept


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=30)
@given(st.integers(1, 40), st.floats(0.05, 1), st.integers(0, 60))
def test_a_fresh_subset_goes_on_where_it_was(total: int, ratio: float, stop: int) -> None:
    whole, part = FreshSubset(total, ratio), FreshSubset(total, ratio)
    epochs = [list(whole) for _ in range(3)]
    list(part)
    epoch = iter(part)
    before = list(islice(epoch, stop))
    again = FreshSubset(total, ratio)
    again.load_state_dict(saved(part.state_dict()))
    if stop >= len(whole):  # the loop has seen the last sample
        assert list(again) == epochs[2]
    else:
        assert before + (list(again) if stop else []) == epochs[1][: len(before)] + (
            epochs[1][stop:] if stop else []
        )
        assert list(again) == epochs[2 if stop else 1]


@given(st.integers(1, 40), st.floats(0.05, 1), st.integers(1, 6))
def test_ranks_share_a_subset_in_equal_parts(total: int, ratio: float, count: int) -> None:
    whole = list(FreshSubset(total, ratio))
    parts = [FreshSubset(total, ratio, num_replicas=count, rank=rank) for rank in range(count)]
    shares = [list(part) for part in parts]
    assert {len(share) for share in shares} == {len(parts[0])} == {-(-len(whole) // count)}
    together = [index for step in zip(*shares, strict=True) for index in step]
    assert together[: len(whole)] == whole
    assert set(together) == set(whole)


def as_torchdata(sampler: Any, state: Any) -> Any:
    """An iterator as the batch sampler of torchdata's StatefulDataLoader resumes one."""
    sampler.load_state_dict(state["sampler"])
    epoch = iter(sampler)
    epoch.load_state_dict(state["iterator"])
    return epoch


@pytest.mark.parametrize("stop", [0, 1, 7, 12, 13])
@pytest.mark.parametrize("kind", ["fresh", "by loss"])
def test_the_protocol_of_torchdata(kind: str, stop: int) -> None:
    def new() -> Any:
        fresh = FreshSubset(40, 0.3)
        return fresh if kind == "fresh" else LossSampling(40, 0.3).sampler()

    sampler, part = new(), new()
    epochs = [list(sampler) for _ in range(3)]
    list(part)
    epoch = iter(part)
    before = list(islice(epoch, stop))
    state = {"sampler": part.state_dict(), "iterator": epoch.state_dict()}
    again = new()
    resumed = as_torchdata(again, saved(state))
    assert before + list(resumed) == epochs[1], "also after the last sample of the epoch"
    assert list(again) == epochs[2]


@pytest.mark.parametrize("kind", [FreshSubset, LossSampling, AdaptiveSubset, CrestLoader])
@pytest.mark.parametrize("batch_size", [3, 4, 5])  # of 12 samples: the last batch is full, or not
def test_a_loop_that_is_killed_after_any_batch_sees_the_same_batches(
    kind: Any, batch_size: int
) -> None:
    data = TensorDataset(torch.randn(40, 3), torch.arange(40) % 2)
    model = nn.Linear(3, 2)
    ratio, epochs = 0.3, 3

    def new() -> Any:
        if kind is CrestLoader:
            return CrestLoader(data, model, ratio, batch_size=batch_size)
        if kind is AdaptiveSubset:
            return AdaptiveSubset(data, model, ratio, "high", every=2)
        return kind(40, ratio)

    def loader(sampler: Any) -> Any:
        if kind is CrestLoader:
            return ([index] for *_, index, _ in sampler)
        sampler = sampler.sampler() if kind is LossSampling else sampler
        return DataLoader(TensorDataset(torch.arange(40)), batch_size, sampler=sampler)

    sampler, shown, states = new(), [], []
    for epoch in range(epochs):
        for (index,) in loader(sampler):
            shown.append(index.tolist())
            state = saved(sampler.state_dict())
            states.append((state, epoch + (state["yielded"] == 0)))
    assert len(shown) == epochs * -(-12 // batch_size)
    for number, (state, done) in enumerate(states, 1):
        sampler = new()
        sampler.load_state_dict(state)
        rest = [index.tolist() for _ in range(done, epochs) for (index,) in loader(sampler)]
        assert shown[:number] + rest == shown, number


def assert_equal(one: Any, other: Any) -> None:
    """Nested states that may hold tensors."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    else:
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def losses_of(index: torch.Tensor, epoch: int) -> torch.Tensor:
    return worker.losses_of(index, epoch)


@pytest.mark.parametrize("own_order", [True, False])
def test_sampling_by_loss_goes_on_where_it_was(own_order: bool) -> None:
    data = TensorDataset(torch.arange(50))

    def train(stop: int | None) -> list[list[int]]:
        order = torch.Generator().manual_seed(3)
        inner = None if own_order else RandomSampler(data, generator=order)
        sampling = LossSampling(50, 0.5)
        shown: list[list[int]] = []
        for epoch in range(4):
            loader = DataLoader(data, batch_size=5, sampler=sampling.sampler(inner))
            shown.append([])
            for number, (index,) in enumerate(loader):
                shown[-1] += index.tolist()
                sampling.update(index, losses_of(index, epoch))
                if epoch == 2 and number == stop:
                    state = saved(sampling.state_dict())
                    sampling = LossSampling(50, 0.5)
                    sampling.load_state_dict(state)
                    loader = DataLoader(data, batch_size=5, sampler=sampling.sampler(inner))
                    for (rest,) in loader:
                        assert (sampling.weights(rest) > 0).all()
                        shown[-1] += rest.tolist()
                        sampling.update(rest, losses_of(rest, epoch))
                    break
        return shown

    assert train(1) == train(None)
    assert all(len(epoch) == 25 for epoch in train(1))


def test_workers_request_samples_in_advance_and_the_loop_says_how_many_it_had() -> None:
    sampler = FreshSubset(40, 0.5)
    whole = list(FreshSubset(40, 0.5))
    list(islice(sampler, 16))  # requested
    state = {**sampler.state_dict(), "yielded": 8}  # received
    again = FreshSubset(40, 0.5)
    again.load_state_dict(state)
    assert list(again) == whole[8:]


def test_crest_goes_on_where_it_was() -> None:
    def train(stop: int | None) -> tuple[list[Any], list[torch.Tensor]]:
        model = worker.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

        def loader() -> CrestLoader:
            return CrestLoader(worker.data(), model, batch_size=6, subset=0.3, threshold=0.01)

        crest, shown = loader(), []
        for epoch in range(3):
            resume = False
            while True:
                for number, (inputs, targets, index, weights) in enumerate(crest):
                    losses = F.cross_entropy(model(inputs), targets, reduction="none")
                    optimizer.zero_grad()
                    (losses * weights).mean().backward()
                    optimizer.step()
                    shown.append((index.tolist(), weights.tolist()))
                    if epoch == 1 and number == stop and not resume:
                        resume = True
                        break
                else:
                    break
                state = saved(crest.state_dict())
                crest = loader()
                crest.load_state_dict(state)
        return shown, [p.detach() for p in model.parameters()]

    (shown, weights), (again, others) = train(None), train(2)
    assert again == shown
    assert all(torch.equal(*pair) for pair in zip(weights, others, strict=True))
    state = CrestLoader(worker.data(), worker.network(), batch_size=6).state_dict()
    other = CrestLoader(worker.data(), worker.network(), batch_size=4)
    with pytest.raises(ValueError, match="CrestLoader.*batch_size=4.*batch_size=6"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("subset_size=36", {"subset": 0.9}),
        ("threshold=0.7", {"threshold": 0.7}),
        ("interval=5.0", {"interval": 5}),
        ("seed=9", {"seed": 9}),
    ],
)
def test_crest_refuses_a_state_of_other_arguments(name: str, changes: dict[str, Any]) -> None:
    data = TensorDataset(torch.randn(40, 3), torch.arange(40) % 2)

    def loader(**changes: Any) -> CrestLoader:
        return CrestLoader(data, nn.Linear(3, 2), 0.5, batch_size=4, **changes)

    with pytest.raises(ValueError, match=f"CrestLoader.*{name}"):
        loader(**changes).load_state_dict(loader().state_dict())


def test_the_selection_for_another_model_is_refused() -> None:
    inputs = worker.data()[0][0].numel()
    other = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 7), nn.Linear(7, 4))
    loader = CrestLoader(worker.data(), other, batch_size=6)
    next(iter(loader))
    count = sum(weight.numel() for weight in other.parameters())
    again = CrestLoader(worker.data(), worker.network(), batch_size=6)
    before = again.state_dict()["selection"]["selections"]
    with pytest.raises(ValueError, match=f"`state_dict`.*{count}"):
        again.load_state_dict(loader.state_dict())
    assert again.state_dict()["selection"]["selections"] == before == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FreshSubset(9, 0.5, seed=1), "FreshSubset.*seed=1.*seed=0"),
        (lambda: FreshSubset(9, 0.4), "FreshSubset.*ratio=0.4.*ratio=0.5"),
        (lambda: FreshSubset(9, 0.5, num_replicas=2), "num_replicas=2.*num_replicas=1"),
        (lambda: LossSampling(9, 0.5), "LossSampling.*losses"),
    ],
)
def test_a_state_of_another_sampler_is_refused(make: Callable[[], Any], match: str) -> None:
    sampler = FreshSubset(9, 0.5)
    next(iter(sampler))
    with pytest.raises(ValueError, match=f"`state_dict`.*{match}"):
        make().load_state_dict(sampler.state_dict())


def test_ranks_that_do_not_exist_are_named() -> None:
    for kind in (FreshSubset, LossSampling):
        with pytest.raises(ValueError, match="`rank`.*rank=2.*num_replicas=2"):
            kind(9, 0.5, num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="`num_replicas`.* 6.* 4"):
        CrestLoader(worker.data(), worker.network(), batch_size=6, num_replicas=4)
    with pytest.raises(RuntimeError, match="`num_replicas`.* 1, got 2"):
        LossSampling(9, 0.5, num_replicas=2).begin()


def test_ranks_see_one_epoch_together(tmp_path: Path) -> None:
    ranks(2, worker.main, tmp_path, folder=tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = worker.by_loss(1, 0)
    size = num_kept(worker.N, 0.4)
    for epoch in range(worker.EPOCHS):
        for name, expected in (
            ("fresh", worker.fresh(1, 0)[epoch]),
            ("whole", alone["shown"][epoch]),
            ("resumed", alone["shown"][epoch]),
        ):
            parts = [
                rank[name][epoch] if name == "fresh" else rank[name]["shown"][epoch]
                for rank in found
            ]
            together = [index for step in zip(*parts, strict=True) for index in step]
            assert together[:size] == expected, (name, epoch)
    assert "`features` must be finite" in found[0]["failed"]
    assert re.search("Rank 0 .*ValueError.*`features` must be finite", found[1]["failed"])
    assert found[0]["failed crest"] == "broken model"
    assert "Rank 0" in found[1]["failed crest"]
    for rank in found:
        losses = (part["losses"].nan_to_num(-1) for part in (rank["resumed"], alone))
        assert torch.equal(*losses)
        assert "orders differ" in rank["orders"]
        assert "`sync`" in rank["unmerged"]
        assert re.search("`num_replicas`.* 2, got 1.*'high'", rank["without ranks"])
        assert sorted(rank["random"]) == sorted(found[0]["random"])
        assert rank["run"] == 2
    for mode in ("high", "k_center"):
        one, other = (rank[mode] for rank in found)
        for epoch, parts in enumerate(zip(one["shown"], other["shown"], strict=True)):
            assert len(parts[0]) == len(parts[1]) == size // 2, (mode, epoch)
            assert len(set(parts[0]) | set(parts[1])) == size, "shares of one selection"
        assert torch.equal(one["state"].pop("indices"), other["state"].pop("indices"))
        trackers = [part["state"].pop("tracker") for part in (one, other)]
        assert_equal(*trackers)
        assert (trackers[0] is None) == (mode == "k_center")
        assert one["state"] == other["state"]
    one, other = (rank["crest"] for rank in found)
    assert one["selections"] == other["selections"] > 2
    assert all(len(index) == 3 for index in one["indices"])
    assert one["indices"] != other["indices"]
    for name, value in one["state"]["selection"].items():
        if torch.is_tensor(value):
            assert torch.equal(value, other["state"]["selection"][name]), name


def test_the_state_of_another_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`state_dict` .*FreshSubset.* losses"):
        FreshSubset(10, 0.5).load_state_dict(LossSampling(10, 0.5).state_dict())
    state = FreshSubset(10, 0.5).state_dict()
    del state["epoch"]
    with pytest.raises(ValueError, match=r"`state_dict` .*FreshSubset.* without epoch"):
        FreshSubset(10, 0.5).load_state_dict(state)
