"""Pruning in several steps during training, and rewinding to earlier weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from drophot._core import scalars
from drophot._core.ratios import check_prune_ratio
from drophot.prune import earlier_masks, layer_sparsity
from drophot.prune.current_parameters import current, own_names
from drophot.prune.holding import Hold, is_counting
from drophot.prune.layer_sparsity import Scope
from drophot.prune.magnitude import check_scope, pruned
from drophot.prune.masks import Masks
from drophot.prune.prunable_weights import check_mapping, names_of, prunable
from drophot.prune.unpruned_weights import uncovered_warning_silenced

__all__ = ["Schedule", "cubic", "geometric", "rewind"]


def cubic(ratio: float, times: int) -> tuple[float, ...]:
    r"""The ratios of gradual pruning, which removes many weights at first and few at last.

    :math:`s_i = s \, (1 - (1 - i / n)^3)` for :math:`i = 1 \dots n`.

    References:
        Zhu and Gupta, To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878.

    Args:
        ratio: The share removed in the end, in [0, 1).
        times: The number of prunings, `n`.

    Returns:
        The share removed after each pruning; the last is `ratio`.

    Raises:
        TypeError: If `ratio` is not a number, or `times` not an integer.
        ValueError: If `ratio` is not in [0, 1), or `times` less than 1.

    Example:
        >>> [round(ratio, 3) for ratio in cubic(0.8, 4)]
        [0.463, 0.7, 0.788, 0.8]
    """
    ratio, times = check_prune_ratio("ratio", ratio), scalars.integer("times", times, least=1)
    return (*(ratio - ratio * (1 - i / times) ** 3 for i in range(1, times)), ratio)


def geometric(ratio: float, times: int) -> tuple[float, ...]:
    r"""The ratios of iterative pruning: each round removes the same share of what is left.

    :math:`s_i = 1 - (1 - s)^{i / n}` for :math:`i = 1 \dots n`.

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019,
        https://arxiv.org/abs/1803.03635. Renda et al., Comparing Rewinding and Fine-tuning in
        Neural Network Pruning, ICLR 2020, https://arxiv.org/abs/2003.02389.

    Args:
        ratio: The share removed in the end, in [0, 1).
        times: The number of rounds, `n`.

    Returns:
        The share removed after each round; the last is `ratio`.

    Raises:
        TypeError: If `ratio` is not a number, or `times` not an integer.
        ValueError: If `ratio` is not in [0, 1), or `times` less than 1.

    Example:
        >>> geometric(0.75, 2)
        (0.5, 0.75)
    """
    ratio, times = check_prune_ratio("ratio", ratio), scalars.integer("times", times, least=1)
    return (*(1 - (1 - ratio) ** (i / times) for i in range(1, times)), ratio)


class Schedule:
    """Magnitude pruning in several prunings, with training between them.

    The first ratio is applied at once. Call `step` after each step of the optimiser: it keeps
    removed weights at zero, and after each `every` calls it prunes to the next ratio. With one
    ratio this is `magnitude_prune` and `Masks.hold`. Raises the errors of `magnitude_prune` too.

    A layer in which every weight is zero when training starts, such as the head of a vision
    transformer, is left out until it has other weights, as in `magnitude_prune`. From then on a
    `"global"` ranking removes no more than the current ratio of it, because its weights have grown
    for less time than those that they are compared with.

    Args:
        model: Any module, on any device.
        ratios: The share **removed** after each pruning, not decreasing: from `cubic`, `geometric`
            or any iterable of numbers.
        every: Steps of the optimiser between two prunings.
        scope: As in `magnitude_prune`.
        min_kept: As in `magnitude_prune`.
        skip: As in `magnitude_prune`.
        include: As in `magnitude_prune`.

    Raises:
        TypeError: If `ratios` is not an iterable, a ratio not a number, or `every` not an integer.
        ValueError: If there are no ratios, a ratio is not in [0, 1) or is below the one before it,
            or `every` is less than 1.

    Example:
        >>> import torch
        >>> model = nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> schedule = Schedule(model, geometric(0.75, 2), every=3)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        ...     if schedule.step():
        ...         print(schedule.masks)
        Masks(1 tensor, 48 of 64 weights removed, sparsity 0.7500)
    """

    def __init__(
        self,
        model: nn.Module,
        ratios: Iterable[float],
        *,
        every: int,
        scope: Scope = "global",
        min_kept: float = 0.0,
        skip: Iterable[str] = (),
        include: Iterable[str] = (),
    ) -> None:
        if isinstance(ratios, str) or not isinstance(ratios, Iterable):
            raise TypeError(
                f"`ratios` must be an iterable of numbers. Found {ratios!r}; to prune once, pass "
                f"[{ratios}]."
            )
        self.ratios = tuple(
            check_prune_ratio(f"ratios[{number}]", ratio) for number, ratio in enumerate(ratios)
        )
        if not self.ratios:
            raise ValueError("`ratios` must contain at least one ratio, but it is empty.")
        for before, ratio in pairwise(self.ratios):
            if ratio < before:
                raise ValueError(
                    f"`ratios` must not decrease, since removed weights do not come back. Found "
                    f"{ratio} after {before}."
                )
        self.every = scalars.integer("every", every, least=1)
        self._model = model
        check_scope("scope", scope)
        self._settings: dict[str, Any] = {
            "scope": scope,
            "min_kept": check_prune_ratio("min_kept", min_kept),
            "skip": names_of("skip", skip),
            "include": names_of("include", include),
        }
        self._check_minimum()
        self._late: set[str] = set()  # layers that were all zero at a pruning
        self.steps = 0
        self.masks = self._prune(self.ratios[0])

    @property
    def ratio(self) -> float:
        """The share that is removed now."""
        return self.ratios[min(self.steps // self.every, len(self.ratios) - 1)]

    @property
    def finished(self) -> bool:
        """Whether the last ratio is reached."""
        return self.steps >= self.every * (len(self.ratios) - 1)

    def step(self) -> bool:
        """Keep removed weights at zero, and prune to the next ratio when that is due.

        Returns:
            Whether it pruned.

        Raises:
            RuntimeError: If it is captured in a CUDA graph (`drophot.fit` takes plain steps then),
                or a held optimiser counts the steps already.
        """
        if is_counting(self):
            raise RuntimeError(
                "`step` should not be called while the schedule is held, since each step of the "
                "held optimizer is counted already. Leave out either `hold` or this call."
            )
        return self._advance()

    def _advance(self) -> bool:
        """Count a step, and prune on where that is due."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "`step` must not be captured in a CUDA graph, since it counts its calls: call it "
                "after each replay."
            )
        self.masks.zero()
        steps = self.steps + 1
        due = steps % self.every == 0 and steps // self.every < len(self.ratios)
        if due:
            self.masks.apply()  # so that they are known as what was removed before
            with uncovered_warning_silenced():  # what stays dense was said by the first pruning
                self.masks = self._prune(self.ratios[steps // self.every])
        self.steps = steps  # a pruning that failed is still due
        return due

    def hold(self, optimizer: Optimizer) -> RemovableHandle:
        """Hold the masks as `Masks.hold` does, and call `step` after each step of an optimiser.

        Where several optimisers train one model, hold each of them. The steps of the one that was
        held last are counted, so that one iteration counts once.

        Args:
            optimizer: The optimiser that trains the model, or a part of it.

        Returns:
            A handle: `handle.remove()` ends it, and so does leaving `with handle:`. Both raise a
            `RuntimeError` if removed weights are not zero then, or no step was counted although
            the model was trained.

        Raises:
            TypeError: If `optimizer` is not a torch optimiser.
            ValueError: If it trains none of the masked parameters, or these are sharded.
        """
        return Hold(self.masks, self._model, optimizer, self).begin()

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, for `torch.save`.

        Returns:
            The number of steps, the masks, and the settings that these belong to.
        """
        state = {"steps": self.steps, "masks": self.masks.state_dict(), "late": sorted(self._late)}
        return state | self._described()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from the state of a saved schedule.

        Args:
            state_dict: What `state_dict` returned, of a schedule with the same settings.

        Raises:
            TypeError: If it is not a dict, or the number of steps is not an integer.
            ValueError: If it is not the state of a schedule, belongs to other settings or to the
                masks of another model, the number of steps is negative, or the model was loaded
                before this schedule was made. Nothing is changed then.
        """
        check_mapping("state_dict", state_dict)
        if lacking := {"steps", "masks", "late", *self._described()} - state_dict.keys():
            raise ValueError(
                f"`state_dict` must be that of a Schedule. It has no {sorted(lacking)[0]!r}."
            )
        for name, own in self._described().items():
            if state_dict[name] != own:
                raise ValueError(
                    f"`state_dict` must be of a schedule with {name}={own}. Found "
                    f"{state_dict[name]}: create the Schedule with the same settings."
                )
        steps = scalars.integer('state_dict["steps"]', state_dict["steps"], least=0)
        late = names_of('state_dict["late"]', state_dict["late"])
        check_mapping('state_dict["masks"]', state_dict["masks"])
        own = own_names((*late, *state_dict["masks"]), self.masks.keys())
        self._check_order({own[name]: mask for name, mask in state_dict["masks"].items()})
        self.masks.load_state_dict(state_dict["masks"])
        self.steps = steps
        self._late = {own[name] for name in late}

    def _check_order(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse a model whose pruned layers were taken for layers that start at zero."""
        if not self.ratios[0] or self._settings["scope"] not in ("global", "lamp"):
            return
        emptied = [n for n in sorted(self._late & saved.keys()) if not torch.any(saved[n])]
        if emptied:
            raise ValueError(
                f"`state_dict` removes all of `{emptied[0]}`, which was zero when this Schedule "
                f"was made. The model had its saved weights by then, so the first pruning took "
                f"this layer for one that starts at zero, and removed other weights instead. Make "
                f"the Schedule first, then load the model's weights, then this."
            )

    def _described(self) -> dict[str, Any]:
        """The settings that a state belongs to, in plain types."""
        settings = self._settings | {
            name: sorted(self._settings[name]) for name in ("skip", "include")
        }
        return {"ratios": list(self.ratios), "every": self.every} | settings

    def _check_minimum(self) -> None:
        """Refuse now what the last pruning would refuse."""
        skip, include = self._settings["skip"], self._settings["include"]
        if self._settings["min_kept"] and self._settings["scope"] in ("global", "lamp"):
            weights = prunable(self._model, skip, include)
            older = earlier_masks.masks_of(self._model, weights)
            layer_sparsity.check_minimum(
                weights, older, self.ratios[-1], self._settings["min_kept"]
            )

    def _prune(self, ratio: float) -> Masks:
        late = set(self._late)
        masks = pruned(self._model, ratio, **self._settings, late=late)
        self._late = late
        return masks


def rewind(model: nn.Module, masks: Masks, state_dict: Mapping[str, Tensor]) -> None:
    """Load other weights under the same masks.

    Weights from an early step of the training that led to the masks give rewinding; those from its
    start, the lottery ticket; and those of a new initialisation, the random control, which shows
    what the masks are worth without the weights.

    References:
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020,
        https://arxiv.org/abs/1912.05671.

    Args:
        model: The model that gets the weights: the pruned one, or another of the same
            architecture, such as a new one or a copy.
        masks: Masks of such a model.
        state_dict: The other weights, of the whole model.

    Raises:
        TypeError: If `masks` is no `Masks`, or `state_dict` no dict.
        ValueError: If names or shapes are not the model's, it lacks a masked parameter, or the
            tensors are the model's own, which are trained with it. Nothing is changed then.

    Example:
        >>> import torch
        >>> from drophot import magnitude_prune
        >>> model = nn.Linear(8, 8)
        >>> start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> masks = magnitude_prune(model, 0.5)
        >>> rewind(model, masks, start)
        >>> torch.equal(model.weight, start["weight"] * masks["weight"])
        True
    """
    if not isinstance(masks, Masks):
        raise TypeError(f"`masks` should be a Masks. Found a {type(masks).__name__}.")
    check_mapping("state_dict", state_dict)
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state_dict.keys())
    wrong += [name for name in own if name in state_dict and not _alike(own, state_dict, name)]
    if wrong:
        raise ValueError(
            f"`state_dict` must hold the weights of this model. Found a difference in {wrong}."
        )
    for name, tensor in own.items():  # extra state is anything
        other = state_dict[name]
        both = isinstance(tensor, Tensor) and isinstance(other, Tensor) and tensor.numel()
        if both and tensor.data_ptr() == other.data_ptr():
            raise ValueError(
                f"`state_dict` must be a copy. `{name}` is the model's own tensor, which changes "
                f"during training: keep copy.deepcopy(model.state_dict()) instead."
            )
    current(model, masks)
    model.load_state_dict(state_dict)
    masks.apply(model)


def _alike(own: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Whether two entries can be the same tensor at two times, or are a module's extra state."""
    one, two = own[name], other[name]
    if isinstance(one, Tensor) != isinstance(two, Tensor):
        return name.endswith("_extra_state")
    return not isinstance(one, Tensor) or name.endswith("_extra_state") or one.shape == two.shape
