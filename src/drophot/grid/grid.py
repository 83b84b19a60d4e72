"""The paper's grid: data ratios, modes, prune ratios and seeds, each shared stage computed once."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from drophot._core import memory, scalars
from drophot._core.importance import RunImportance
from drophot._core.progress import import_tqdm
from drophot._core.signatures import signature_error
from drophot.grid import dispatch, executors, worker_data
from drophot.grid.axes import checked_axes
from drophot.grid.compute import Job
from drophot.grid.executors import Executor
from drophot.grid.identity import identify
from drophot.grid.plan import Plan, estimate, passes
from drophot.grid.stages import Stage, stage_of, to_compute
from drophot.grid.store import open_store
from drophot.pipeline.drophot import DropHot
from drophot.pipeline.provenance.torch_settings import changed_switches
from drophot.records.json_lines import from_line
from drophot.records.record import Record
from drophot.settings.names import Mode

logger = logging.getLogger("drophot")

_BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} epochs [{elapsed}<{remaining}]"


class Grid:
    """Data ratios × modes × prune ratios × importances × seeds over one :class:`drophot.DropHot`.

    For each seed, one network is trained on all samples. It gives the scores and is the baseline.
    Then one network is trained on each coreset, and each network is pruned to each ratio and
    fine-tuned on all samples. Stages that runs share are computed once. The baseline is always
    part of the grid, also with prune ratio 0: the dense network with the same additional epochs.
    Each record equals that of `pipeline.replace(...)` with the settings of that run and `run()`,
    on any executor.

    Args:
        pipeline: The run to vary. The grid replaces its ratios, mode and seed, and its importance
            if `importances` is given.
        data_ratios: The shares of training samples **kept**, each in (0, 1).
        modes: Any modes that the pipeline takes. The control for modes that choose once is
            `"random"`, a subset of the same size. For modes that choose while they train, it is
            `"fresh_subset"`. An :class:`drophot.Adaptive` mode is left out, with a warning, where
            training takes at most `every` epochs.
        prune_ratios: The shares of weights **removed**, each in [0, 1).
        importances: What weights or channels are ranked by, in place of the pipeline's importance:
            `None` for magnitude, functions such as those of :mod:`drophot.prune.importances`, and
            :class:`drophot.prune.importances.FromBatches` for those that are computed from the
            network. Each needs another name. Every network is pruned once by each. Runs with prune
            ratio 0 rank nothing, so their importance is `None`. The control is
            :class:`drophot.prune.importances.Random`. One seed of it gives the same numbers in each
            run; its documentation shows how to draw others in each run.
        seeds: The seeds. The whole grid is run once for each.
        controls: Further runs to compare with. `"equal_steps"` also trains on every coreset for as
            many optimizer steps as the full training set takes. `"reinitialize"` and `"rewind"`
            also fine-tune every mask from new random weights, and from those that training started
            with. `"recalibrate_bn"` also recomputes the statistics of BatchNorm after pruning, and
            `"repair"` matches the activations to those before pruning. `"gradual"` and
            `"iterative"` also prune every network by these schedules, and `"joint"` also trains
            every network while it is pruned. Apart from `"equal_steps"`, controls are not combined
            with one another.
        threads: The number of CPU threads for each stage. One is fastest for small networks that
            are trained side by side. For a large one alone, use the number of cores. Results depend
            on it in their last bits, which training amplifies, so it belongs to the configuration
            of a store.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a list is empty, or holds a value twice or one that is out of range, or an
            :class:`drophot.Adaptive` mode would select only once with a data ratio.

    Example:
        >>> from functools import partial
        >>> import torch
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
        importances: Iterable[RunImportance] | None = None,
        seeds: Iterable[int],
        controls: Iterable[str] = (),
        threads: int = 1,
    ) -> None:
        if not isinstance(pipeline, DropHot):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"`pipeline` must be a DropHot, got {type(pipeline).__name__}. Pass "
                f"DropHot(model, train_set, test_set, data_ratio=..., mode=..., prune_ratio=...)."
            )
        self._axes = checked_axes(
            pipeline.config,
            data_ratios=data_ratios,
            modes=modes,
            prune_ratios=prune_ratios,
            importances=importances,
            seeds=seeds,
            controls=controls,
        )
        self.data_ratios, self.modes = self._axes.data_ratios, self._axes.modes
        self.prune_ratios, self.seeds = self._axes.prune_ratios, self._axes.seeds
        self.importances, self.controls = self._axes.importances, self._axes.controls
        self.threads = scalars.integer("threads", threads, least=1)
        self.pipeline = pipeline.replace()
        # The mode and the importance of the pipeline may be objects that no worker can load.
        settings = replace(
            self.pipeline.config.settings, mode=self.modes[0], importance=self.importances[0]
        )
        # A grid has one progress bar, and none for each training.
        self._config = replace(self.pipeline.config, settings=settings, progress=False)

    def run(
        self,
        store: Path | str,
        executor: Executor | None = None,
        progress: bool = False,
        *,
        on_record: Callable[[Record], object] | None = None,
    ) -> list[Record]:
        """Compute the runs that the store does not hold yet.

        If the process is killed at any instant, the same call resumes. A store can be extended by
        ratios, modes, importances, seeds and controls. A store of another pipeline is refused. You
        can read `records.jsonl` in it while the grid runs, and :func:`drophot.report.html` makes a
        page of it.

        Args:
            store: A folder for the results, which is created if it does not exist.
            executor: An object with `submit(function, *arguments)`, whose result has `.result()`: a
                process pool, Dask's `Client.get_executor()`, joblib's loky, submitit; on GPUs
                :class:`drophot.grid.GpuPool`. It is not shut down. `None` computes one stage after
                the other in this process.
            progress: Whether to show the plan and a progress bar
                (`pip install "drophot[progress]"`).
            on_record: Called in this process with each record as soon as it is computed and stored,
                in any order. Records that were in the store before are only in the list that is
                returned. An error that it raises ends the run as Ctrl-C does. The record is in the
                store then, so that the next call does not pass it again.

        Returns:
            A record for each run, ordered by seed, with the baseline first, and then by data
            ratio, mode, prune ratio and importance.

        Raises:
            Exception: The first error of a stage, once all stages that do not need it are done. Its
                notes name every stage that failed. The next call tries these again.
            ValueError: If the store holds other files or the results of another configuration, or
                the executor forks and `threads` is above 1 or the grid is on CUDA.
            TypeError: If `executor` has no `submit`, `on_record` does not take one argument, or the
                factory of the model or the optimizer, `fit`, a dataset or an object among the
                settings cannot be sent to a worker.
            RuntimeError: If your own `fit` does not call its callbacks; no other stage is tried.
            ImportError: If `progress` is set and tqdm is not installed.
            OSError: If the disk is full. The results in the store stay intact.
        """
        if on_record is not None and (wrong := signature_error(on_record, None)):
            raise TypeError(
                f"`on_record` must be a function that takes one argument, a record, got {wrong}. "
                f"Pass `records.append` to collect them, for example."
            )
        bar = import_tqdm() if progress else None
        config = self._config
        if executor is not None:
            executors.check(executor, config, self.modes, self.importances, self.threads)
        runs = self._runs()
        identity = identify(config, self.modes, self.importances, self.threads)
        opened = open_store(
            Path(store).absolute(), identity.configuration, {"runs": len(runs)}, identity.modes
        )
        order = {run.name: number for number, run in enumerate(runs)}
        opened.tidy(order)
        todo = opened.missing(runs)
        plan = self._plan(runs, todo, executor)
        logger.info("%s: %s", store, plan)
        if bar is not None:
            bar.write(f"{store}: {plan}", file=sys.stderr)
        job = Job(config=config, store=opened, threads=self.threads)
        if executor is not None and todo:
            light = worker_data.store_data(config, opened.folder, identity.data)
            job = replace(job, config=light, switches=changed_switches(config.device))
        total = sum(passes(config, stage) for stage in todo)
        try:
            with bar(total=total, bar_format=_BAR) if bar else nullcontext() as shown:

                def finished(stage: Stage, record: Record | None) -> None:
                    logger.info("%s: %s", store, stage.name)
                    if record is not None:
                        opened.append(record)
                    if shown is not None:
                        shown.update(min(passes(config, stage), total - shown.n))
                    if record is not None and on_record is not None:
                        on_record(record)

                limit = self._most_at_once(executor, plan.memory)
                dispatch.send(executor, todo, job, finished, limit=limit)
        except BaseException as error:
            error.add_note(f"Finished stages are in {store}. The same call resumes from there.")
            raise
        opened.tidy(order)
        return [from_line((opened.load(run.name) or b"").decode()) for run in runs]

    def plan(self, store: Path | str | None = None, executor: Executor | None = None) -> Plan:
        """Estimate the time, disk space and memory of `run` from a few measured steps.

        Your own `fit` is not called for it, so its time is not known.

        Args:
            store: The folder whose results are not computed again.
            executor: The executor that would compute them.

        Returns:
            The plan, which can be printed.

        Raises:
            ValueError: If the store holds other files or the results of another configuration.
        """
        runs = self._runs()
        todo = to_compute(runs, lambda _: False)
        if store is not None and Path(store).exists():
            identity = identify(self._config, self.modes, self.importances, self.threads)
            opened = open_store(Path(store), identity.configuration, None, identity.modes)
            todo = opened.missing(runs)
        return self._plan(runs, todo, executor)

    def _runs(self) -> list[Stage]:
        """The last stage of each run."""
        settings, scores = self._config.settings, self._axes.own_scores
        return [stage_of(run, settings, scores) for run in self._axes.runs()]

    def _plan(
        self, runs: Sequence[Stage], todo: Iterable[Stage], executor: Executor | None
    ) -> Plan:
        stages, config = list(todo), self._config
        counts = Counter(stage.kind for stage in stages)
        cost = estimate(config, stages, self.threads)
        tensors = worker_data.tensors_of(config).values()
        data = sum(tensor.nbytes for parts in tensors for tensor in parts)
        needed = cost.memory
        if config.device.type == "cuda":
            needed += data  # each worker has its own copy; on a CPU they share one
        workers = 1 if executor is None else (executors.num_workers(executor) or 1)
        workers = min(workers, self._most_at_once(executor, needed) or workers)
        sharing = executors.gpu_sharing(executor, config.device)
        parallel = workers
        if executor is not None and sharing in ("mps", "turns"):
            parallel = min(workers, executors.num_gpus(executor))
        return Plan(
            runs=len(runs),
            scorings=counts["score"],
            trainings=counts["train"],
            finetunings=counts["finetune"],
            epochs=sum(passes(config, stage) for stage in stages),
            samples=config.num_samples,
            workers=workers,
            seconds=None if cost.seconds is None else cost.seconds / parallel,
            bytes=cost.bytes + data * bool(executor is not None and stages),
            memory=needed,
            gpu_sharing=sharing,
        )

    def _most_at_once(self, executor: Executor | None, needed: int) -> int | None:
        """How many stages fit into memory at once, if that is known."""
        if executor is None or not needed or not executors.is_local(executor):
            return None
        free = memory.available(self._config.device) * executors.num_gpus(executor)
        return None if free == float("inf") else max(1, int(0.9 * free / needed))
