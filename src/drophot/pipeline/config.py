"""The frozen, checked configuration of a run: settings, factories, data and training loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from torch.utils.data import Dataset

from drophot._core import progress
from drophot._core.ratios import num_kept
from drophot._core.setting_checks import check_flag
from drophot.coreset.selectors import Selector
from drophot.data.batching import num_batches
from drophot.data.cache import Cache, check_cache
from drophot.pipeline import modes
from drophot.pipeline.protocol import RunProtocol, check_protocol
from drophot.pipeline.provenance.experiment import Experiment
from drophot.pipeline.released_protocol import protocol_of
from drophot.settings.declarations import Settings
from drophot.settings.tables import SETTINGS
from drophot.training import loop

ModelFactory = Callable[[], nn.Module]
OptimizerFactory = Callable[[Iterator[nn.Parameter]], Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments(Settings):
    """The arguments of :class:`drophot.DropHot`: settings, factories, data and training loop."""

    model: ModelFactory = field(kw_only=False)
    train_set: Dataset[object] = field(kw_only=False)
    test_set: Dataset[object] = field(kw_only=False)
    optimizer: OptimizerFactory = field(default=partial(Adam, lr=1e-3))
    device: torch.device | str | None = None
    fit: loop.Fit = loop.fit
    cache: Cache = "auto"
    progress: bool = False

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        check_settings(self)
        check_cache(self.cache)
        if check_flag("progress", self.progress):
            progress.import_tqdm()

    @property
    def settings(self) -> Settings:
        """The settings alone."""
        return Settings(**{name: getattr(self, name) for name in SETTINGS})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that the five steps need and that no step changes."""

    settings: Settings
    factory: ModelFactory
    optimizer: OptimizerFactory
    train_set: Dataset[object]
    """Samples `(input, target, index)`, in memory if that is safe: see `in_memory`."""
    test_set: Dataset[object]
    device: torch.device
    fit: loop.Fit
    cache: Cache
    progress: bool
    num_classes: int
    """How many classes occur in the training set; 0 if that is not known without reading it."""
    experiment: Experiment

    @property
    def protocol(self) -> RunProtocol:
        return protocol_of(self.settings.protocol)

    @property
    def selector(self) -> Selector | None:
        """The selector of step 2; `None` if the mode chooses while step 3 trains."""
        mode = self.settings.mode
        return self.protocol.selector(mode) or modes.selector_of(mode)

    @property
    def needs(self) -> Collection[str]:
        """What step 2 selects by: any of "scores", "confidence", "model" and "targets"."""
        return () if self.selector is None or self.keeps_all else self.selector.needs

    @property
    def num_samples(self) -> int:
        return len(self.train_set)  # type: ignore[arg-type]

    @property
    def num_test_samples(self) -> int:
        return len(self.test_set)  # type: ignore[arg-type]

    @property
    def num_kept(self) -> int:
        return num_kept(self.num_samples, self.settings.data_ratio)

    @property
    def keeps_all(self) -> bool:
        """Whether the coreset is the whole training set, which makes the run a baseline."""
        return self.num_kept == self.num_samples

    @property
    def finetune_steps(self) -> int:
        settings = self.settings
        return settings.finetune_epochs * num_batches(self.num_samples, settings.batch_size)

    @property
    def train_steps(self) -> int:
        settings = self.settings
        samples = self.num_samples if settings.equal_steps else self.num_kept
        return settings.train_epochs * num_batches(samples, settings.batch_size)

    @property
    def training_seed(self) -> int:
        """Seeds the random numbers of steps 1 to 4. Step 5 uses the next number."""
        return 2 * self.settings.seed

    def replace(self, **settings: object) -> RunConfig:
        """The same with other settings, which are checked alone but not against the model."""
        changed = replace(self.settings, **settings)
        check_settings(changed)
        return replace(self, settings=changed)


def check_settings(settings: Settings) -> None:
    """Check combinations of settings, and objects that a user defined."""
    modes.check_mode(settings.mode, settings.data_ratio)
    check_protocol(protocol_of(settings.protocol), settings)
