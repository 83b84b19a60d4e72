"""What the paper's released code does instead of what the paper says.

`DropHot(..., protocol="released")` is a preset for tracing the paper's published accuracies. It
differs from the text, which is the default, in three places:

- **Scores are scrambled by position.** After each epoch the released code walks a shuffled loader,
  keeps the predictions in the order of that walk, and counts an event wherever the prediction at a
  position differs from the one there an epoch before. Position `p` is another sample each time and
  no label enters, so the counts say nothing about samples: a perfect, frozen classifier of `C`
  balanced classes gets an event with probability `1 - 1/C` each epoch (:class:`PositionCounts`).
- **Ties go by index**: a stable sort (:func:`select`). With few distinct counts a coreset then
  depends on the order in which the data is stored.
- **The mask is dropped before fine-tuning**, so that the weights grow back: the record's
  `sparsity` falls to the share that never gets a gradient, and the fine-tuned accuracies are those
  of a network that is no longer pruned.

Pruning layer by layer is the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drophot._core import scalars
from drophot._core.model_contexts import evaluating
from drophot.coreset import score_selection


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
        self.walks = 0
        self._order = torch.Generator().manual_seed(scalars.integer("seed", seed))
        self._before: Tensor | None = None

    def observe(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Walk once over the data in a fresh order and compare with the walk before.

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
        self.walks += 1


def select(scores: Tensor, ratio: float, mode: Literal["high", "low"]) -> Tensor:
    """Keep a share of the samples by score, equal scores in the order of their index.

    Args:
        scores: `(N,)`.
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
        raise ValueError(f'`mode` should be "high" or "low". Found {mode!r}.')
    size = len(score_selection.select(scores, ratio, mode))  # its checks, too
    order = torch.argsort(scores, descending=mode == "high", stable=True)
    return order[:size].sort().values.cpu()
