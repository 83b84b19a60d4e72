"""A training loop of the user's own: one call with equal steps, and checks of what it reads."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from math import ceil
from typing import Any

import pytest
import torch
from helpers.runs import TRAIN, drop_hot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

from drophot import fit, training

pytestmark = pytest.mark.filterwarnings("ignore:.*leave no sample of classes")


def every(batches: Any) -> Iterator[tuple[Tensor, ...]]:
    yield from batches


def loop(
    model: nn.Module,
    dataset: Any,
    epochs: int,
    *,
    optimizer: Any,
    batch_size: int,
    seed: int,
    on_batch: Any,
    on_epoch: Any,
    read: Callable[[Any], Iterator[tuple[Tensor, ...]]] = every,
    is_reported: Callable[[int], bool] = lambda _: True,
    reported: Callable[[Tensor], Tensor] = lambda index: index,
) -> None:
    """A loop that may read a loader wrongly, or report some batches or other indices."""
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        batches = partial(training.batches, dataset, batch_size, torch.device("cpu"), shuffle=order)
        whole = batches() if read is every else read(batches)
        for number, (inputs, targets, index, *_) in enumerate(whole):
            logits = model(inputs)
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
            if on_batch is not None and is_reported(number):
                on_batch(reported(index), logits.detach(), targets)
        on_epoch(epoch)


@pytest.mark.parametrize("mode", ["random", "fresh_subset", "crest", "loss_sampling"])
def test_a_scheduler_made_in_fit_schedules_all_of_the_equal_steps(mode: str) -> None:
    calls: list[tuple[int, list[float]]] = []

    def scheduled(
        model: nn.Module, dataset: Any, epochs: int, *, optimizer: Any, **rest: Any
    ) -> None:
        rates: list[float] = []
        optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        calls.append((epochs, rates))
        scheduler = CosineAnnealingLR(optimizer, T_max=max(epochs, 1))
        fit(model, dataset, epochs, optimizer=optimizer, scheduler=scheduler, **rest)

    run = drop_hot(mode=mode, data_ratio=0.55, equal_steps=True, fit=scheduled)
    run.select()
    calls.clear()
    run.train()
    ((epochs, rates),) = calls
    assert epochs == run.train_epochs
    assert len(rates) == epochs * ceil(120 / 16)
    assert min(rates) > 0


def twice(batches: Any) -> Iterator[tuple[Tensor, ...]]:
    return chain(batches(), batches())


def half(batches: Any) -> Iterator[tuple[Tensor, ...]]:
    return islice(batches(), 2)


@pytest.mark.parametrize(("read", "found"), [(twice, 8), (half, 2)])
@pytest.mark.parametrize("mode", ["fresh_subset", "crest", "loss_sampling"])
def test_a_loop_that_does_not_read_each_batch_once_is_refused(
    mode: str, read: Any, found: int
) -> None:
    run = drop_hot(mode=mode, fit=partial(loop, read=read))
    run.select()
    with pytest.raises(RuntimeError, match=rf"`fit`.*`dataset`.* 4, .* {found} .*`train`"):
        run.train()


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"is_reported": lambda number: number > 0}, r"16 samples.* 0 that"),
        ({"reported": lambda index: torch.zeros_like(index)}, r"loss_sampling"),
        ({"reported": lambda index: index.flip(0)[:8].repeat(2)[: len(index)]}, r"loss_sampling"),
    ],
    ids=["no first batch", "always sample 0", "half of each batch twice"],
)
def test_loss_sampling_needs_the_losses_of_each_batch(wrong: Any, found: str) -> None:
    run = drop_hot(mode="loss_sampling", fit=partial(loop, **wrong))
    run.select()
    with pytest.raises(RuntimeError, match=rf"`fit`.*on_batch(.|\n)*{found}"):
        run.train()
    drop_hot(mode="fresh_subset", fit=partial(loop, **wrong)).run()


def test_forgetting_needs_a_report_of_each_step() -> None:
    run = drop_hot(forgetting="toneva", fit=partial(loop, is_reported=lambda n: n % 2 == 0))
    with pytest.raises(RuntimeError, match=r"`fit`.*on_batch.*`score`.* 24 .* 48 "):
        run.score()
    drop_hot(forgetting="toneva", fit=loop).score()


@pytest.mark.parametrize("mode", ["random", "fresh_subset", "crest", "loss_sampling"])
@pytest.mark.parametrize("equal_steps", [False, True])
def test_a_loop_that_does_all_it_has_to_is_not_refused(mode: str, equal_steps: bool) -> None:
    drop_hot(mode=mode, data_ratio=0.55, equal_steps=equal_steps, fit=loop).run()


def test_an_interval_needs_a_scheduler() -> None:
    model = nn.Linear(2, 2)
    data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"`scheduler_interval`.*'step'.*`scheduler`"):
        fit(model, data, 1, optimizer=optimizer, scheduler_interval="step")
    with pytest.raises(ValueError, match=r"`scheduler_interval`.*'step'.*`scheduler`"):
        drop_hot(fit=partial(partial(fit, scheduler_interval="step"), loss=F.cross_entropy))


class Counted(TensorDataset):
    """Counts how often a sample is read."""

    reads = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.reads += 1
        return super().__getitem__(index)


def test_a_partial_of_fit_gets_the_cache_of_the_run() -> None:
    def reads(**changes: Any) -> int:
        data = Counted(*TRAIN.tensors)
        drop_hot(train_set=data, **changes).run()
        return data.reads

    smoothed = partial(fit, loss=partial(F.cross_entropy, label_smoothing=0.1))
    uncached = reads(cache=False)
    assert reads(cache=False, fit=smoothed) == uncached
    # The partial's own setting comes first.
    assert reads(cache=False, fit=partial(smoothed, cache=True)) < uncached
