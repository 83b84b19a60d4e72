"""Prune in several steps during training, and rewind to earlier weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from drophot._core import scalars
from drophot._core.importance import Importance, importance_name
from drophot._core.ratios import check_prune_ratio
from drophot.prune import earlier_masks
from drophot.prune.current_parameters import current, own_names
from drophot.prune.holding import Hold, is_counting
from drophot.prune.layer_sparsity import Scope, check_minimum
from drophot.prune.magnitude import prune_to_ratio, pruning_options
from drophot.prune.masks import Masks
from drophot.prune.prunable_weights import check_mapping, names_of, prunable
from drophot.prune.unpruned_weights import uncovered_warning_silenced


def cubic(ratio: float, times: int) -> tuple[float, ...]:
    r"""The ratios of gradual pruning, which removes many weights early and few late.

    :math:`s_i = s \, (1 - (1 - i / n)^3)` for :math:`i = 1 \dots n`.

    References:
        Zhu and Gupta, To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878.

    Args:
        ratio: The share **removed** at the end, in [0, 1).
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
    r"""The ratios of iterative pruning, in which each round removes the same share of the rest.

    :math:`s_i = 1 - (1 - s)^{i / n}` for :math:`i = 1 \dots n`.

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019,
        https://arxiv.org/abs/1803.03635. Renda et al., Comparing Rewinding and Fine-tuning in
        Neural Network Pruning, ICLR 2020, https://arxiv.org/abs/2003.02389.

    Args:
        ratio: The share **removed** at the end, in [0, 1).
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
    """Magnitude pruning in several steps, with training between them.

    The first ratio is applied at once. Call `step` after each step of the optimizer: it sets
    removed weights to zero, and after each `every` calls it prunes to the next ratio. With one
    ratio this does the same as `magnitude_prune` and `Masks.hold`. The errors of `magnitude_prune`
    are raised too.

    A layer in which every weight is zero when training starts, such as the head of a vision
    transformer, is left out until it has other weights, as in `magnitude_prune`. From then on a
    `"global"` ranking removes no more than the current ratio of it, because its weights have grown
    for less time than those that they are compared with.

    Args:
        model: Any module, on any device.
        ratios: The share **removed** after each pruning, not decreasing: from `cubic`, `geometric`
            or any iterable of numbers.
        every: The number of optimizer steps between two prunings.
        scope: As in `magnitude_prune`.
        min_kept: As in `magnitude_prune`.
        skip: As in `magnitude_prune`.
        include: As in `magnitude_prune`.
        importance: As in `magnitude_prune`; called again at each pruning. The state of the
            schedule holds its name only, so pass the same function when you resume.

    Raises:
        TypeError: If `ratios` is not an iterable, a ratio is not a number, or `every` is not an
            integer.
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
        importance: Importance | None = None,
    ) -> None:
        if isinstance(ratios, str) or not isinstance(ratios, Iterable):
            raise TypeError(
                f"`ratios` must be an iterable of numbers, got {ratios!r}. To prune once, pass "
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
                    f"`ratios` must not decrease, since removed weights do not come back, got "
                    f"{ratio} after {before}."
                )
        self.every = scalars.integer("every", every, least=1)
        self._model = model
        self._options = pruning_options(
            scope=scope, min_kept=min_kept, skip=skip, include=include, importance=importance
        )
        self._check_minimum()
        self._formerly_zero: set[str] = set()  # layers that were all zero at a pruning
        self.steps = 0
        self.masks: Masks = self._prune(self.ratios[0])

    @property
    def ratio(self) -> float:
        """The share that is currently removed."""
        return self.ratios[min(self.steps // self.every, len(self.ratios) - 1)]

    @property
    def finished(self) -> bool:
        """Whether the last ratio has been reached."""
        return self.steps >= self.every * (len(self.ratios) - 1)

    def step(self) -> bool:
        """Set removed weights to zero, and prune to the next ratio if a pruning is due.

        Returns:
            Whether the model was pruned.

        Raises:
            RuntimeError: If the call is captured in a CUDA graph, or a held optimizer counts the
                steps already.
        """
        if is_counting(self):
            raise RuntimeError(
                "`step` must not be called while the schedule is held, since each step of the "
                "held optimizer is counted already. Leave out either `hold` or this call."
            )
        return self._advance()

    def _advance(self) -> bool:
        """Count a step, and prune if a pruning is due."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "`step` must not be captured in a CUDA graph, since it counts its calls: call it "
                "after each replay."
            )
        self.masks.zero()
        steps = self.steps + 1
        due = steps % self.every == 0 and steps // self.every < len(self.ratios)
        if due:
            self.masks.apply()  # so that the next pruning knows what this one removed
            with uncovered_warning_silenced():  # given by the first pruning
                self.masks = self._prune(self.ratios[steps // self.every])
        self.steps = steps  # only now, so that a pruning that failed is still due
        return due

    def hold(self, optimizer: Optimizer) -> RemovableHandle:
        """Hold the masks as `Masks.hold` does, and call `step` after each step of an optimizer.

        If several optimizers train the model, hold each of them. The steps of the one that was
        held last are counted, so that one iteration counts once.

        Args:
            optimizer: The optimizer that trains the model, or a part of it.

        Returns:
            A handle. The hold ends with `handle.remove()` or at the end of a `with handle` block.
            Both raise a `RuntimeError` if removed weights are not zero then, or if the model was
            trained but no step was counted.

        Raises:
            TypeError: If `optimizer` is not a torch optimizer.
            ValueError: If it trains none of the masked parameters, or these are sharded.
        """
        return Hold(self.masks, self._model, optimizer, self).begin()

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, for `torch.save`.

        Returns:
            The number of steps, the masks, and the settings that they belong to.
        """
        state = {
            "steps": self.steps,
            "masks": self.masks.state_dict(),
            "formerly_zero": sorted(self._formerly_zero),
        }
        return state | self._described_settings()

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
        if (
            lacking := {"steps", "masks", "formerly_zero", *self._described_settings()}
            - state_dict.keys()
        ):
            raise ValueError(
                f"`state_dict` must be the state of a Schedule, but it has no "
                f"{sorted(lacking)[0]!r}."
            )
        for name, own in self._described_settings().items():
            if state_dict[name] != own:
                raise ValueError(
                    f"`state_dict` must be of a schedule with {name}={own}, got "
                    f"{state_dict[name]}. Create the Schedule with the settings that were saved."
                )
        steps = scalars.integer('state_dict["steps"]', state_dict["steps"], least=0)
        formerly_zero = names_of('state_dict["formerly_zero"]', state_dict["formerly_zero"])
        check_mapping('state_dict["masks"]', state_dict["masks"])
        own = own_names((*formerly_zero, *state_dict["masks"]), self.masks.keys())
        self._check_order({own[name]: mask for name, mask in state_dict["masks"].items()})
        self.masks.load_state_dict(state_dict["masks"])
        self.steps = steps
        self._formerly_zero = {own[name] for name in formerly_zero}

    def _check_order(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse a model whose pruned layers were taken for layers that are initialized at zero."""
        if not self.ratios[0] or self._options.scope not in ("global", "lamp"):
            return
        emptied = [n for n in sorted(self._formerly_zero & saved.keys()) if not torch.any(saved[n])]
        if emptied:
            raise ValueError(
                f"`state_dict` removes all of `{emptied[0]}`, which was all zero when this "
                f"Schedule was created. The model already had its saved weights, so the first "
                f"pruning took the layer for one that is initialized at zero and removed other "
                f"weights instead. Create the Schedule first, then load the model's weights, then "
                f"this state."
            )

    def _described_settings(self) -> dict[str, Any]:
        """The settings that a state belongs to, as plain types."""
        options = self._options
        return {
            "ratios": list(self.ratios),
            "every": self.every,
            "scope": options.scope,
            "min_kept": options.min_kept,
            "skip": sorted(options.skip),
            "include": sorted(options.include),
            "importance": importance_name(options.importance),
        }

    def _check_minimum(self) -> None:
        """Refuse now what the last pruning would refuse."""
        options = self._options
        if options.min_kept:
            weights = prunable(self._model, options.skip, options.include)
            earlier = earlier_masks.masks_of(self._model, weights)
            check_minimum(weights, earlier, self.ratios[-1], options.min_kept)

    def _prune(self, ratio: float) -> Masks:
        masks, zero_layers = prune_to_ratio(self._model, ratio, self._options, self._formerly_zero)
        self._formerly_zero |= zero_layers
        return masks


def rewind(model: nn.Module, masks: Masks, state_dict: Mapping[str, Tensor]) -> None:
    """Load other weights under the same masks.

    Weights from an early step of the training that led to the masks give rewinding, and those from
    its start give the lottery ticket. Weights of a new initialization are the random control, which
    shows the value of the masks without the weights.

    References:
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020,
        https://arxiv.org/abs/1912.05671.

    Args:
        model: The model that gets the weights: the pruned one, or another of the same
            architecture, such as a new one or a copy.
        masks: The masks of such a model.
        state_dict: The other weights, of the whole model.

    Raises:
        TypeError: If `masks` is not a `Masks`, or `state_dict` not a dict.
        ValueError: If names or shapes are not the model's, a masked parameter is missing, or the
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
        raise TypeError(
            f"`masks` must be a drophot.Masks, got {type(masks).__name__}. Masks.from_zeros(model) "
            f"makes one from the zeros of a model."
        )
    check_mapping("state_dict", state_dict)
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state_dict.keys())
    wrong += [name for name in own if name in state_dict and not _match(own, state_dict, name)]
    if wrong:
        raise ValueError(
            f"`state_dict` must hold the weights of this model, but names or shapes differ in "
            f"{wrong}."
        )
    for name, tensor in own.items():  # extra state may be anything
        other = state_dict[name]
        both = isinstance(tensor, Tensor) and isinstance(other, Tensor) and tensor.numel()
        if both and tensor.data_ptr() == other.data_ptr():
            raise ValueError(
                f"`state_dict` must be a copy, but its `{name}` is the model's own tensor, which "
                f"changes during training. Keep copy.deepcopy(model.state_dict()) instead."
            )
    current(model, masks)
    model.load_state_dict(state_dict)
    masks.apply(model)


def _match(own: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Whether two entries are tensors of one shape, or a module's extra state."""
    one, two = own[name], other[name]
    if isinstance(one, Tensor) != isinstance(two, Tensor):
        return name.endswith("_extra_state")
    return not isinstance(one, Tensor) or name.endswith("_extra_state") or one.shape == two.shape
