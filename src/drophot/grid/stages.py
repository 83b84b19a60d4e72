"""The stages of a grid, as a worker computes them: score, train, finetune."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from math import nan
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drophot._core import random_state
from drophot.grid.store import Store
from drophot.grid.untracked_state import put_back, remainder
from drophot.pipeline import modes
from drophot.pipeline.drophot import DropHot
from drophot.pipeline.provenance.torch_settings import surrounded
from drophot.records import Record, from_line, to_line
from drophot.settings import name_of
from drophot.tracking.dynamics import Statistic
from drophot.training import loop

# Random state and the number of threads are a process's own: its stages go one after the other.
_one_at_a_time = Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What is computed once, and what it needs.

    Cells that share it share these values; those that it does not depend on are left out.
    """

    kind: Literal["score", "train", "finetune"]
    seed: int
    mode: Any = "baseline"
    data_ratio: float = 1.0
    equal_steps: bool = False
    prune_ratio: float = 0.0
    reinitialize: bool = False
    rewind: bool = False
    recalibrate_bn: bool = False
    schedule: str = "one-shot"

    @property
    def name(self) -> str:
        """The stage's file."""
        parts = [self.kind, f"seed{self.seed}"]
        if self.kind != "score":
            parts += [
                name_of(self.mode),
                f"keep{self.data_ratio}",
                *["equal"] * self.equal_steps,
            ]
        if self.kind == "finetune":
            parts += [f"prune{self.prune_ratio}", *["new"] * self.reinitialize]
            parts += [*["rewound"] * self.rewind, *["bn"] * self.recalibrate_bn]
            parts += [self.schedule] if self.schedule != "one-shot" else []
        return "-".join(parts) + (".json" if self.kind == "finetune" else ".pt")

    def needs(self, pipeline: DropHot) -> Stage | None:
        """The stage whose result this one goes on from.

        Args:
            pipeline: Whose stage it is.

        Returns:
            The stage, if there is one.
        """
        if self.kind == "score" or (self.kind == "train" and not _needs_scoring(self.mode)):
            return None
        scored = Stage(kind="score", seed=self.seed)
        if self.kind == "train" or (self.mode == "baseline" and score_is_baseline(pipeline)):
            return scored
        return Stage(
            kind="train",
            seed=self.seed,
            mode=self.mode,
            data_ratio=self.data_ratio,
            equal_steps=self.equal_steps,
        )

    def epochs(self, pipeline: DropHot) -> float:
        """The passes over the full training set that it takes.

        Args:
            pipeline: Whose stage it is.

        Returns:
            Their number.
        """
        if self.kind == "score":
            return pipeline.score_epochs
        if self.kind == "finetune":
            return pipeline.finetune_epochs
        return pipeline.train_epochs * (1 if self.equal_steps else self.data_ratio)


def _needs_scoring(mode: Any) -> bool:
    return mode != "baseline" and modes.needs_scoring(mode)


def score_is_baseline(pipeline: DropHot) -> bool:
    """Whether the network that step 1 trains is the one that training on everything gives.

    Args:
        pipeline: The run.

    Returns:
        Whether its epochs are equal; the weights are then equal, bit for bit.
    """
    return pipeline.score_epochs == pipeline.train_epochs


def compute(
    pipeline: DropHot, store: Store, stage: Stage, threads: int, data: str
) -> Record | None:
    """Compute a stage and keep what it gives, unless another process was faster.

    Args:
        pipeline: The run, whose data in memory may be left at home.
        store: Where results are.
        stage: What to compute; what it needs is in the store.
        threads: How many this process may use.
        data: The digest of the data that was left at home.

    Returns:
        The record, of a fine-tuning.

    Raises:
        RuntimeError: If what the stage needs was damaged meanwhile.
    """
    ambient = vars(pipeline).get("_ambient")  # None where the switches are set already
    around = nullcontext() if ambient is None else surrounded(ambient, pipeline.device)
    with _one_at_a_time, limited_threads(threads), around:
        found = store.load(stage.name)
        if found is None:
            if pipeline.train_set is None or pipeline.test_set is None:
                found = _data(store.folder / "data.pt", data, pipeline.device)
                pipeline.config = replace(pipeline.config, **found)
            store.check_writable()
            before: dict[str, Any] = {}
            if (need := stage.needs(pipeline)) is not None:
                content = store.load(need.name)
                if content is None:
                    raise RuntimeError(f"{need.name} was damaged meanwhile: run the grid again.")
                before = torch.load(io.BytesIO(content), weights_only=True)
            try:
                found = _COMPUTE[stage.kind](pipeline, stage, before)
            finally:
                if pipeline.device.type == "cuda":
                    torch.cuda.empty_cache()  # for the other processes
            store.save(stage.name, found)
    return from_line(found.decode()) if stage.kind == "finetune" else None


def _score(pipeline: DropHot, stage: Stage, before: dict[str, Any]) -> bytes:
    run = pipeline.replace(seed=stage.seed)
    found = run.score()
    scores = {"forgetting": found}
    if run.tracker is not None:
        scores = {name: run.statistic(name) for name in get_args(Statistic)}
    scores = {name: score.cpu() for name, score in scores.items()}
    assert run.scorer is not None
    accuracy = nan
    if score_is_baseline(pipeline):
        accuracy = loop.evaluate(run.scorer, run.test_set)
    indices, seconds = torch.arange(len(found)), dict(run.seconds)
    return _saved({"scores": scores, **_trained(run, run.scorer, indices, accuracy, seconds)})


def _train(pipeline: DropHot, stage: Stage, before: dict[str, Any]) -> bytes:
    run = _run(pipeline, stage)
    if (statistic := modes.statistic_of(run.mode)) is not None and before:
        run.scores = before["scores"][statistic]
    elif before:
        run.scorer = _network(run, before)
    run.seconds = before.get("seconds", {})
    indices = run.select()
    model = run.train()
    seconds = dict(run.seconds)
    return _saved(_trained(run, model, indices, run.trained_accuracy, seconds))


def _finetune(pipeline: DropHot, stage: Stage, before: dict[str, Any]) -> bytes:
    run = _run(pipeline, stage)
    run.model = _network(run, before)
    run.indices, run.trained_accuracy = before["indices"], before["accuracy"]
    run.seconds = before["seconds"]
    run.prune()
    return to_line(run.finetune()).encode()


_COMPUTE = {"score": _score, "train": _train, "finetune": _finetune}


def _run(pipeline: DropHot, stage: Stage) -> DropHot:
    return pipeline.replace(
        seed=stage.seed,
        mode="random" if stage.mode == "baseline" else stage.mode,
        data_ratio=stage.data_ratio,
        equal_steps=stage.equal_steps,
        prune_ratio=stage.prune_ratio,
        reinitialize=stage.reinitialize,
        rewind=stage.rewind,
        recalibrate_bn=stage.recalibrate_bn,
        schedule=stage.schedule,
    )


def _network(run: DropHot, before: dict[str, Any]) -> nn.Module:
    """A network as it was after its training."""
    with random_state.preserved_rng(run.device, seed=2 * run.seed):  # as in its training
        model = run.factory().to(run.device)
    model.load_state_dict(before["state"])
    put_back(model, before.get("remainder", {}))
    return model


def _trained(
    run: DropHot, model: nn.Module, indices: Tensor, accuracy: float, seconds: dict[str, float]
) -> dict[str, Any]:
    state = {
        name: value.cpu() if isinstance(value, Tensor) else value  # or a get_extra_state's
        for name, value in model.state_dict().items()
    }
    rest = remainder(model, _network(run, {"state": state}))
    return {
        "state": state,
        "remainder": rest,
        "indices": indices,
        "accuracy": accuracy,
        "seconds": seconds,
    }


def _saved(result: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.save(result, content)
    return content.getvalue()


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads of the CPU.

    Args:
        threads: Their number.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)  # for the process's next stage; another digest is other data
def _data(path: Path, digest: str, device: torch.device) -> dict[str, TensorDataset]:
    """What was left at home; on a CPU all processes of a machine share its memory."""
    content = torch.load(path, mmap=True, weights_only=True)
    return {
        name: TensorDataset(*(tensor.to(device) for tensor in tensors))
        for name, tensors in content.items()
    }
