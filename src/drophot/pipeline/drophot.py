"""The paper's five steps on one object: score, select, train, prune, fine-tune."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from math import isnan, nan
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from drophot._core import scalars
from drophot._core.json_values import Json
from drophot.data.cache import Cache
from drophot.pipeline import preflight, pruning_steps, selection_steps
from drophot.pipeline.config import Arguments, ModelFactory, OptimizerFactory, RunConfig
from drophot.pipeline.provenance.run_record import configuration, record_of
from drophot.prune.masks import Masks
from drophot.prune.schedule import Schedule
from drophot.records.record import Record
from drophot.settings.declarations import Settings
from drophot.settings.tables import SETTINGS, varying
from drophot.structured.pruning_result import Pruned
from drophot.tracking.dynamics import DynamicsTracker
from drophot.training.loop import Fit

# The attributes of the configuration that a run shows as its own, besides the settings.
_OBJECTS = ["factory", "optimizer", "train_set", "test_set", "device", "fit", "cache", "progress"]
_P = ParamSpec("_P")

if TYPE_CHECKING:
    # A run shows its settings as attributes of the same types.
    _ShowsSettings = Settings
else:
    _ShowsSettings = object


def _takes(
    arguments: Callable[_P, Arguments],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _P], None]]:
    """Give a constructor the signature of `Arguments`."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, _P], None]:
        own = inspect.signature(init).parameters["self"]
        parameters = [own, *inspect.signature(arguments).parameters.values()]
        vars(init)["__signature__"] = inspect.Signature(parameters)
        return init

    return decorate


class DropHot(_ShowsSettings):
    """The paper's five steps on a classifier and its data.

    1. `score`: train a model on the full training set and count every sample's forgetting events.
    2. `select`: keep a share of the samples, by those scores.
    3. `train`: train a new model from scratch on the kept samples.
    4. `prune`: remove the weights of least magnitude.
    5. `finetune`: continue training on the full training set with removed weights held at zero.

    `run` takes all five. Called one by one, each step leaves its result on the object: `tracker`,
    `scorer` and `scores`, `indices`, `model`, `masks`, `record`. You can replace these between the
    steps: after `run.scores = my_scores`, neither `select` nor `run` needs step 1. After
    `run.model = my_model`, the accuracy of the trained model is NaN until you set it, and the masks
    are gone. A record of your own model or masks, or of a step that was begun twice, has a
    fingerprint of its own. The
    settings can be read as attributes, such as `run.prune_ratio`, and `replace` makes a run with
    others.

    One seed gives one record on one machine and leaves the global random state as it was. Models
    that differ in mode or ratio start from the same weights for the same seed, so that they can be
    compared in pairs. If `score_epochs` equals `train_epochs`, the network of step 1 is also the
    network that is trained on everything.

    References:
        Gupta et al., Drop it Like it's Hot: Network Pruning with Data Selection, section 4, with
        its defaults: Adam, 1e-3, batches of 64, 10 epochs per training, pruning layer by layer.

    Args:
        model: A factory: called without arguments, it returns a new model that maps inputs to
            logits `(B, C)`.
        train_set: Samples `(input, target)`, inputs as tensors of one shape, targets in `[0, C)`.
        test_set: The same, for the accuracies.
        optimizer: A factory: called with parameters, it returns an optimizer. Each training gets
            its own.
        device: Where to run; `None` is a GPU if there is one.
        fit: The training loop. Your own is called as :func:`drophot.training.fit` is.
        cache: Whether decoded data is kept: see :func:`drophot.training.in_memory`.
        progress: Whether to show a progress bar for each training, by tqdm.
        **settings: The settings of the run, as in :class:`drophot.settings.Settings`.

    Raises:
        TypeError: If an argument is of the wrong kind, such as a model instead of a factory.
        ValueError: If a value is out of range, two settings cannot be combined, a dataset is
            empty, the inputs of the two datasets differ in shape, a target is no class of the
            model, the model has no weights to prune or computes them by a parametrization, an
            :class:`drophot.Adaptive` mode would select only once, or `data_ratio` keeps fewer
            samples than there are classes or leaves the model a last batch that it cannot train on.
        ImportError: If `progress` is asked for and tqdm is not installed.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from drophot.models import fcnet
        >>> data = TensorDataset(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> network = partial(fcnet, in_features=4, hidden=32, num_classes=4)
        >>> settings = dict(data_ratio=0.5, mode="high", prune_ratio=0.5)
        >>> adam = partial(torch.optim.Adam, lr=0.05)
        >>> record = DropHot(network, data, data, **settings, optimizer=adam).run()
        >>> record.finetuned_accuracy, record.sparsity, record.num_kept
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
    num_prunable: int = 0  # weights, before pruning
    pruned_accuracy: float = nan
    record: Record | None = None
    seconds: Mapping[str, float] = MappingProxyType({})  # of each step
    _steps: tuple[str, ...] = ()  # that made the model, results that the user replaced among them
    _trained_on: Tensor | None = None  # (K,), of step 3; None for a model of the user's own

    @_takes(Arguments)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.config: RunConfig = preflight.prepare(Arguments(*args, **kwargs))

    if TYPE_CHECKING:  # read-only: see `__getattr__`
        factory: ModelFactory
        optimizer: OptimizerFactory
        train_set: Dataset[object]
        test_set: Dataset[object]
        device: torch.device
        fit: Fit
        cache: Cache
        progress: bool
    else:

        def __getattr__(self, name: str) -> object:
            if name in SETTINGS:
                return getattr(self.config.settings, name)
            if name in _OBJECTS:
                return getattr(self.config, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if name in varying():
            raise AttributeError(f"`{name}` of a run is fixed. Use `run.replace({name}=...)`.")
        if name in SETTINGS or name in _OBJECTS:
            raise AttributeError(f"`{name}` of a run is fixed. Create another DropHot.")
        super().__setattr__(name, _checked_result(name, value))
        if name == "model":  # all later results are those of another model
            self._keep(trained_accuracy=nan, pruned_accuracy=nan, _steps=("own model",))
            self._keep(masks=None, pruner=None, channels=None, num_prunable=0, _trained_on=None)
        elif name == "masks":
            self._keep(_steps=(*self._steps, "own masks"))

    def _keep(self, **results: object) -> None:
        """Set results of the run itself, which are not results that the user replaced."""
        vars(self).update(results)

    @property
    def configuration(self) -> dict[str, Json]:
        """Everything that a record depends on, as JSON can hold it; its fingerprint is of this.

        It holds the settings; the code and the arguments of the factories and of `fit`, and what
        the factories make; the data; and, under the key `ambient`, the global settings of torch
        that differ from the defaults.
        """
        return configuration(self.config)

    def replace(self, **settings: object) -> DropHot:
        """The same run with other settings and without results, on the same data in memory.

        Args:
            **settings: Settings in which the runs of a grid may differ, such as `data_ratio`,
                `schedule` or `seed`.

        Returns:
            A new object; this one is left as it is.

        Raises:
            TypeError: If a setting is not one of these, or of the wrong kind.
            ValueError: If a value is out of range.
        """
        known = [name for name in SETTINGS if name in varying()]
        if unknown := sorted(settings.keys() - set(known)):
            raise TypeError(
                f"`replace` takes the settings {', '.join(known)}, got `{unknown[0]}`. Create "
                f"another DropHot for that."
            )
        config = preflight.with_settings(self.config, **settings)
        other = copy.copy(self)
        for name in DropHot.__annotations__:  # the results
            vars(other).pop(name, None)
        other.config = config
        return other

    def run(self) -> Record:
        """Take the five steps, the first one only if the mode needs its results and has none.

        Returns:
            The record, which stays on `record` too.
        """
        scores, scorer = self.scores, self.scorer
        known = {"scores": scores, "confidence": self._confidence()}
        if selection_steps.missing(self.config, scorer=scorer, **known):
            self.score()
            self.scores = self.scores if scores is None else scores
            self.scorer = self.scorer if scorer is None else scorer
        self.select()
        self.train()
        self.prune()
        return self.finetune()

    def score(self) -> Tensor:
        """Step 1: train on the full training set and follow every sample.

        Returns:
            The scores `(N,)`, which stay on `scores` too: the score that the mode selects by, or
            forgetting events, of which more are harder.

        Raises:
            RuntimeError: If your own `fit` did not call its callbacks.
            ValueError: If the mode's score needs more presentations of each sample than
                `score_epochs`.
        """
        found = selection_steps.score(self.config)
        self.scorer, self.tracker, self.scores = found.model, found.tracker, found.scores
        self._took("score", found.seconds)
        return found.scores

    def statistic(self, name: str) -> Tensor:
        """A score of step 1.

        Args:
            name: Its name in the tracker, such as `"el2n"`. `"forgetting"` follows the setting of
                that name.

        Returns:
            Shape `(N,)`.

        Raises:
            RuntimeError: If there is no tracker, because step 1 was not taken or the protocol has
                its own counter.
        """
        if self.tracker is None:
            raise RuntimeError(
                "`statistic` needs a tracker, which step 1 makes: call `run.score()` first."
            )
        return selection_steps.statistic(self.tracker, name, self.config.settings.forgetting)

    def select(self) -> Tensor:
        """Step 2: keep `data_ratio` of the training samples.

        A warning is given if the coreset has no sample of some class.

        Returns:
            The kept samples' positions `(K,)`, which stay on `indices` too; all positions for a
            mode that chooses while step 3 trains.

        Raises:
            RuntimeError: If the mode needs scores or the network of step 1, and the run has none.
            ValueError: If `scores` was replaced by one of another length.
        """
        found = selection_steps.select(
            self.config, scores=self.scores, scorer=self.scorer, confidence=self._confidence()
        )
        self.indices = found.indices
        self._took("select", found.seconds)
        return found.indices

    def train(self) -> nn.Module:
        """Step 3: train a new model from scratch on the kept samples.

        Returns:
            The model, which stays on `model` too.

        Raises:
            RuntimeError: If nothing was selected yet.
            TypeError: If `indices` was replaced by something other than integers.
            ValueError: If `indices` was replaced by positions that are out of range or repeated.
        """
        if self.indices is None:
            raise RuntimeError("`train` needs a coreset: call `run.select()` first.")
        self.indices = selection_steps.checked_positions(self.config, self.indices)
        found = selection_steps.train(self.config, self.indices)
        self.model = found.model
        self._keep(trained_accuracy=found.accuracy, _steps=("train",), _trained_on=self.indices)
        self._keep(masks=found.masks)  # of a schedule that prunes while it trains
        self._took("train", found.seconds)
        return found.model

    def prune(self) -> Masks:
        """Step 4: remove the weights of least magnitude, in place.

        Returns:
            The masks, which stay on `masks` too.

        Raises:
            RuntimeError: If no model was trained yet, or the schedule is "joint" and the model is
                your own and has no masks.
        """
        if self.model is None:
            raise RuntimeError("`prune` needs a trained model: call `run.train()` first.")
        self._begin("prune")
        found = pruning_steps.prune(self.config, self.model, self.masks)
        if self.masks is None:  # of the dense network, if it is pruned once more
            self.num_prunable = found.num_prunable
        self._keep(masks=found.masks, pruner=found.schedule, channels=found.channels)
        self.pruned_accuracy = found.accuracy
        self._took("prune", found.seconds)
        return found.masks

    def finetune(self) -> Record:
        """Step 5: continue training on the full training set with removed weights held at zero.

        Returns:
            The record, which stays on `record` too.

        Raises:
            RuntimeError: If no model was pruned yet.
        """
        if self.model is None or self.masks is None or self.indices is None:
            raise RuntimeError("`finetune` needs masks: call `run.prune()` first.")
        pruned = pruning_steps.PrunedModel(
            model=self.model,
            masks=self.masks,
            schedule=self.pruner,
            channels=self.channels,
            num_prunable=self.num_prunable,
            accuracy=self.pruned_accuracy,
        )
        self._begin("finetune")
        found = pruning_steps.finetune(self.config, pruned)
        self._keep(masks=found.masks)
        self._took("finetune", found.seconds)
        self.record = record_of(
            self.config,
            indices=self.indices if self._trained_on is None else self._trained_on,
            trained_accuracy=self.trained_accuracy,
            pruned_accuracy=self.pruned_accuracy,
            finetuned=found,
            seconds=self.seconds,
            steps=self._steps,
        )
        return self.record

    def _confidence(self) -> Tensor | None:
        needed = self.tracker is not None and "confidence" in self.config.needs
        return self.statistic("confidence") if needed else None

    def _begin(self, step: str) -> None:
        """Note a step that changes the model, which it may leave half changed if it fails."""
        self._steps = (*self._steps, step)

    def _took(self, step: str, seconds: float) -> None:
        self.seconds = {**self.seconds, step: seconds}


_RESULTS: Mapping[str, tuple[type, str]] = {
    "scorer": (nn.Module, "a network, as the factory `model` returns it"),
    "model": (nn.Module, "a network, as the factory `model` returns it"),
    "masks": (Masks, "Masks, such as those of `Masks.from_zeros(run.model)`"),
    "pruner": (Schedule, "a Schedule"),
    "channels": (Pruned, "the result of `prune_channels`"),
}


def _checked_result(name: str, value: object) -> object:
    """A result, checked to be of a kind that later steps can use."""
    if name in ("trained_accuracy", "pruned_accuracy"):
        found = scalars.ratio(name, value, "[0, 1]")
        if not (isnan(found) or 0 <= found <= 1):
            raise ValueError(f"`{name}` must be in [0, 1], got {found:g}. For 80 %, set 0.8.")
        return found
    kind, words = _RESULTS.get(name, (object, ""))
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"`{name}` of a run must be {words}, got {value!r:.80}.")
    return value


def _arguments_section(docstring: str) -> str:
    return docstring.partition("    Args:\n")[2].partition("\n\n    Raises:")[0]


if DropHot.__doc__ and Settings.__doc__:  # both are missing under `python -OO`
    DropHot.__doc__ = DropHot.__doc__.replace(
        "        **settings: The settings of the run, as in :class:`drophot.settings.Settings`.",
        _arguments_section(Settings.__doc__),
    )
