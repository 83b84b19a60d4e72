"""The paper's five steps: score, select, train, prune, fine-tune."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import Dataset, Subset

from drophot import _probe, _progress, _random, coreset, prune, training
from drophot.coreset import Mode, select
from drophot.forgetting import ForgettingTracker
from drophot.indexing import IndexedDataset
from drophot.prune import Masks, Scope, magnitude_prune
from drophot.records import (
    Record,
    describe,
    device_name,
    factory_name,
    fingerprint,
    versions,
)

Forgetting = Literal["paper", "toneva"]


class DropHot:
    """The paper's five steps on a classifier and its data.

    1. `score`: train a model on the full training set and count every sample's forgetting events.
    2. `select`: keep a share of the samples, by those scores.
    3. `train`: train a new model from scratch on what was kept.
    4. `prune`: remove the weights of least magnitude.
    5. `finetune`: train on with the full training set, the removed weights held at zero.

    `run` takes them all. Called one by one each leaves its result on the object: `tracker` and
    `scores`, `indices`, `model`, `masks`, `record`. What is there can be replaced between the
    steps: after `run.scores = my_scores` neither `select` nor `run` needs step 1.

    One seed gives one record on one machine. Models that differ in mode or ratio start from the
    same weights for the same seed, so that they can be compared in pairs. The global random state
    is left as it was.

    References:
        Gupta et al., Drop it Like it's Hot: Network Pruning with Data Selection, section 4, with
        the authors' defaults: Adam, learning rate 1e-3, batches of 64, 10 epochs a training,
        pruning layer by layer.

    Args:
        model: A factory: called without arguments it gives a new model, inputs `(B, …)` to logits
            `(B, C)`.
        train_set: Samples `(input, target)`, inputs as tensors of one shape, targets in `[0, C)`.
        test_set: The same for the accuracies.
        data_ratio: The share of training samples **kept**, in (0, 1].
        mode: `"high"` keeps the most forgotten samples, `"low"` the least, `"random"` any.
        prune_ratio: The share of Linear and Conv weights **removed**, in [0, 1).
        forgetting: When a sample counts as forgotten. `"paper"`: by the model's state after each
            epoch; a sample that was never right scores 0. `"toneva"`: by the logits of its
            training batches, without a pass of its own; a sample that was never right is the
            hardest (Toneva et al. 2019).
        scope: `"layer"` removes the share from each layer, as the authors did; `"global"` ranks
            all weights together.
        score_epochs: Epochs of step 1, on the full training set.
        train_epochs: Epochs of step 3, on the coreset.
        finetune_epochs: Epochs of step 5, on the full training set.
        optimizer: A factory: called with a model's parameters it gives an optimiser. Each training
            gets a new one.
        batch_size: Samples a step.
        seed: Of initialisation, order and ties; not negative.
        device: Where to run. `None` is a GPU if there is one, else the CPU.
        fit: The training loop. A user's own takes the arguments of
            :func:`drophot.training.fit` and calls `on_batch` and `on_epoch` where they are given.
        progress: Shows a bar for each training (`pip install "drophot[progress]"`).

    Raises:
        TypeError: If an argument is of the wrong kind: a model instead of a factory, say.
        ValueError: If a value is out of range, a data set is empty, the two data sets' inputs
            differ in shape, a target is no class of the model, `data_ratio` keeps fewer samples
            than there are classes, or leaves the model a last batch that it cannot train on.
        ImportError: If `progress` is asked for and tqdm is not installed.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from drophot.models import fcnet
        >>> data = TensorDataset(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> run = DropHot(
        ...     partial(fcnet, in_features=4, hidden=32, num_classes=4),
        ...     train_set=data,
        ...     test_set=data,
        ...     data_ratio=0.5,
        ...     mode="high",
        ...     prune_ratio=0.5,
        ...     optimizer=partial(Adam, lr=0.05),
        ... )
        >>> record = run.run()
        >>> record.finetuned_accuracy, record.sparsity, record.kept
        (1.0, 0.5, 16)
    """

    tracker: ForgettingTracker | None = None  # of step 1
    scores: Tensor | None = None  # (N,)
    indices: Tensor | None = None  # (K,)
    model: nn.Module | None = None  # of steps 3 to 5
    masks: Masks | None = None
    record: Record | None = None

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
        score_epochs: int = 10,
        train_epochs: int = 10,
        finetune_epochs: int = 10,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] = partial(Adam, lr=1e-3),  # noqa: B008
        batch_size: int = 64,
        seed: int = 0,
        device: torch.device | str | None = None,
        fit: training.Fit = training.fit,
        progress: bool = False,
    ) -> None:
        coreset.check_ratio("data_ratio", data_ratio)
        coreset.check_mode("mode", mode)
        prune.check_ratio("prune_ratio", prune_ratio)
        prune.check_scope("scope", scope)
        if forgetting not in get_args(Forgetting):
            raise ValueError(f'`forgetting` should be "paper" or "toneva". Found {forgetting!r}.')
        _probe.check_counts(1, score_epochs=score_epochs, batch_size=batch_size)
        _probe.check_counts(
            0, train_epochs=train_epochs, finetune_epochs=finetune_epochs, seed=seed
        )
        if progress:
            _progress.check()
        self.factory = model
        self.data_ratio = float(data_ratio)
        self.mode: Mode = mode
        self.prune_ratio = float(prune_ratio)
        self.forgetting: Forgetting = forgetting
        self.scope: Scope = scope
        self.score_epochs = score_epochs
        self.train_epochs = train_epochs
        self.finetune_epochs = finetune_epochs
        self.optimizer = optimizer
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.fit = fit
        self.progress = progress
        self.seconds: dict[str, float] = {}
        with _random.kept(self.device, seed=seed):
            probe, classes = _probe.build(model, optimizer, train_set, test_set)
            self.train_set = training.in_memory(IndexedDataset(train_set), self.device)
            self.test_set = training.in_memory(test_set, self.device)
            occurring = _probe.check_targets("train_set", self.train_set, classes)
            _probe.check_targets("test_set", self.test_set, classes)
            self._total = len(train_set)  # type: ignore[arg-type]
            self._kept = coreset.kept(self._total, self.data_ratio)
            _probe.check_sizes(
                probe,
                self.train_set,
                self._kept,
                data_ratio=self.data_ratio,
                num_classes=occurring,
                batch_size=batch_size,
            )
        self._configuration = {
            "model": describe(model),
            "parameters": {name: list(t.shape) for name, t in probe.state_dict().items()},
            "train_set": [type(train_set).__name__, self._total],
            "test_set": [type(test_set).__name__, len(test_set)],  # type: ignore[arg-type]
            "data_ratio": self.data_ratio,
            "mode": mode,
            "prune_ratio": self.prune_ratio,
            "forgetting": forgetting,
            "scope": scope,
            "epochs": [score_epochs, train_epochs, finetune_epochs],
            "optimizer": describe(optimizer),
            "batch_size": batch_size,
            "seed": seed,
            "fit": describe(fit),
        }

    def run(self) -> Record:
        """Take the steps; the first only where scores are needed and there are none yet.

        Returns:
            The record, which stays on `record` too.
        """
        if self.scores is None and self._needs_scores():
            self.score()
        self.select()
        self.train()
        self.prune()
        return self.finetune()

    def score(self) -> Tensor:
        """Step 1: train on the full training set and count forgetting events.

        Returns:
            The scores `(N,)`, higher is harder, which stay on `scores` too.

        Raises:
            RuntimeError: If a `fit` of the user's own did not call back.
        """
        with self._step("score", 0):
            self.tracker = tracker = ForgettingTracker(self._total, device=self.device)
            model = self.factory().to(self.device)

            def observe(_: int) -> None:
                tracker.observe(model, training.batches(self.train_set, 1024, self.device))

            toneva = self.forgetting == "toneva"
            self._fit(
                model,
                self.train_set,
                self.score_epochs,
                on_batch=tracker.update if toneva else None,
                on_epoch=None if toneva else observe,
            )
            if missed := int((tracker.presentations == 0).sum()):
                raise RuntimeError(
                    f"`fit` should call on_batch for every batch and on_epoch after every epoch. "
                    f"Found {missed} of {self._total} samples that were never presented."
                )
            self.scores = tracker.scores("hardest" if toneva else "zero")
        return self.scores

    def select(self) -> Tensor:
        """Step 2: keep `data_ratio` of the training samples by their scores.

        A coreset that holds no sample of some class is warned about: high scores can be all in a
        few classes.

        Returns:
            The kept samples' positions `(K,)`, which stay on `indices` too.

        Raises:
            RuntimeError: If there are no scores and the mode needs them.
            ValueError: If `scores` was replaced by one of another length.
        """
        scores = self.scores
        if scores is None:
            if self._needs_scores():
                raise RuntimeError("`select` needs scores. Found none; call score() or set scores.")
            scores = torch.zeros(self._total)
        if len(scores) != self._total:
            raise ValueError(
                f"`scores` should have one entry for each training sample, "
                f"{self._total}. Found {len(scores)}."
            )
        with self._step("select", 0):
            self.indices = select(scores, self.data_ratio, self.mode, seed=self.seed)
        if empty := _probe.empty_classes(self.train_set, self.indices):
            warnings.warn(
                f"`data_ratio={self.data_ratio}` and `mode={self.mode!r}` leave no sample of "
                f"classes {empty}, which the model will not learn in `train`; raise data_ratio.",
                stacklevel=2,
            )
        return self.indices

    def train(self) -> nn.Module:
        """Step 3: train a new model from scratch on what was kept.

        Returns:
            The model, which stays on `model` too.

        Raises:
            RuntimeError: If nothing was selected yet.
        """
        if self.indices is None:
            raise RuntimeError("`train` needs a coreset. Found none; call select() first.")
        with self._step("train", 1):
            model = self.factory().to(self.device)
            kept = Subset(self.train_set, self.indices.tolist())
            self._fit(model, kept, self.train_epochs)
            self._trained_accuracy = training.evaluate(model, self.test_set)
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
            raise RuntimeError("`prune` needs a model. Found none; call train() first.")
        with self._step("prune", 1):
            self.masks = magnitude_prune(self.model, self.prune_ratio, scope=self.scope)
            self._pruned_accuracy = training.evaluate(self.model, self.test_set)
        return self.masks

    def finetune(self) -> Record:
        """Step 5: train on with the full training set, the removed weights held at zero.

        Returns:
            The record, which stays on `record` too.

        Raises:
            RuntimeError: If no model was pruned yet.
        """
        if self.model is None or self.masks is None or self.indices is None:
            raise RuntimeError("`finetune` needs masks. Found none; call prune() first.")
        model = self.model
        curve: list[float] = []
        with self._step("finetune", 2):
            self._fit(
                model,
                self.train_set,
                self.finetune_epochs,
                masks=self.masks,
                on_epoch=lambda _: curve.append(training.evaluate(model, self.test_set)),
            )
            if len(curve) != self.finetune_epochs:
                raise RuntimeError(
                    f"`fit` should call on_epoch after every epoch, {self.finetune_epochs} times. "
                    f"Found {len(curve)} calls."
                )
        self.record = Record(
            model=factory_name(self.factory, model),
            mode=self.mode,
            keep_ratio=self.data_ratio,
            kept=len(self.indices),
            prune_ratio=self.prune_ratio,
            seed=self.seed,
            trained_accuracy=self._trained_accuracy,
            pruned_accuracy=self._pruned_accuracy,
            finetuned_accuracy=curve[-1] if curve else self._pruned_accuracy,
            finetune_curve=tuple(curve),
            sparsity=Masks.from_zeros(model).sparsity,
            seconds=dict(self.seconds),
            device=device_name(self.device),
            versions=versions(),
            fingerprint=fingerprint(self._configuration),
        )
        return self.record

    def _needs_scores(self) -> bool:
        return self.mode != "random" and self._kept < self._total

    def _fit(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        epochs: int,
        *,
        masks: Masks | None = None,
        on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
        on_epoch: Callable[[int], object] | None = None,
    ) -> None:
        optimizer = self.optimizer(model.parameters())
        held = nullcontext() if masks is None else masks.hold(optimizer)
        with held, _progress.bar(self.progress, epochs, self._doing) as update:

            def after(epoch: int) -> None:
                if on_epoch is not None:
                    on_epoch(epoch)
                update()

            self.fit(
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
    def _step(self, name: str, stage: int) -> Iterator[None]:
        """A step: timed, and with random numbers of its own that depend on the seed alone."""
        self._doing, self._draws = name, 3 * self.seed + stage
        deterministic = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = True
        start = perf_counter()
        try:
            with _random.kept(self.device, seed=self._draws):
                yield
        finally:
            torch.backends.cudnn.deterministic = deterministic
        self.seconds[name] = perf_counter() - start
