"""A coreset that is selected again during training, from the model as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler

from drophot._core import distributed, random_state, scalars
from drophot._core.exact_arithmetic import exact
from drophot._core.model_contexts import evaluating
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot._core.seeded_draw import cpu_generator, derive_seed
from drophot.coreset.builtin_selectors import SELECTORS, Random
from drophot.coreset.selectors import (
    Evidence,
    Selector,
    check_selector,
    checked_indices,
    is_selector,
)
from drophot.coreset.stratified import Stratified, check_cutoff
from drophot.data.batching import batches
from drophot.data.indexing import IndexedDataset
from drophot.data.samples import first_sample, targets_of
from drophot.sampling.epoch_iterator import (
    EpochIterator,
    check_num_processes,
    check_replicas,
    num_per_rank,
    share,
)
from drophot.sampling.saved_state import SavedState, checked_state
from drophot.tracking.accumulators import Accumulator
from drophot.tracking.dynamics import DynamicsTracker

# Means over presentations, which the latest model alone can give.
_OF_ONE_PASS = ("aum", "el2n", "confidence", "loss")
_EVALUATED = frozenset(("scores", "confidence", "model"))  # needs that come from the model
_BATCH = 1024


class AdaptiveSubset(Sampler[int]):
    """A sampler that selects a coreset again every few epochs, from the model as it is.

    `ratio` is the fraction of the samples that is **kept**: each epoch yields the
    `K = max(1, floor(ratio * N + 0.5))` selected samples, each once, in random order. The first
    selection is random, because there is no trained model yet. After each `every` epochs, `mode`
    selects again. Use :class:`FreshSubset` as the control, at the same number of steps.

    A mode that needs scores costs one pass over all samples at each selection, in evaluation mode,
    in float32, batch by batch. AUM, EL2N, confidence and loss are those of the model at that time.
    Forgetting, variability and scores of your own are over all selections so far, and so are the
    confidences of a `Beta` with such a score; a sample that was never correct is the hardest. A
    mode that needs the model receives it in evaluation mode, and must not change it.

    On several ranks, pass `num_replicas` and `rank`. Rank 0 selects while the others wait, and
    sends them the result. Each rank yields every `num_replicas`-th sample. As in
    `DistributedSampler`, the first samples are repeated if the ranks do not divide `K`. A mode that
    evaluates the model needs them also if something else could divide the batches, because the
    statistics of BatchNorm differ between the ranks, and so would the selections.

    `state_dict` and `load_state_dict` resume in the middle of an epoch. They are the protocol of
    torchdata's `StatefulDataLoader`, which calls them. Save the weights of the model with them. In
    a DataLoader with worker processes, which requests samples in advance, set `state["yielded"]` to
    the number of samples that the loop has received.

    Args:
        dataset: Samples `(input, target)` or `(input, target, index)` whose targets are classes.
        model: The model being trained, called as `model(inputs)`, returns logits `(B, C)`.
        ratio: The fraction kept, in (0, 1].
        mode: `"high"`, `"low"`, `"random"`, `"k_center"`, `"facility_location"`,
            `"density_facility_location"` or any :class:`drophot.coreset.Selector`, such as a
            :class:`drophot.Scored` or :class:`drophot.Stratified`.
        every: The number of epochs between two selections. An epoch is a pass over `K` samples. The
            sampler does not know how many epochs your loop takes: if there are no more than
            `every`, there is one random selection only and `mode` is never used.
        seed: Together with the attribute `epoch`, which counts the epochs begun so far, it
            determines the orders, ties and random choices.
        num_replicas: The number of ranks among which each epoch is divided.
        rank: Which of them this one is.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ratio` is not in (0, 1], `mode` is unknown, has a cutoff that leaves less
            than `ratio` or needs several presentations of each sample, `every` or `num_replicas` is
            less than 1, `rank` is not in [0, `num_replicas`), or the dataset is empty.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(40, 4), torch.arange(40) % 2)
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sampler = AdaptiveSubset(data, model, 0.5, "high", every=2)
        >>> loader = DataLoader(data, batch_size=10, sampler=sampler)
        >>> for epoch in range(6):
        ...     for inputs, targets in loader:
        ...         loss = nn.functional.cross_entropy(model(inputs), targets)
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> sampler.epoch, len(loader), len(sampler.indices)
        (6, 2, 20)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        model: nn.Module,
        ratio: float,
        mode: str | Selector = "high",
        *,
        every: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.ratio = check_keep_ratio("ratio", ratio)
        self.selector = _checked_selector(mode, self.ratio)
        self.every = scalars.integer("every", every, least=1)
        self.seed = scalars.integer("seed", seed)
        self.num_replicas, self.rank = check_replicas(num_replicas, rank)
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}.")
        # Rank 0 evaluates the model alone, and DDP's forward may wait for the others.
        self.model = model
        if self.num_replicas > 1 and isinstance(model, DistributedDataParallel):
            self.model: nn.Module = model.module
        with random_state.preserved_rng():  # a random transform may draw numbers
            indexed = len(first_sample("dataset", dataset)) == 3
        self.dataset = dataset if indexed else IndexedDataset(dataset)
        self.num_samples = len(dataset)  # type: ignore[arg-type]
        self.epoch = 0
        self._tracker = self._new_tracker()
        self._indices = torch.empty(0, dtype=torch.int64, device="cpu")
        self._yielded = 0  # of the epoch that was begun last; 0 if it is complete
        self._resume_at = 0
        self._is_independent = False  # of what other ranks train

    @property
    def indices(self) -> Tensor:
        """The samples that are currently selected, ascending, int64, shape `(K,)`, on the CPU.

        Empty before the first epoch.
        """
        return self._indices.clone()

    def __len__(self) -> int:
        return num_per_rank(num_kept(self.num_samples, self.ratio), self.num_replicas)

    def __iter__(self) -> EpochIterator:
        start, self._resume_at = self._resume_at, 0
        return EpochIterator(self, start)

    def _next_order(self) -> list[int]:
        """Begin an epoch, and return this rank's samples."""
        if self.epoch % self.every == 0 or not len(self._indices):
            self._update_selection()
        self.epoch += 1
        return self._current_order()

    def _current_order(self) -> list[int]:
        """This rank's samples of the epoch that was begun last."""
        generator = cpu_generator(derive_seed(self.seed, self.epoch - 1))
        order = torch.randperm(len(self._indices), generator=generator, device="cpu")
        return share(self._indices[order].tolist(), self.num_replicas, self.rank)

    def _update_selection(self) -> None:
        """Select on rank 0, and send the result to the other ranks."""
        self._check_ranks()
        indices = distributed.from_rank_0(self._select, self.num_replicas, self.rank)
        if self.num_replicas > 1 and self._accumulates and self.epoch:
            self._tracker.sync()  # so that the state is equal on all ranks
        self._indices = indices

    def _check_ranks(self) -> None:
        if self.num_replicas > 1:
            check_num_processes(self.num_replicas)
        elif (processes := distributed.count()) > 1 and not (
            self._is_independent or _EVALUATED.isdisjoint(self.selector.needs)
        ):
            raise RuntimeError(
                f"`num_replicas` must be the number of processes, {processes}, got 1. The "
                f"ranks would select by mode {self.selector.name!r} from models with different "
                f"BatchNorm statistics. Pass `num_replicas=dist.get_world_size(), "
                f"rank=dist.get_rank()`, and do not let anything else divide the batches among the "
                f"ranks."
            )

    @exact(products=True)
    def _select(self) -> Tensor:
        selector: Selector = self.selector if self.epoch else Random()
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        scores = confidence = tracker = None
        if not {"scores", "confidence"}.isdisjoint(selector.needs):
            # A copy, so that a pass that fails or is interrupted is not counted.
            score = getattr(selector, "statistic", None)  # may be an object that cannot be copied
            copied = deepcopy(self._tracker, {id(score): score}) if self._accumulates else None
            tracker = self._new_tracker() if copied is None else copied
            tracker.observe(self.model, _by_position(batches(self.dataset, _BATCH, device)))
            if "scores" in selector.needs:
                scores = tracker.scores(_statistic_of(selector))
            if "confidence" in selector.needs:
                confidence = tracker.scores("confidence")
        with evaluating(self.model), torch.enable_grad():  # a selector may use gradients
            evidence = Evidence(
                num_samples=self.num_samples,
                scores=scores,
                confidence=confidence,
                model=self.model if "model" in selector.needs else None,
                targets=targets_of(self.dataset).clone() if "targets" in selector.needs else None,
                dataset=self.dataset,
            )
            indices = selector.select(self.ratio, evidence, derive_seed(self.seed, self.epoch))
        indices = checked_indices(selector, indices, self.ratio, self.num_samples)
        if tracker is not None and self._accumulates:
            self._tracker = tracker
        return indices

    @property
    def _accumulates(self) -> bool:
        """Whether the scores are over all selections so far."""
        scored = "scores" in self.selector.needs
        return scored and _statistic_of(self.selector) not in _OF_ONE_PASS

    def _new_tracker(self) -> DynamicsTracker:
        statistic = getattr(self.selector, "statistic", "forgetting")
        counted = statistic == "forgetting"  # which every tracker counts, besides another score
        statistics = ["loss" if counted else statistic]
        if "confidence" in self.selector.needs and "confidence" not in statistics:
            statistics.append("confidence")
        return DynamicsTracker(self.num_samples, statistics=statistics)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, equal on all ranks, for `torch.save`.

        Returns:
            The settings, the epochs begun, the samples yielded of the last one if it is not
            complete, the selected samples, and the tracker's state if the scores are over all
            selections; `torch.load(weights_only=True)` reads them.
        """
        return {
            **self._settings(),
            "epoch": self.epoch,
            "yielded": self._yielded,
            "indices": self.indices,
            "tracker": self._tracker.state_dict() if self._accumulates else None,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume: the next iteration yields the rest of the epoch.

        Args:
            state_dict: The state of a sampler with the same arguments, of any rank.

        Raises:
            ValueError: If it is of a sampler with other arguments, or not such a state.
        """
        others = ("epoch", "indices", "tracker")
        saved = checked_state(state_dict, self._settings(), "AdaptiveSubset", *others)
        yielded = saved.integer("yielded", most=len(self))
        epoch = saved.integer("epoch", least=int(yielded > 0))
        indices = self._saved_selection(saved, may_be_empty=not yielded)
        tracker = self._saved_tracker(saved)
        self.epoch, self._indices, self._tracker = epoch, indices, tracker
        self._yielded = self._resume_at = yielded % len(self)

    def _saved_selection(self, saved: SavedState, *, may_be_empty: bool) -> Tensor:
        """The selected samples of a state, of which there are none before the first epoch."""
        size, total = num_kept(self.num_samples, self.ratio), self.num_samples
        indices = saved.indices("indices", (None,), total)
        if len(indices) != size and (len(indices) or not may_be_empty):
            raise ValueError(
                f'`state_dict["indices"]` must hold {size} indices, got {len(indices)}. The state '
                f"is damaged; load another one."
            )
        if len(repeated := indices[1:][indices[1:] <= indices[:-1]]):
            raise ValueError(
                f'`state_dict["indices"]` must be in ascending order without repetition, got '
                f"{int(repeated[0])} after an index that is not lower. The state is damaged; load "
                f"another one."
            )
        return indices.detach().cpu().clone()

    def _saved_tracker(self, saved: SavedState) -> DynamicsTracker:
        """The tracker of a state: all samples were presented equally often."""
        tracker = self._new_tracker()
        if not self._accumulates:
            if saved.values["tracker"] is not None:
                raise ValueError(
                    f'`state_dict["tracker"]` must be None for mode {self.selector.name!r}, got a '
                    f"{type(saved.values['tracker']).__name__}. The state is damaged; load another "
                    f"one."
                )
            return tracker
        state = saved.part("tracker")
        for name, value in state.values.items():
            if isinstance(value, Tensor) and bool(value.isnan().any()):
                raise ValueError(
                    f'`{state.label}["{name}"]` must not have NaN, got {int(value.isnan().sum())} '
                    f"of them. The state is damaged; load another one."
                )
        try:
            tracker.load_state_dict(state.values)
            presented = tracker.presentations.unique().tolist()
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"`{state.label}` cannot be loaded: {error}") from error
        if len(presented) != 1:
            raise ValueError(
                f"`{state.label}` must have presented all samples equally often, got from "
                f"{presented[0]} to {presented[-1]} times. The state is damaged; load another one."
            )
        return tracker

    def _settings(self) -> dict[str, Any]:
        names = ("num_samples", "ratio", "every", "seed", "num_replicas")
        return {"mode": self.selector.name, **{name: getattr(self, name) for name in names}}


def _by_position(found: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Batches with the positions of the samples, which are not the indices of a `Subset`."""
    start = 0
    for inputs, targets, index in found:
        end = start + len(index)
        yield inputs, targets, torch.arange(start, end, device=index.device)
        start = end


def _statistic_of(selector: Selector) -> str:
    """The name of the score that a selector selects by."""
    statistic = getattr(selector, "statistic", "forgetting")
    return statistic if isinstance(statistic, str) else statistic.name


def check_repeatable(selector: Selector) -> None:
    """Refuse a score that the first selection could not use, which presents each sample once."""
    statistic = getattr(selector, "statistic", None)
    if isinstance(statistic, Accumulator) and statistic.num_needed > 1:
        raise ValueError(
            f"`mode` must select by a score that one presentation of each sample gives, got "
            f"{selector.name!r}, whose score {statistic.name!r} needs {statistic.num_needed}. Each "
            f"selection presents the samples once. Choose another score, such as "
            f'Scored("el2n").'
        )


def _checked_selector(mode: object, ratio: float) -> Selector:
    inner = getattr(mode, "mode", mode)  # of a `Scored`
    if isinstance(inner, Stratified):
        check_cutoff(inner, ratio)
    if isinstance(mode, str) and mode in SELECTORS:
        return SELECTORS[mode]
    if not is_selector(mode):
        raise ValueError(
            f"`mode` must be one of {', '.join(map(repr, SELECTORS))}, or a selector (an object "
            f"with `name`, `needs` and `select`), got {mode!r}."
        )
    selector: Selector = mode  # pyright: ignore[reportAssignmentType] # just checked
    check_selector("mode", selector)
    check_repeatable(selector)
    return selector
