"""CREST: weighted mini-batch coresets, reselected when a model of the loss is inaccurate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from drophot._core import distributed, random_state, scalars
from drophot._core.exact_arithmetic import exact
from drophot._core.model_contexts import evaluating
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot.coreset.class_balance import (
    check_targets,
    class_members,
    random_proportional_sizes,
)
from drophot.coreset.feature_extraction import error_vectors
from drophot.data import batching
from drophot.data.indexing import IndexedDataset
from drophot.data.samples import targets_of
from drophot.sampling import selection_state
from drophot.sampling.batched_medoids import medoids
from drophot.sampling.epoch_iterator import check_num_processes, check_replicas
from drophot.sampling.saved_state import checked_state
from drophot.training import loop
from drophot.training.step import fast_forward

_GRADIENT_DECAY, _CURVATURE_DECAY = 0.9, 0.999  # of moving averages, the latter of squares
_SUBSETS_PER_STEP = 5  # random subsets for each step between two checks
_BATCH = 1024


class CrestLoader:
    r"""A loader of weighted mini-batch coresets of random subsets, reselected as the model learns.

    It works in any training loop that multiplies each sample's loss by its weight; see the example.
    `model` is the model being trained. It is evaluated between the steps and not changed.

    1. *Selection.* :math:`P` random subsets, each a fraction `subset` of the data with every class
       in its proportion, yield one mini-batch each: for each class, the medoids that facility
       location finds among softmax − one-hot. A class whose share is less than one medoid has one
       with that probability. The weight of a medoid is the number of samples that it represents,
       divided by its mean over the mini-batch. Each step uses one of the :math:`P` mini-batches at
       random.
    2. *Model of the loss* around the parameters :math:`w_0` at the time of the selection,
       :math:`F(\delta) = L(w_0) + \bar g^\top \delta + \frac{1}{2} \delta^\top \bar H \delta`: the
       gradient of the mini-batches and the diagonal of their Hessian (Hutchinson's estimate with
       one draw per mini-batch), as moving averages over all selections with decay 0.9 and, for the
       squared diagonal, 0.999.
    3. *Check* every :math:`T_1` steps. If :math:`F` differs from the loss on a random subset by
       more than `threshold` times that loss, select again, with
       :math:`T_1 = \lceil h\,\lVert \bar H_0 \rVert / \lVert \bar H \rVert \rceil`, at most the
       steps of an epoch, and :math:`P = \min(5\,T_1, \text{steps per epoch})`.

    During selection and checks, the model is in evaluation mode and runs without autocast; all
    arithmetic is in float32 or better. Learned samples are not excluded (section 4.3 of the paper,
    which saves time over hundreds of epochs).

    On several ranks, pass `num_replicas` and `rank`. Rank 0 selects and checks while the others
    wait, and sends them the result. Each rank yields its share of every mini-batch, so that DDP's
    mean over the ranks is the mean over the mini-batch. Selection is not divided among the ranks.

    `state_dict` and `load_state_dict` resume in the middle of an epoch, with the selection, the
    model of the loss and the random generators. Save the weights of the model with it.

    References:
        Yang, Kang and Mirzasoleiman, Towards Sustainable Learning: Coresets for Data-efficient Deep
        Learning, ICML 2023, https://arxiv.org/abs/2306.01244. The authors' code accumulates two
        backward passes and so doubles the gradient; here it is counted once.

    Args:
        dataset: Samples `(input, target)` or `(input, target, index)` whose targets are classes. It
            is held on the model's device if that does not change the samples, as in
            :func:`drophot.fit`.
        model: Called as `model(inputs)`, returns logits `(B, C)`; trained with cross-entropy. Its
            loss must be twice differentiable, which rules out compiled models.
        ratio: An epoch has as many steps as one on this fraction of the data, in (0, 1].
        batch_size: `m`, the number of samples in a mini-batch.
        subset: The fraction of the data in a random subset, in (0, 1]; at least two mini-batches.
        threshold: `τ`, the relative error of the modeled loss that is tolerated.
        interval: `h`, a factor of the number of steps between two checks.
        seed: Determines the subsets and Hutchinson's estimates.
        cache: Whether the decoded dataset is held in memory, as in :func:`drophot.fit`.
        num_replicas: The number of ranks among which each mini-batch is divided.
        rank: Which of them this one is.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the dataset is empty, its targets are not
            classes, or the ranks do not divide the size of a mini-batch.

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
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        ratio, subset = check_keep_ratio("ratio", ratio), check_keep_ratio("subset", subset)
        self.batch_size = scalars.integer("batch_size", batch_size)
        seed = scalars.integer("seed", seed)
        threshold = scalars.real("threshold", threshold)
        interval = scalars.real("interval", interval)
        for name, value in (("batch_size", self.batch_size), ("interval", interval)):
            if not value > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {value}.")
        if not threshold >= 0:
            raise ValueError(f"`threshold` must not be negative, got {threshold}.")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"`model` must have trainable parameters, but this {type(model).__name__} has none."
            )
        self.num_replicas, self.rank = check_replicas(num_replicas, rank)
        # Rank 0 evaluates the model alone, and DDP's forward may wait for the others.
        self.model = model
        if self.num_replicas > 1 and isinstance(model, DistributedDataParallel):
            self.model: nn.Module = model.module
        device = next(model.parameters()).device
        with random_state.preserved_rng():  # a random transform may draw numbers
            indexed = len(loop.first_sample("dataset", dataset)) == 3
        whole = dataset if indexed else IndexedDataset(dataset)
        self.dataset = loop.in_memory(whole, device, cache=cache)
        self._total = len(dataset)  # type: ignore[arg-type]
        self._steps = batching.num_batches(num_kept(self._total, ratio), self.batch_size)
        self._size = min(self._total, max(num_kept(self._total, subset), 2 * self.batch_size))
        if min(self._size, self.batch_size) % self.num_replicas:
            raise ValueError(
                f"`num_replicas` must divide the size of a mini-batch, "
                f"{min(self._size, self.batch_size)}, got {self.num_replicas}. Choose another "
                f"`batch_size`, of which each rank gets an equal share."
            )
        targets = check_targets(targets_of(self.dataset), self._total)
        if targets.min() < 0:
            raise ValueError(f"`dataset` must have targets of at least 0, got {targets.min()}.")
        self._classes = class_members(targets)
        self._generator = np.random.default_rng(seed % 2**64)
        self._torch_generator = torch.Generator().manual_seed(seed % 2**63)
        self.threshold, self.interval, self._seed = threshold, interval, seed
        # Of the last selection: mini-batches (P, m) and their weights.
        self.selections = 0
        self.checks = 0
        self.check_every = 1
        self._batches = torch.empty(0, 0, dtype=torch.int64)
        self._weights = torch.empty(0, 0, dtype=torch.float32)
        self._steps_since_selection = 0
        # Moving averages of the gradient and of the squared curvature.
        self._averages: tuple[Tensor, Tensor] | None = None
        self._first_norm = 0.0
        self._yielded = 0  # steps of the epoch that was begun last; 0 if it is complete
        self._resume_at = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        start, self._resume_at = self._resume_at, 0
        return self._steps_from(start)

    def _steps_from(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        device = next(self.model.parameters()).device
        for step in range(start, self._steps):
            due = (
                self._steps_since_selection and self._steps_since_selection % self.check_every == 0
            )
            if not self.selections or due:
                self._update_selection()
            self._steps_since_selection += 1
            number = int(
                torch.randint(len(self._batches), (), generator=self._torch_generator, device="cpu")
            )
            mine = slice(self.rank, None, self.num_replicas)
            inputs, targets, index = batching.at(self.dataset, self._batches[number, mine], device)
            self._yielded = (step + 1) % self._steps
            yield inputs, targets, index, self._weights[number, mine].to(device)

    def _update_selection(self) -> None:
        """Select if there is no selection or it is outdated, on rank 0 for all ranks."""
        if self.num_replicas > 1:
            check_num_processes(self.num_replicas)

        def update() -> dict[str, Any]:
            if self.selections and not self._is_outdated():
                return {"checks": self.checks}
            self._select()
            return selection_state.dump(self) if self.num_replicas > 1 else {}

        changed = distributed.from_rank_0(update, self.num_replicas, self.rank)
        if self.rank:
            selection_state.load(self, changed)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the whole state, equal on all ranks, for `torch.save`.

        Returns:
            Tensors, numbers and names; `torch.load(weights_only=True)` reads them.
        """
        return {
            **self._settings(),
            "yielded": self._yielded,
            "selection": selection_state.dump(self),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume: the next iteration yields the rest of the epoch.

        Args:
            state_dict: The state of a loader with the same data and arguments, of any rank.

        Raises:
            ValueError: If it is of a loader with other arguments or a model with another number of
                trainable parameters, or not such a state.
        """
        saved = checked_state(state_dict, self._settings(), "CrestLoader", "selection")
        yielded = saved.integer("yielded", most=self._steps)
        selection = saved.part("selection")
        selection_state.check(self, selection)
        selection_state.load(self, selection.values)
        self._yielded = self._resume_at = yielded % self._steps

    def _settings(self) -> dict[str, Any]:
        return {
            "num_samples": self._total,
            "batch_size": self.batch_size,
            "steps_per_epoch": self._steps,
            "subset_size": self._size,
            "threshold": self.threshold,
            "interval": self.interval,
            "seed": self._seed,
        }

    @exact(products=True)
    def _select(self) -> None:
        """Select new mini-batches for the current parameters, and model the loss around these."""
        count = min(_SUBSETS_PER_STEP * self.check_every, self._steps)
        subsets = [self._subset() for _ in range(count)]
        with evaluating(self.model) as device:
            found = [self._errors_and_loss(torch.cat(parts), device) for parts in subsets]
            losses = [loss for _, loss in found]
            size = min(self.batch_size, self._size)
            sizes = [
                random_proportional_sizes(map(len, parts), size, self._generator).tolist()
                for parts in subsets
            ]
            groups = [
                errors.split([len(part) for part in parts])
                for (errors, _), parts in zip(found, subsets, strict=True)
            ]
            chosen, weights = medoids(groups, sizes)
            self._batches = torch.stack([
                torch.cat([part[indices] for part, indices in zip(parts, of_classes, strict=True)])
                for parts, of_classes in zip(subsets, chosen, strict=True)
            ])
            self._weights = torch.stack([torch.cat(of_classes) for of_classes in weights])
            self._weights /= self._weights.mean(1, keepdim=True)
            self._check_on, self._start_loss = torch.cat(subsets[0]), losses[0]
            self._model_loss(device)
        self.selections += 1
        self._steps_since_selection = 0

    def _subset(self) -> list[Tensor]:
        """The indices of a random subset, one tensor per class."""
        sizes = random_proportional_sizes(map(len, self._classes), self._size, self._generator)
        return [
            torch.from_numpy(self._generator.choice(part, size, replace=False, shuffle=False))
            for part, size in zip(self._classes, sizes.tolist(), strict=True)
        ]

    def _errors_and_loss(self, indices: Tensor, device: torch.device) -> tuple[Tensor, float]:
        """Softmax − one-hot of some samples, and their mean loss."""
        forward = fast_forward(self.model, device)
        found, total = [], 0.0
        for part in indices.split(_BATCH):
            inputs, targets, _ = batching.at(self.dataset, part, device)
            logits = forward(inputs)
            found.append(error_vectors(logits, targets))
            total += float(
                F.cross_entropy(_at_least_float32(logits), targets.long(), reduction="sum")
            )
        return torch.cat(found), total / len(indices)

    def _model_loss(self, device: torch.device) -> None:
        """Update the moving averages with gradient and curvature on the new mini-batches."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self._origin = _flat(weights)
        gradient, curvature = torch.zeros_like(self._origin), torch.zeros_like(self._origin)
        forward = fast_forward(self.model, device)
        for indices, weight in zip(self._batches, self._weights, strict=True):
            inputs, targets, _ = batching.at(self.dataset, indices, device)
            # Only the plain kernel of attention has second derivatives.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                losses = F.cross_entropy(
                    _at_least_float32(forward(inputs)), targets.long(), reduction="none"
                )
                try:
                    grads, signs, products = self._derivatives(
                        (losses * weight.to(device)).mean(), weights
                    )
                except RuntimeError as error:
                    error.add_note(
                        f"CrestLoader needs second derivatives of the loss of `model`, which "
                        f"{type(self.model).__name__} may not support. If it is compiled, pass "
                        f"the original module."
                    )
                    raise
            gradient += _flat(grads) / len(self._batches)
            curvature += _flat(products) * _flat(signs) / len(self._batches)
        if self._averages is None:
            self._averages = torch.zeros_like(gradient), torch.zeros_like(gradient)
        mean, square = self._averages
        mean.lerp_(gradient, 1 - _GRADIENT_DECAY)
        square.lerp_(curvature.square(), 1 - _CURVATURE_DECAY)
        times = self.selections + 1
        self._gradient = mean / (1 - _GRADIENT_DECAY**times)
        self._curvature = (square / (1 - _CURVATURE_DECAY**times)).sqrt()
        norm = float(self._curvature.norm())
        if not isfinite(norm):  # training has diverged; check at each step
            self.check_every = 1
        elif norm:
            self._first_norm = self._first_norm or norm
            times = self.interval * self._first_norm / norm
            self.check_every = max(1, ceil(min(times, self._steps)))

    def _derivatives(
        self, loss: Tensor, weights: list[nn.Parameter]
    ) -> tuple[Sequence[Tensor], list[Tensor], Sequence[Tensor]]:
        """The gradient of a loss, Hutchinson's random signs, and the Hessian times these."""
        grads = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        signs = [self._random_signs(grad) for grad in grads]
        differentiable = [number for number, grad in enumerate(grads) if grad.requires_grad]
        products = torch.autograd.grad(
            [grads[number] for number in differentiable],
            weights,
            [signs[number] for number in differentiable],
            materialize_grads=True,
        )
        return grads, signs, products

    def _random_signs(self, like: Tensor) -> Tensor:
        """1 or −1 with equal probability, of the shape of `like`."""
        drawn = torch.randint(0, 2, like.shape, generator=self._torch_generator, dtype=torch.int8)
        return (2 * drawn - 1).to(like)

    @exact(products=True)
    def _is_outdated(self) -> bool:
        """Whether the modeled loss differs too much from the loss."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        with evaluating(self.model) as device:
            _, true = self._errors_and_loss(self._check_on, device)
            step = _flat(weights) - self._origin
            change = self._gradient @ step + 0.5 * (self._curvature * step) @ step
        self.checks += 1
        return not abs(self._start_loss + float(change) - true) <= self.threshold * true


def _flat(tensors: Any) -> Tensor:
    return torch.cat([_at_least_float32(tensor.detach().reshape(-1)) for tensor in tensors])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
