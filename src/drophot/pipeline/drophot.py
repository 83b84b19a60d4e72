"""The paper's five steps: score, select, train, prune, fine-tune."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import nan
from time import perf_counter
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import Dataset

from drophot import modes
from drophot._core import progress, random_state
from drophot.coreset import score_selection
from drophot.modes import Mode
from drophot.pipeline import fit_checks, preflight, pruning_steps, selection_steps
from drophot.pipeline.provenance.experiment import experiment
from drophot.pipeline.provenance.run_record import of_run
from drophot.pipeline.provenance.torch_settings import surroundings
from drophot.pipeline.pruning_steps import ScheduleName
from drophot.prune.layer_sparsity import Scope
from drophot.prune.masks import Masks
from drophot.prune.schedule import Schedule
from drophot.prune.unpruned_weights import uncovered_warning_silenced
from drophot.records import Record
from drophot.structured.channel_pruning import Pruned
from drophot.tracking.dynamics import DynamicsTracker, Statistic
from drophot.training import loop

Forgetting = Literal["paper", "toneva"]
Protocol = Literal["paper", "released"]

# What the cells of a grid differ in.
CELL = (
    *("data_ratio", "mode", "prune_ratio", "seed", "equal_steps", "reinitialize", "rewind"),
    *("recalibrate_bn", "schedule"),
)
_SETTINGS = (
    *(*CELL, "forgetting", "scope", "structured", "prunings", "protocol", "batch_size"),
    *("score_epochs", "train_epochs", "finetune_epochs", "cache"),
)


class DropHot:
    """The paper's five steps on a classifier and its data.

    1. `score`: train a model on the full training set and count every sample's forgetting events.
    2. `select`: keep a share of the samples, by those scores.
    3. `train`: train a new model from scratch on what was kept.
    4. `prune`: remove the weights of least magnitude.
    5. `finetune`: train on with the full training set, the removed weights held at zero.

    `run` takes them all. Called one by one each leaves its result on the object: `tracker` and
    `scores`, `indices`, `model`, `masks`, `record`. These can be replaced between the steps: after
    `run.scores = my_scores` neither `select` nor `run` needs step 1.

    One seed gives one record on one machine and leaves the global random state as it was. Models
    that differ in mode or ratio start from the same weights for the same seed, to be compared in
    pairs; with equal epochs the network of step 1 is the one that training on everything gives.

    References:
        Gupta et al., Drop it Like it's Hot: Network Pruning with Data Selection, section 4, with
        its defaults: Adam, 1e-3, batches of 64, 10 epochs a training, pruning layer by layer.

    Args:
        model: A factory: called without arguments it gives a new model, inputs to logits `(B, C)`.
        train_set: Samples `(input, target)`, inputs as tensors of one shape, targets in `[0, C)`.
        test_set: The same for the accuracies.
        data_ratio: The share of training samples **kept**, in (0, 1].
        mode: How they are chosen. `"high"` keeps the most forgotten samples, `"low"` the least,
            `"random"` any; :class:`drophot.Stratified` spreads them over all scores, and
            :class:`drophot.Scored` goes by another score, or class by class. `"k_center"` and
            `"facility_location"` go by features of step 1's network; `"crest"`, `"fresh_subset"`
            and `"loss_sampling"` choose while step 3 trains. See "How to choose a coreset".
        prune_ratio: The share of the prunable weights **removed**, in [0, 1): see
            `magnitude_prune`. If they are not nearly all of the matrix weights, a warning says so.
        forgetting: When a sample counts as forgotten. `"paper"`: by the model's state after each
            epoch; one that was never right scores 0. `"toneva"`: by the logits of its training
            batches, without a pass of its own; one that was never right is the hardest.
        scope: `"layer"` removes the share from each layer, as the authors did; for the others see
            :func:`drophot.magnitude_prune`.
        protocol: `"paper"` is the paper's text, `"released"` its code: :mod:`drophot.pipeline`.
        equal_steps: Train on the coreset for as many steps as `train_epochs` of everything take.
        reinitialize: Fine-tune what pruning left from new random weights: what the mask is worth
            without the weights that it was found with.
        rewind: The same from the weights that step 3 began with: the lottery ticket.
        recalibrate_bn: Take BatchNorm's statistics anew after pruning.
        schedule: `"one-shot"` prunes once, in step 4; `"gradual"` and `"iterative"` go on in step
            5, by cubic ratios over its first half or in equal rounds: :mod:`drophot.prune`.
        prunings: How often a schedule prunes, step 4 included.
        structured: Remove channels instead of weights: see :mod:`drophot.structured`.
        score_epochs: Epochs of step 1, on the full training set.
        train_epochs: Epochs of step 3, on the coreset.
        finetune_epochs: Epochs of step 5, on the full training set.
        optimizer: A factory: called with parameters it gives an optimiser, one for each training.
        batch_size: Samples a step.
        seed: Of initialisation, order and ties; not negative.
        device: Where to run; `None` is a GPU if there is one.
        fit: The training loop; a user's own is called as :func:`drophot.training.fit` is.
        cache: Whether decoded data is kept: see :func:`drophot.training.in_memory`.
        progress: Shows a bar for each training, by tqdm.

    Raises:
        TypeError: If an argument is of the wrong kind: a model instead of a factory, say.
        ValueError: If a value is out of range, two settings do not go together, a data set is
            empty, the two data sets' inputs differ in shape, a target is no class of the model,
            the model has no weights to prune or computes them by a parametrization, `data_ratio`
            keeps fewer samples than there are classes, or leaves the model a last batch that it
            cannot train on.
        ImportError: If `progress` is asked for and tqdm is not installed.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from drophot.models import fcnet
        >>> data = TensorDataset(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> network = partial(fcnet, in_features=4, hidden=32, num_classes=4)
        >>> settings = dict(data_ratio=0.5, mode="high", prune_ratio=0.5)
        >>> run = DropHot(network, data, data, **settings, optimizer=partial(Adam, lr=0.05))
        >>> record = run.run()
        >>> record.finetuned_accuracy, record.sparsity, record.kept
        (1.0, 0.5, 16)
    """

    tracker: DynamicsTracker | None = None  # of step 1
    scorer: nn.Module | None = None  # the network of step 1
    scores: Tensor | None = None  # (N,)
    indices: Tensor | None = None  # (K,)
    model: nn.Module | None = None  # of steps 3 to 5
    trained_accuracy: float = nan
    masks: Masks | None = None
    pruner: Schedule | None = None
    channels: Pruned | None = None
    prunable: int = 0  # weights, before pruning
    pruned_accuracy: float = nan
    record: Record | None = None
    seconds: Mapping[str, float] = MappingProxyType({})  # of each step

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train_set: Dataset[Any],
        test_set: Dataset[Any],
        *,
        data_ratio: float,
        mode: Mode,
        prune_ratio: float,
        forgetting: Forgetting = "paper",
        scope: Scope = "layer",
        protocol: Protocol = "paper",
        equal_steps: bool = False,
        reinitialize: bool = False,
        rewind: bool = False,
        recalibrate_bn: bool = False,
        schedule: ScheduleName = "one-shot",
        prunings: int = 5,
        structured: bool = False,
        score_epochs: int = 10,
        train_epochs: int = 10,
        finetune_epochs: int = 10,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] = partial(Adam, lr=1e-3),  # noqa: B008
        batch_size: int = 64,
        seed: int = 0,
        device: torch.device | str | None = None,
        fit: loop.Fit = loop.fit,
        cache: loop.Cache = "auto",
        progress: bool = False,
    ) -> None:
        self.factory = model
        self.data_ratio = data_ratio
        self.mode: Mode = mode
        self.prune_ratio = prune_ratio
        self.forgetting: Forgetting = forgetting
        self.scope: Scope = scope
        self.protocol: Protocol = protocol
        self.equal_steps = equal_steps
        self.reinitialize = reinitialize
        self.rewind = rewind
        self.recalibrate_bn = recalibrate_bn
        self.schedule: ScheduleName = schedule
        self.prunings = prunings
        self.structured = structured
        self.score_epochs = score_epochs
        self.train_epochs = train_epochs
        self.finetune_epochs = finetune_epochs
        self.optimizer = optimizer
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.fit = fit
        self.cache: loop.Cache = cache
        self.progress = progress
        preflight.settle(self)
        with uncovered_warning_silenced(self.structured):  # `channels` names what was left then
            self.train_set, self.test_set, self._classes = preflight.prepare(
                model,
                optimizer,
                train_set,
                test_set,
                device=self.device,
                seed=self.seed,
                cache=cache,
                closure=not modes.is_drophots_own(fit),
            )
        preflight.check_sizes(self, self._classes)
        self._total = len(train_set)  # type: ignore[arg-type]
        self._fixed, self._unknown = experiment(self, train_set, test_set)
        self._ambient: dict[str, Any] | None = None  # on a worker: as it is where the grid runs

    @property
    def configuration(self) -> dict[str, Any]:
        """Everything that a record depends on, as JSON can hold it: what its fingerprint is of.

        The settings; the code and the arguments of the factories and of `fit`, and what the
        factories make; the data; and `ambient`, the switches of torch that are set around it.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        settings |= {"mode": modes.name(self.mode), "ambient": surroundings(self.device)}
        return self._fixed | settings

    def replace(self, **settings: Any) -> DropHot:
        """The same run with other settings and no results yet, on the same data in memory.

        Args:
            **settings: What the cells of a grid differ in, from `data_ratio` to `schedule`.

        Returns:
            A new object; this one is left as it is.

        Raises:
            TypeError: If a setting is not one of these, or of the wrong kind.
            ValueError: If a value is out of range.
        """
        if unknown := ", ".join(sorted(settings.keys() - set(CELL))):
            raise TypeError(f"`replace` should be given {', '.join(CELL)}. Found {unknown}.")
        other = copy.copy(self)
        for name in DropHot.__annotations__:  # the results
            vars(other).pop(name, None)
        vars(other).update(settings)
        preflight.settle(other)
        preflight.check_sizes(other, self._classes)
        return other

    def run(self) -> Record:
        """Take the steps, the first only where the mode needs what is not there yet."""
        if self._lacks():
            self.score()
        self.select()
        self.train()
        self.prune()
        return self.finetune()

    def score(self) -> Tensor:
        """Step 1: train on the full training set and follow every sample.

        Returns:
            The scores `(N,)`, which stay on `scores` too: of the mode's statistic, or forgetting
            events, higher is harder.

        Raises:
            RuntimeError: If a `fit` of the user's own did not call back.
        """
        with self._step("score"):
            scores = self.scores = selection_steps.score(self)
        return scores

    def statistic(self, name: Statistic) -> Tensor:
        """A score of step 1, for a mode that goes by it.

        Args:
            name: Which; `"forgetting"` is meant as the setting `forgetting` says.

        Returns:
            Shape `(N,)`.

        Raises:
            RuntimeError: If nothing was followed: there was no step 1, or the protocol has none.
        """
        if self.tracker is None:
            raise RuntimeError(
                "`statistic` needs a tracker, which step 1 makes: call `run.score()` first."
            )
        if name == "forgetting":
            name = "hardest" if self.forgetting == "toneva" else "zero"  # type: ignore[assignment]
        return self.tracker.scores(name)

    def select(self) -> Tensor:
        """Step 2: keep `data_ratio` of the training samples.

        A coreset without a sample of some class is warned about.

        Returns:
            The kept samples' positions `(K,)`, which stay on `indices` too; all of them for a mode
            that chooses while step 3 trains.

        Raises:
            RuntimeError: If the mode needs scores, or step 1's network, and there are none.
            ValueError: If `scores` was replaced by one of another length.
        """
        if lack := self._lacks():
            what = "a trained scoring network" if lack == "scorer" else "scores"
            raise RuntimeError(
                f"mode {self.mode!r} needs {what}: call `run.score()` first, or set `run.{lack}`."
            )
        if self.scores is not None and len(self.scores) != self._total:
            raise ValueError(
                f"`scores` should have one entry for each training sample, "
                f"{self._total}. Found {len(self.scores)}."
            )
        with self._step("select"):
            self.indices = selection_steps.choose(self)
        preflight.warn_of_empty_classes(self)
        return self.indices

    def train(self) -> nn.Module:
        """Step 3: train a new model from scratch on what was kept.

        Returns:
            The model, which stays on `model` too.

        Raises:
            RuntimeError: If nothing was selected yet.
        """
        if self.indices is None:
            raise RuntimeError("`train` needs a coreset: call `run.select()` first.")
        with self._step("train"):
            model = self.factory().to(self.device)
            optimizer = self.optimizer(model.parameters())
            selection_steps.train(self, model, optimizer)
            self.trained_accuracy = loop.evaluate(model, self.test_set)
        self.model, self.masks = model, None
        return model

    def prune(self) -> Masks:
        """Step 4: remove the weights of least magnitude, in place.

        Returns:
            The masks, which stay on `masks` too.

        Raises:
            RuntimeError: If no model was trained yet.
        """
        if self.model is None:
            raise RuntimeError("`prune` needs a trained model: call `run.train()` first.")
        with self._step("prune"):
            self.masks = pruning_steps.prune(self)
            self.pruned_accuracy = loop.evaluate(self.model, self.test_set)
        return self.masks

    def finetune(self) -> Record:
        """Step 5: train on with the full training set, the removed weights held at zero.

        Returns:
            The record, which stays on `record` too.

        Raises:
            RuntimeError: If no model was pruned yet.
        """
        if self.model is None or self.masks is None or self.indices is None:
            raise RuntimeError("`finetune` needs masks: call `run.prune()` first.")
        model = self.model
        curve: list[float] = []
        with self._step("finetune", 1):
            pruning_steps.start_over(self)
            optimizer = self.optimizer(model.parameters())
            with pruning_steps.held(self, optimizer) as check_pace:

                def judge(_: int) -> None:
                    curve.append(loop.evaluate(model, self.test_set))
                    check_pace(len(curve))

                self._fit(model, self.train_set, self.finetune_epochs, optimizer, on_epoch=judge)
        accuracy = curve[-1] if curve else loop.evaluate(model, self.test_set)
        self.record = of_run(self, curve, accuracy, pruning_steps.removed(self))
        return self.record

    def _lacks(self) -> str | None:
        """What step 1 has to find first."""
        everything = score_selection.kept(self._total, self.data_ratio) == self._total
        if everything or not modes.needs_step_1(self.mode):
            return None
        name = "scorer" if self.mode in modes.OF_FEATURES else "scores"
        return name if getattr(self, name) is None else None

    def _fit(
        self,
        model: nn.Module,
        dataset: Any,
        epochs: int,
        optimizer: Optimizer,
        *,
        on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
        on_epoch: Callable[[int], object] | None = None,
    ) -> None:
        fit = self.fit
        if fit is loop.fit:
            fit = partial(loop.fit, cache=self.cache)
        with (
            fit_checks.watched(model, epochs, self._doing, on_epoch) as watched,
            progress.bar(self.progress, epochs, self._doing, watched) as after,
        ):
            fit(
                model,
                dataset,
                epochs,
                optimizer=optimizer,
                batch_size=self.batch_size,
                seed=self._draws,
                on_batch=on_batch,
                on_epoch=after,
            )

    @contextmanager
    def _step(self, name: str, stage: int = 0) -> Iterator[None]:
        """A step: timed, and with random numbers of its own that depend on the seed alone."""
        self._doing, self._draws = name, 2 * self.seed + stage
        start = perf_counter()
        with random_state.kept(self.device, seed=self._draws):
            yield
        self.seconds = {**self.seconds, name: perf_counter() - start}
