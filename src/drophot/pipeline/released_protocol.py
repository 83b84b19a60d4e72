"""Where a run follows the paper's released code instead of its text.

A :class:`RunProtocol` holds the hooks in which the two differ. `DropHot(protocol="paper")`, the
default, changes none of them. `protocol="released"` changes all, to trace the published accuracies:

- **Scores are scrambled by position** (`"released-scores"` alone). After each epoch the released
  code walks a shuffled loader, keeps the predictions in the order of that walk, and counts an event
  wherever the prediction at a position differs from the one there an epoch before. Position `p` is
  another sample each time and no label enters, so the counts say nothing about samples: a perfect,
  frozen classifier of `C` balanced classes gets an event with probability `1 - 1/C` each epoch
  (:class:`PositionCounts`). Equal scores are then ordered by index, by a stable sort
  (:func:`select`). With few distinct counts, a coreset depends on the order in which the data is
  stored.
- **The mask is dropped before fine-tuning** (`"released-masks"`), so that removed weights grow
  back: the record's `sparsity` falls to the share of weights that never get a gradient, and the
  accuracies after fine-tuning are those of a network that is no longer pruned.
- **The baseline is trained in evaluation mode** (`"released-baseline"`): the released code switches
  to it for the predictions and does not switch back. BatchNorm then normalizes by its initial
  statistics and dropout is off. It concerns step 1, and step 3 if everything is kept.

Pruning layer by layer is the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from drophot._core import scalars
from drophot._core.model_contexts import evaluating
from drophot.coreset import score_selection
from drophot.coreset.selectors import Evidence, Selector, check_evidence
from drophot.pipeline import modes
from drophot.settings import Named, Settings, name_of


class SampleCounter(Protocol):
    """Counts the events of every sample in step 1, in place of a tracker."""

    scores: Tensor
    """Shape `(N,)`; higher is harder."""

    def observe(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Called after each epoch with all samples, batch by batch, in a fixed order."""
        ...


class Selection(Protocol):
    """Chooses samples by their scores: see :func:`select`."""

    def __call__(self, scores: Tensor, ratio: float, mode: Literal["high", "low"]) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProtocol:
    """The hooks in which a run can differ from the paper's text, for `DropHot(protocol=...)`.

    A hook that is left at its default follows the text.

    Args:
        name: How records, files and tables call the protocol: letters, digits, ".", "_" and "-".
        counter: Called as `counter(num_samples, seed)` when step 1 starts. It returns an object
            that counts the events of every sample: `observe(model, batches)` is called after each
            epoch with all samples in a fixed order, and `scores` holds the counts `(N,)` in the
            end. No tracker follows the training then, so that only forgetting scores exist.
        select: Called as `select(scores, ratio, mode)` in step 2, where `mode` is `"high"` or
            `"low"`. It returns the positions of the kept samples `(K,)`.
        holds_masks: Whether removed weights stay zero in step 5.
        baseline_in_eval_mode: Whether trainings on the full training set (step 1, and step 3 if
            everything is kept) run in evaluation mode.

    Raises:
        TypeError: If a hook is not callable, or one of the last two is not a bool.

    Example:
        >>> RunProtocol(name="regrown", holds_masks=False).select is None
        True
    """

    name: str
    counter: Callable[[int, int], SampleCounter] | None = None
    select: Selection | None = None
    holds_masks: bool = True
    baseline_in_eval_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("counter", "select"):
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise TypeError(f"`{name}` must be callable or None, got {hook!r}.")
        for name in ("holds_masks", "baseline_in_eval_mode"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {value!r}.")

    def selector(self, mode: str | Named) -> Selector | None:
        """What selects in place of a mode, if the protocol does.

        Args:
            mode: The mode of the run.

        Returns:
            The selector; `None` for the mode's own.
        """
        name = name_of(mode)
        if self.select is not None and (name == "high" or name == "low"):
            return _HookSelector(self.name, self.select, name)
        return None


@dataclass(frozen=True, slots=True)
class _HookSelector:
    """Selects by the hook of a protocol."""

    name: str
    hook: Selection
    end: Literal["high", "low"]

    needs = ("scores",)

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        check_evidence(self, evidence)
        assert evidence.scores is not None
        return self.hook(evidence.scores, ratio, self.end)


def protocol_of(protocol: str | Named) -> RunProtocol:
    """The hooks of a protocol that is given by its name or as an object."""
    if isinstance(protocol, RunProtocol):
        if protocol.name in _BUILT_IN and protocol is not _BUILT_IN[protocol.name]:
            raise ValueError(
                f"`protocol` has the name {protocol.name!r}, which the library uses itself. Give "
                f"it another name, so that records tell the two apart."
            )
        return protocol
    if isinstance(protocol, str):
        return _BUILT_IN[protocol]
    raise TypeError(
        f"`protocol` must be a name or a RunProtocol, got {protocol!r}. Pass "
        f"drophot.pipeline.RunProtocol(name={protocol.name!r}, ...) with your hooks."
    )


def check_protocol(settings: Settings) -> None:
    """Check that the settings can be combined with the hooks of the protocol."""
    protocol = protocol_of(settings.protocol)
    given = f"protocol={name_of(settings.protocol)!r}"
    mode, scope = name_of(settings.mode), settings.scope
    scheduled = settings.schedule != "one-shot"
    statistic = modes.statistic_of(settings.mode)
    for wrong, other, why in (
        (
            protocol.select is not None and mode not in ("high", "low", "random"),
            f"mode={mode!r}",
            'it has its own rule for "high" and "low". Use mode="high", "low" or "random".',
        ),
        (
            protocol.counter is not None and statistic not in (None, "forgetting"),
            f"mode={mode!r}",
            "it counts events and has no other score. Use a mode that selects by forgetting.",
        ),
        (
            protocol.counter is not None and settings.forgetting != "paper",
            f"forgetting={settings.forgetting!r}",
            "it counts events in its own way. Remove `forgetting`.",
        ),
        (
            settings.protocol == "released" and scope != "layer",
            f"scope={scope!r}",
            "the released code prunes layer by layer. Remove `scope`.",
        ),
        (
            not protocol.holds_masks and scheduled,
            f"schedule={settings.schedule!r}",
            "it holds no masks. Remove `schedule`.",
        ),
        (
            not protocol.holds_masks and settings.structured,
            "structured=True",
            "it holds no masks. Remove `structured`.",
        ),
    ):
        if wrong:
            raise ValueError(f"`{given}` cannot be combined with `{other}`: {why}")


class PositionCounts:
    """Counts changes of prediction by position in a shuffled walk, as the released code does.

    Args:
        num_samples: `N`.
        seed: Draws the order of each walk.

    Example:
        >>> counts = PositionCounts(4, seed=0)
        >>> perfect, batch = nn.Identity(), (torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
        >>> for _ in range(10):
        ...     counts.observe(perfect, [batch])
        >>> bool(counts.scores.sum() > 0)  # though nothing was ever forgotten
        True
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        total = scalars.integer("num_samples", num_samples, least=1)
        self.scores = torch.zeros(total, dtype=torch.int64, device="cpu")
        self._order = torch.Generator().manual_seed(scalars.integer("seed", seed))
        self._before: Tensor | None = None

    def observe(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Walk over the data in a fresh order and compare with the previous walk.

        Args:
            model: Called as `model(inputs)`, gives logits `(B, C)`; in eval mode meanwhile.
            batches: All samples, in an order that does not change: `(inputs, ...)`.
        """
        with evaluating(model):
            predictions = torch.cat([model(batch[0]).argmax(1) for batch in batches]).cpu()
        order = torch.randperm(len(predictions), generator=self._order, device="cpu")
        walked = predictions[order]
        if self._before is not None:
            self.scores += walked != self._before
        self._before = walked


def select(scores: Tensor, ratio: float, mode: Literal["high", "low"]) -> Tensor:
    """Keep a share of the samples by score, equal scores in the order of their index.

    Args:
        scores: Shape `(N,)`.
        ratio: The share **kept**, in (0, 1].
        mode: `"high"` keeps the highest scores, `"low"` the lowest.

    Returns:
        The kept samples' positions `(K,)`, ascending.

    Raises:
        ValueError: If `mode` is another one, or :func:`drophot.select` would refuse the rest.

    Example:
        >>> select(torch.tensor([1, 0, 1, 1]), 0.5, "high")
        tensor([0, 2])
    """
    if mode not in ("high", "low"):
        raise ValueError(f'`mode` must be "high" or "low", got {mode!r}.')
    size = len(score_selection.select(scores, ratio, mode))  # its checks, too
    order = torch.argsort(scores, descending=mode == "high", stable=True)
    return order[:size].sort().values.cpu()


@contextmanager
def always_evaluating(model: nn.Module) -> Generator[None]:
    """Keep a model in evaluation mode through a training, and leave it in training mode."""

    def evaluate(module: nn.Module, _: object) -> None:
        module.eval()

    handle = model.register_forward_pre_hook(evaluate)
    try:
        yield
    finally:
        handle.remove()
        model.train()


def _position_counts(num_samples: int, seed: int) -> PositionCounts:
    return PositionCounts(num_samples, seed=seed)


_BUILT_IN = {
    protocol.name: protocol
    for protocol in (
        RunProtocol(name="paper"),
        RunProtocol(name="released-scores", counter=_position_counts, select=select),
        RunProtocol(name="released-masks", holds_masks=False),
        RunProtocol(name="released-baseline", baseline_in_eval_mode=True),
        RunProtocol(
            name="released",
            counter=_position_counts,
            select=select,
            holds_masks=False,
            baseline_in_eval_mode=True,
        ),
    )
}
