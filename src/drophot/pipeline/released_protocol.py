"""Where a run follows the paper's released code instead of its text.

A :class:`drophot.pipeline.RunProtocol` holds the hooks in which the two differ. The default,
`DropHot(protocol="paper")`, changes none of them. `protocol="released"` changes all, to trace the
published accuracies:

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

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drophot._core import scalars
from drophot._core.model_contexts import evaluating
from drophot.coreset import score_selection
from drophot.pipeline.protocol import RunProtocol
from drophot.settings.names import Named


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
