"""CREST: a stream of weighted mini-batch coresets, drawn anew when the loss has moved on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from drophot._core import random_state, scalars
from drophot._core.exact_arithmetic import exact
from drophot._core.model_contexts import evaluating
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot.coreset.class_balance import (
    check_targets,
    class_members,
    random_proportional_sizes,
)
from drophot.coreset.feature_extraction import errors
from drophot.data import batching
from drophot.data.indexing import IndexedDataset
from drophot.data.samples import targets_of
from drophot.sampling.batched_medoids import medoids
from drophot.training import loop
from drophot.training.step import fast_forward

_MEAN, _SQUARE = 0.9, 0.999  # of the moving averages of the gradient and of the curvature's square
_SETS = 5  # random subsets for each step between two checks
_CHUNK = 1024


class CrestLoader:
    r"""A loader whose batches are weighted coresets of random subsets, chosen as the model learns.

    It goes into any training loop that multiplies each sample's loss by its weight: see the
    example. The model is the one that is trained; it is read between the steps and left as it was.

    1. *Choose.* :math:`P` random subsets, each a share `subset` of the data with every class in its
       proportion, give a mini-batch each: per class, the medoids that facility location finds among
       softmax − one-hot. A class that is due less than one of them has one with that chance. A
       medoid's weight is the number of samples that it stands for, over its mean. A step takes one
       of the :math:`P` at random.
    2. *Model the loss* around the weights :math:`w_0` that they were chosen for,
       :math:`F(\delta) = L(w_0) + \bar g^\top \delta + \frac{1}{2} \delta^\top \bar H \delta`: the
       gradient of the mini-batches and their Hessian's diagonal (Hutchinson's estimate, one draw a
       mini-batch), as moving averages over all choices, 0.9 and, of the squares, 0.999.
    3. *Check* every :math:`T_1` steps. Where :math:`F` is off the loss on a random subset by more
       than `threshold` of it, choose again, with
       :math:`T_1 = \lceil h\,\lVert \bar H_0 \rVert / \lVert \bar H \rVert \rceil`, at most an
       epoch, and :math:`P = \min(5\,T_1, \text{steps an epoch})`.

    For choosing and checking the model is in evaluation mode and computes without autocast, in
    float32 or better, as all of the arithmetic does. Learned samples are not excluded
    (the paper's section 4.3, a saving over hundreds of epochs). One process; another one has
    coresets of its own.

    References:
        Yang, Kang and Mirzasoleiman, Towards Sustainable Learning: Coresets for Data-efficient Deep
        Learning, ICML 2023, https://arxiv.org/abs/2306.01244. Its code's gradient is twice the
        gradient (two backward passes into the same place); here it is counted once.

    Args:
        dataset: Samples `(input, target)` or `(input, target, index)`, targets classes. Kept on the
            model's device where that changes nothing, as in :func:`drophot.fit`.
        model: Called as `model(inputs)`, gives logits `(B, C)`; trained by cross-entropy. Its loss
            has second derivatives, which a compiled model's has not.
        ratio: An epoch is as many steps as one on this share of the data, in (0, 1].
        batch_size: `m`, samples in a mini-batch.
        subset: The share of the data in a random subset, in (0, 1]; two mini-batches at least.
        threshold: `τ`, the relative error of the modelled loss that is allowed.
        interval: `h`, by which the steps between two checks are multiplied.
        seed: Draws the subsets and the Hutchinson estimate.
        cache: Whether the decoded dataset is kept, as in :func:`drophot.fit`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range, the dataset is empty, or its targets are no classes.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = CrestLoader(data, model, batch_size=8)
        >>> for inputs, targets, index, weights in loader:
        ...     losses = F.cross_entropy(model(inputs), targets, reduction="none")
        ...     optimizer.zero_grad()
        ...     (losses * weights).mean().backward()
        ...     optimizer.step()
        >>> len(loader), len(index), round(float(weights.sum()), 3)
        (8, 8, 8.0)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        model: nn.Module,
        ratio: float = 1.0,
        *,
        batch_size: int = 128,
        subset: float = 0.01,
        threshold: float = 0.1,
        interval: float = 1.0,
        seed: int = 0,
        cache: loop.Cache = "auto",
    ) -> None:
        ratio, subset = check_keep_ratio("ratio", ratio), check_keep_ratio("subset", subset)
        self.batch_size = scalars.integer("batch_size", batch_size)
        seed = scalars.integer("seed", seed)
        threshold = scalars.real("threshold", threshold)
        interval = scalars.real("interval", interval)
        for name, value in (("batch_size", self.batch_size), ("interval", interval)):
            if not value > 0:
                raise ValueError(f"`{name}` should be above 0. Found {value}.")
        if not threshold >= 0:
            raise ValueError(f"`threshold` should not be negative. Found {threshold}.")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"`model` should have parameters to train. Found {type(model).__name__} without."
            )
        self.model = model
        device = next(model.parameters()).device
        with random_state.preserved_rng():  # a random transform may draw
            indexed = len(loop.first_sample("dataset", dataset)) == 3
        whole = dataset if indexed else IndexedDataset(dataset)
        self.dataset = loop.in_memory(whole, device, cache=cache)
        self._total = len(dataset)  # type: ignore[arg-type]
        self._steps = ceil(num_kept(self._total, ratio) / self.batch_size)
        self._size = min(self._total, max(num_kept(self._total, subset), 2 * self.batch_size))
        targets = check_targets(targets_of(self.dataset), self._total)
        if targets.min() < 0:
            raise ValueError(f"`dataset` should have targets from 0. Found {targets.min()}.")
        self._classes = class_members(targets)
        self._chance = np.random.default_rng(seed % 2**64)
        self._draws = torch.Generator().manual_seed(seed % 2**63)
        self.threshold, self.interval = threshold, interval
        # What has been chosen, of the last choice: mini-batches (P, m) and their weights.
        self.selections = 0
        self.checks = 0
        self.check_every = 1
        self._batches = torch.empty(0, 0, dtype=torch.int64)
        self._weights = torch.empty(0, 0, dtype=torch.float32)
        self._since = 0
        self._means: tuple[Tensor, Tensor] | None = (
            None  # of the gradient, of the squared curvature
        )
        self._first_norm = 0.0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        device = next(self.model.parameters()).device
        for _ in range(self._steps):
            due = self._since and self._since % self.check_every == 0
            if not self.selections or (due and self._has_moved_on()):
                self._select()
            self._since += 1
            number = int(torch.randint(len(self._batches), (), generator=self._draws, device="cpu"))
            inputs, targets, index = batching.at(self.dataset, self._batches[number], device)
            yield inputs, targets, index, self._weights[number].to(device)

    @exact(products=True)
    def _select(self) -> None:
        """New mini-batches for the weights as they are, and the loss around these."""
        count = min(_SETS * self.check_every, self._steps)
        subsets = [self._subset() for _ in range(count)]
        with evaluating(self.model) as device:
            found = [self._errors(torch.cat(parts), device) for parts in subsets]
            losses = [loss for _, loss in found]
            size = min(self.batch_size, self._size)
            sizes = [
                random_proportional_sizes(map(len, parts), size, self._chance).tolist()
                for parts in subsets
            ]
            groups = [
                errors.split([len(part) for part in parts])
                for (errors, _), parts in zip(found, subsets, strict=True)
            ]
            chosen, weights = medoids(groups, sizes)
            self._batches = torch.stack([
                torch.cat([part[places] for part, places in zip(parts, of_classes, strict=True)])
                for parts, of_classes in zip(subsets, chosen, strict=True)
            ])
            self._weights = torch.stack([torch.cat(of_classes) for of_classes in weights])
            self._weights /= self._weights.mean(1, keepdim=True)
            self._check_on, self._start_loss = torch.cat(subsets[0]), losses[0]
            self._model_loss(device)
        self.selections += 1
        self._since = 0

    def _subset(self) -> list[Tensor]:
        """A random subset, the positions of each class for itself."""
        sizes = random_proportional_sizes(map(len, self._classes), self._size, self._chance)
        return [
            torch.from_numpy(self._chance.choice(part, size, replace=False, shuffle=False))
            for part, size in zip(self._classes, sizes.tolist(), strict=True)
        ]

    def _errors(self, places: Tensor, device: torch.device) -> tuple[Tensor, float]:
        """Softmax − one-hot of some samples, and their mean loss."""
        forward = fast_forward(self.model, device)
        found, total = [], 0.0
        for part in places.split(_CHUNK):
            inputs, targets, _ = batching.at(self.dataset, part, device)
            logits = forward(inputs)
            found.append(errors(logits, targets))
            total += float(F.cross_entropy(_precise(logits), targets.long(), reduction="sum"))
        return torch.cat(found), total / len(places)

    def _model_loss(self, device: torch.device) -> None:
        """Gradient and curvature on the new mini-batches, into the moving averages."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self._origin = _flat(weights)
        gradient, curvature = torch.zeros_like(self._origin), torch.zeros_like(self._origin)
        forward = fast_forward(self.model, device)
        for places, weight in zip(self._batches, self._weights, strict=True):
            inputs, targets, _ = batching.at(self.dataset, places, device)
            # Of attention only the plain kernel has second derivatives.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                losses = F.cross_entropy(
                    _precise(forward(inputs)), targets.long(), reduction="none"
                )
                try:
                    grads, sides, bent = self._derivatives(
                        (losses * weight.to(device)).mean(), weights
                    )
                except RuntimeError as error:
                    error.add_note(
                        f"CrestLoader takes second derivatives of the model's loss, which "
                        f"{type(self.model).__name__} may not have: a compiled model has none."
                    )
                    raise
            gradient += _flat(grads) / len(self._batches)
            curvature += _flat(bent) * _flat(sides) / len(self._batches)
        if self._means is None:
            self._means = torch.zeros_like(gradient), torch.zeros_like(gradient)
        mean, square = self._means
        mean.lerp_(gradient, 1 - _MEAN)
        square.lerp_(curvature.square(), 1 - _SQUARE)
        times = self.selections + 1
        self._slope = mean / (1 - _MEAN**times)
        self._bend = (square / (1 - _SQUARE**times)).sqrt()
        norm = float(self._bend.norm())
        if not isfinite(norm):  # a training that has diverged is checked at each step
            self.check_every = 1
        elif norm:
            self._first_norm = self._first_norm or norm
            times = self.interval * self._first_norm / norm
            self.check_every = max(1, ceil(min(times, self._steps)))

    def _derivatives(
        self, loss: Tensor, weights: list[nn.Parameter]
    ) -> tuple[Sequence[Tensor], list[Tensor], Sequence[Tensor]]:
        """A loss's gradient, Hutchinson's draw, and the Hessian times it."""
        grads = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        sides = [self._sides(grad) for grad in grads]
        bendable = [number for number, grad in enumerate(grads) if grad.requires_grad]
        bent = torch.autograd.grad(
            [grads[number] for number in bendable],
            weights,
            [sides[number] for number in bendable],
            materialize_grads=True,
        )
        return grads, sides, bent

    def _sides(self, like: Tensor) -> Tensor:
        """Hutchinson's draw: 1 or −1, each with the same chance."""
        drawn = torch.randint(0, 2, like.shape, generator=self._draws, dtype=torch.int8)
        return (2 * drawn - 1).to(like)

    @exact(products=True)
    def _has_moved_on(self) -> bool:
        """Whether the modelled loss is no longer the loss."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        with evaluating(self.model) as device:
            _, true = self._errors(self._check_on, device)
            step = _flat(weights) - self._origin
            change = self._slope @ step + 0.5 * (self._bend * step) @ step
        self.checks += 1
        return not abs(self._start_loss + float(change) - true) <= self.threshold * true


def _flat(tensors: Any) -> Tensor:
    return torch.cat([_precise(tensor.detach().reshape(-1)) for tensor in tensors])


def _precise(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
