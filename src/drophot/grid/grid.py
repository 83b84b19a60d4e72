"""The paper's grid: data ratios, modes, prune ratios and seeds, each shared stage computed once."""

from __future__ import annotations

import copy
import io
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from drophot._core import memory, scalars
from drophot._core.installed_packages import minor_version
from drophot._core.progress import import_tqdm
from drophot._core.ratios import num_kept
from drophot.data.samples import is_plainly
from drophot.grid import dispatch, executors
from drophot.grid.plan import Plan, estimate
from drophot.grid.stages import Stage
from drophot.grid.store import Store, open_store, write_whole
from drophot.pipeline import modes
from drophot.pipeline.drophot import DropHot
from drophot.pipeline.provenance import environment
from drophot.pipeline.provenance.fingerprints import unseen
from drophot.pipeline.provenance.torch_settings import surroundings
from drophot.records import Record, fingerprint, from_line
from drophot.settings import Mode, name_of, varying

logger = logging.getLogger("drophot")

_BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} epochs [{elapsed}<{remaining}]"

Control = Literal["equal_steps", "reinitialize", "rewind", "recalibrate_bn", "gradual", "iterative"]
# What a control sets. That of the steps concerns training, the others what follows it.
_CONTROLS: dict[str, dict[str, Any]] = {
    "equal_steps": {"equal_steps": True},
    "reinitialize": {"reinitialize": True},
    "rewind": {"rewind": True},
    "recalibrate_bn": {"recalibrate_bn": True},
    "gradual": {"schedule": "gradual"},
    "iterative": {"schedule": "iterative"},
}


class Grid:
    """Data ratios × modes × prune ratios × seeds over one :class:`drophot.DropHot`.

    For each seed one network is trained on everything, which gives the scores and is the baseline;
    then one on each coreset; and each of these is pruned to each ratio and fine-tuned on
    everything. What cells share is computed once. The baseline is always there, with prune ratio 0
    too: the dense network that was given the same extra epochs. Each record equals the one that
    `pipeline.replace(...)` with the cell's settings and `run()` gives, on any executor.

    Args:
        pipeline: The run, with any ratios, mode and seed: those of the cells take their place.
        data_ratios: The shares of training samples **kept**, each in (0, 1).
        modes: Any that the pipeline takes. The control for all that choose once is `"random"`, a
            subset of the same size; for those that choose while they train, `"fresh_subset"`.
        prune_ratios: The shares of weights **removed**, each in [0, 1).
        seeds: One run of everything for each.
        controls: More cells beside these. `"equal_steps"`: every coreset also trained for as many
            optimiser steps as the full training set takes. `"reinitialize"` and `"rewind"`: every
            mask also fine-tuned from new random weights, and from those that training began with.
            `"recalibrate_bn"`: BatchNorm's statistics also taken anew after pruning. `"gradual"`
            and `"iterative"`: every network also pruned by these schedules. Each by itself, beside
            the one-shot cell.
        threads: Of the CPU for each stage. One is fastest for small networks side by side; for a
            large one alone take the number of cores. Results depend on it in their last bits,
            which training makes larger, so that it belongs to a store's configuration.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a list is empty or holds a value twice or one that is out of range.

    Example:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from torch.utils.data import TensorDataset
        >>> from drophot.models import fcnet
        >>> data = TensorDataset(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> model = partial(fcnet, in_features=4, hidden=8, num_classes=4)
        >>> run = DropHot(model, data, data, data_ratio=0.5, mode="high", prune_ratio=0.5)
        >>> grid = Grid(run, data_ratios=[0.25, 0.5], prune_ratios=[0, 0.5], seeds=[0, 1])
        >>> with TemporaryDirectory() as store:
        ...     found = grid.run(store)
        >>> len(found), found[0].mode, found[-1].mode
        (28, 'baseline', 'random')
    """

    def __init__(
        self,
        pipeline: DropHot,
        *,
        data_ratios: Iterable[float],
        modes: Iterable[Mode] = ("low", "high", "random"),
        prune_ratios: Iterable[float],
        seeds: Iterable[int],
        controls: Iterable[Control] = (),
        threads: int = 1,
    ) -> None:
        if not isinstance(pipeline, DropHot):
            raise TypeError(
                f"`pipeline` should be a DropHot. Found {type(pipeline).__name__}; give "
                f"DropHot(model, train_set, test_set, data_ratio=..., mode=..., prune_ratio=...)."
            )
        for control, settings in _CONTROLS.items():
            for name, value in settings.items():
                if getattr(pipeline, name) == value:
                    raise ValueError(
                        f"`pipeline` should leave its controls to the grid. Found "
                        f"{name}={value!r}; give controls=[{control!r}] here, which compares it "
                        f"with the run without."
                    )
        # Each list beside values that go with everything; which cells go together is seen below.
        neutral = pipeline.replace(mode="random", data_ratio=1.0)
        self.data_ratios = _list("data_ratios", data_ratios, neutral)
        self.modes = _list("modes", modes, neutral.replace(data_ratio=min(self.data_ratios)))
        self.prune_ratios = _list("prune_ratios", prune_ratios, pipeline)
        self.seeds = _list("seeds", seeds, pipeline)
        self.controls = list(controls)
        if unknown := set(self.controls) - set(get_args(Control)):
            choices = ", ".join(f'"{name}"' for name in _CONTROLS)
            raise ValueError(f"`controls` should be of {choices}. Found {unknown.pop()!r}.")
        self._check_sizes(len(pipeline.train_set))  # type: ignore[arg-type]
        for mode, ratio, equal in product(self.modes, self.data_ratios, self._equal_steps()):
            pipeline.replace(mode=mode, data_ratio=ratio, equal_steps=equal)
        for ratio, control in product(self.prune_ratios, self.controls):
            pipeline.replace(prune_ratio=ratio, **_CONTROLS[control])
        self.threads = scalars.integer("threads", threads, least=1)
        self.pipeline = pipeline.replace()
        self.pipeline.config = replace(self.pipeline.config, progress=False)  # a grid has one bar

    def run(self, store: Path | str, executor: Any = None, progress: bool = False) -> list[Record]:
        """Compute what the store does not hold yet.

        Killed at any instant, the same call goes on where it was. A store can be extended by
        ratios, modes, seeds and controls; another pipeline is refused. `records.jsonl` in it can be
        read while the grid runs, and :func:`drophot.report.html` makes a page of it.

        Args:
            store: A folder for the results, made if it is not there.
            executor: What has `submit(function, *arguments)`, whose result has `.result()`: a
                process pool, Dask's `Client.get_executor()`, joblib's loky, submitit. It is not
                shut down. `None` computes here, one stage after the other.
            progress: Shows the plan and a bar (`pip install "drophot[progress]"`).

        Returns:
            A record for each cell: by seed, the baseline first, then by data ratio, mode and prune
            ratio.

        Raises:
            Exception: The first error of a stage, when all stages that do not need it are done; its
                notes name every stage that failed. The next call tries these again.
            ValueError: If the store holds other things, or results of another configuration, or
                the executor forks and `threads` is above 1 or CUDA is in use.
            TypeError: If the executor is none, or the model's factory, the optimiser's, `fit` or a
                data set cannot be sent to a worker.
            RuntimeError: If a `fit` of your own does not call back. No other stage is tried then.
            ImportError: If `progress` is asked for and tqdm is not installed.
            OSError: If the disk is full. What is in the store stays good.
        """
        bar = import_tqdm() if progress else None
        if executor is not None:
            executors.check(executor, self.pipeline, self.threads)
        cells = list(self._cells())
        configuration, data = self._configuration()
        opened = open_store(Path(store).absolute(), configuration, {"cells": len(cells)})
        order = {cell.name: number for number, cell in enumerate(cells)}
        opened.tidy(order)
        todo = self._missing(cells, opened)
        plan = self._plan(cells, todo, executor)
        logger.info("%s: %s", store, plan)
        if bar is not None:
            bar.write(f"{store}: {plan}", file=sys.stderr)
        pipeline = self.pipeline
        if executor is not None and todo:
            pipeline = self._without_data(opened)
        total = sum(stage.epochs(pipeline) for stage in todo)
        try:
            with bar(total=total, bar_format=_BAR) if bar else nullcontext() as shown:

                def finished(stage: Stage, record: Record | None) -> None:
                    logger.info("%s: %s", store, stage.name)
                    if record is not None:
                        opened.append(record)
                    if shown is not None:
                        shown.update(min(stage.epochs(pipeline), total - shown.n))

                task, limit = (
                    (pipeline, opened, self.threads, data),
                    self._room(executor, plan.memory),
                )
                dispatch.send(executor, todo, task, finished, limit=limit)
        except BaseException as error:
            error.add_note(f"What was finished is in {store}; the same call goes on from there.")
            raise
        opened.tidy(order)
        return [from_line((opened.load(cell.name) or b"").decode()) for cell in cells]

    def plan(self, store: Path | str | None = None, executor: Any = None) -> Plan:
        """What `run` would do, with an estimate of time and disk from a few measured steps.

        A `fit` of your own is not called for it; how long it takes is then not known.

        Args:
            store: What is in it already is not computed again.
            executor: What would compute it.

        Returns:
            The plan; `print` shows it.

        Raises:
            ValueError: If the store holds other things, or results of another configuration.
        """
        cells = list(self._cells())
        opened = None
        if store is not None and Path(store).exists():
            configuration, _ = self._configuration()
            opened = open_store(Path(store), configuration, None)
        return self._plan(cells, self._missing(cells, opened), executor)

    def _check_sizes(self, total: int) -> None:
        """Refuse two names for one coreset."""
        ratios: dict[int, float] = {}
        for ratio in self.data_ratios:
            size = num_kept(total, ratio)
            if size == total:
                raise ValueError(
                    f"`data_ratios` should each leave out a sample. Found {ratio:g}, which keeps "
                    f"{size} of {total}: that is the baseline, which is always there; leave "
                    f"{ratio:g} out."
                )
            if size in ratios:
                raise ValueError(
                    f"`data_ratios` should each keep another number of samples. Found "
                    f"{ratios[size]:g} and {ratio:g}, which both keep {size} of {total}; leave one "
                    f"out."
                )
            ratios[size] = ratio

    def _equal_steps(self) -> tuple[bool, ...]:
        return (False, True) if "equal_steps" in self.controls else (False,)

    def _cells(self) -> Iterator[Stage]:
        coresets = [("baseline", 1.0, False)]
        equal = self._equal_steps()
        coresets += [(m, r, e) for r in self.data_ratios for m in self.modes for e in equal]
        dense = [] if 0.0 in self.prune_ratios else [0.0]
        for seed in self.seeds:
            for mode, data_ratio, equal_steps in coresets:
                for prune_ratio in (dense if mode == "baseline" else []) + self.prune_ratios:
                    after = [c for c in self.controls if c != "equal_steps" and prune_ratio > 0]
                    for settings in ({}, *(_CONTROLS[control] for control in after)):
                        yield Stage(
                            kind="finetune",
                            seed=seed,
                            mode=mode,
                            data_ratio=data_ratio,
                            equal_steps=equal_steps,
                            prune_ratio=prune_ratio,
                            **settings,
                        )

    def _missing(self, cells: Sequence[Stage], store: Store | None) -> dict[Stage, Stage | None]:
        """What has to be computed, in order, and which of that each stage has to wait for."""
        todo: dict[Stage, Stage | None] = {}
        there: set[Stage] = set()

        def missing(stage: Stage) -> bool:
            if stage in todo:
                return True
            if stage in there:
                return False
            if store is not None and store.load(stage.name) is not None:
                there.add(stage)
                return False
            need = stage.needs(self.pipeline)
            todo[stage] = need if need is not None and missing(need) else None
            return True

        for cell in cells:
            missing(cell)
        return todo

    def _configuration(self) -> tuple[dict[str, Any], str]:
        """What all cells have in common, and a name for the data."""
        if unknown := self.pipeline.config.experiment.unknown:
            raise TypeError(
                f"A store needs to know which experiment it is of. Found {unknown[0]}, which no "
                f"other process can compare; make it where it is used, or give its owner a "
                f"`__getstate__` without it."
            )
        run = self.pipeline
        if blind := unseen([run.factory, run.optimizer, run.fit]):
            warnings.warn(
                f"Not compared with what the store has: {', '.join(blind)}. "
                f"Use another store if it changes.",
                stacklevel=3,
            )
        versions = environment.versions()
        found: dict[str, Any] = {
            "versions": {
                name: minor_version(versions[name]) for name in ("drophot", "torch", "python")
            }
        }
        found |= self.pipeline.configuration
        for name in varying():  # what the cells differ in
            del found[name]
        found["threads"] = self.threads
        found["device"] = environment.device_name(self.pipeline.device)
        return found, fingerprint({name: found[name] for name in ("train_set", "test_set")})

    def _without_data(self, store: Store) -> DropHot:
        """The pipeline for a worker: what is in memory is read there from the store."""
        sets = {name: getattr(self.pipeline, name) for name in ("train_set", "test_set")}
        tensors = {
            name: [tensor.cpu() for tensor in data.tensors]
            for name, data in sets.items()
            if is_plainly(data, TensorDataset)
        }
        content = io.BytesIO()
        torch.save(tensors, content)
        write_whole(store.folder / "data.pt", content.getvalue())
        light = copy.copy(self.pipeline)
        light.config = replace(light.config, **dict.fromkeys(tensors))
        light._ambient = surroundings(light.device)
        return light

    def _plan(self, cells: Sequence[Stage], todo: Iterable[Stage], executor: Any) -> Plan:
        stages = list(todo)
        counts = Counter(stage.kind for stage in stages)
        seconds, size, needed = estimate(self.pipeline, stages, self.threads)
        data = sum(tensor.nbytes for tensor in self._tensors())
        if self.pipeline.device.type == "cuda":
            needed += data  # each worker has its own; of a CPU's they share one
        workers = 1 if executor is None else (executors.workers(executor) or 1)
        workers = min(workers, self._room(executor, needed) or workers)
        return Plan(
            cells=len(cells),
            scorings=counts["score"],
            trainings=counts["train"],
            finetunings=counts["finetune"],
            epochs=sum(stage.epochs(self.pipeline) for stage in stages),
            samples=len(self.pipeline.train_set),  # type: ignore[arg-type]
            workers=workers,
            seconds=None if seconds is None else seconds / workers,
            bytes=size + data * bool(executor is not None and stages),
            memory=needed,
        )

    def _room(self, executor: Any, needed: int) -> int | None:
        """How many stages there is memory for at once, where that is known."""
        if executor is None or not needed or not executors.on_this_machine(executor):
            return None
        free = memory.available(self.pipeline.device)
        return None if free == float("inf") else max(1, int(0.9 * free / needed))

    def _tensors(self) -> list[Tensor]:
        sets = (self.pipeline.train_set, self.pipeline.test_set)
        return [t for data in sets if is_plainly(data, TensorDataset) for t in data.tensors]


def _list(name: str, values: Any, pipeline: DropHot) -> list[Any]:
    """The values of one side of the grid, each one that the pipeline takes."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` should be a list. Found {values!r}; give [{values!r}].")
    found = list(values)
    if not found:
        raise ValueError(f"`{name}` must have at least one value, but it is empty.")
    for position, value in enumerate(found):
        setting = name.removesuffix("s")
        try:  # what the pipeline makes of it: a plain number
            value = found[position] = getattr(pipeline.replace(**{setting: value}), setting)
        except (ValueError, TypeError) as error:
            error.add_note(f"This was found in `{name}`.")
            raise
        before = found[:position]
        if name == "modes":  # by what a file and a record call it, and by what it means
            same = name_of(value) in map(name_of, before)
            long = modes.as_scored(value)
            same |= long is not None and long in map(modes.as_scored, before)
        else:
            same = value in before
        if same:
            raise ValueError(f"`{name}` should hold each value once. Found {value!r} twice.")
    return found
