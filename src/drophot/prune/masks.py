"""The masks of a pruned model, which keep removed weights at zero."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from drophot._core.user_warnings import warn
from drophot.prune import earlier_masks
from drophot.prune.current_parameters import current, own_names
from drophot.prune.holding import Hold
from drophot.prune.masked_products import BitMasks
from drophot.prune.prunable_weights import (
    check_changeable,
    check_mapping,
    check_module,
    names_of,
    prunable,
)
from drophot.prune.unheld_masks import shortened
from drophot.prune.unpruned_weights import warn_of_uncovered


class Masks(Mapping[str, Tensor]):
    """The masks of a pruned model: a bool tensor per parameter, `True` where a weight is kept.

    `magnitude_prune` returns them, and `Masks.from_zeros` makes them from a model that is already
    sparse. They are a mapping from parameter name to mask, in the model's order. Apart from the
    zeros, the model does not change: there are no buffers and no renamed keys. Masks belong to the
    model, not to the parameters that it had when it was pruned: names are looked up each time.

    Example:
        >>> from drophot import magnitude_prune
        >>> model = nn.Linear(8, 8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> masks = magnitude_prune(model, 0.75)
        >>> with masks.hold(optimizer):
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        >>> int((model.weight != 0).sum())
        16
        >>> masks
        Masks(1 tensor, 48 of 64 weights removed, sparsity 0.7500)
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._model: nn.Module | None = model
        self._unexplained_zeros: list[str] = []  # all-zero layers that no known pruning emptied
        self._masks = {name: _usable(mask) for name, mask in masks.items()}
        self._bit_masks = BitMasks()

    def __deepcopy__(self, memo: dict[int, Any]) -> Masks:
        """Copy the masks for a copy of the model; the copy is not held."""
        memo[id(self)] = twin = Masks.__new__(Masks)
        try:
            model = copy.deepcopy(self._model, memo)
        except (RuntimeError, TypeError):  # the model cannot be copied
            model = None
        twin.__setstate__((model, {name: mask.clone() for name, mask in self._masks.items()}))
        return twin

    def __getstate__(self) -> tuple[nn.Module | None, dict[str, Tensor]]:
        """Include the model, if it can be pickled."""
        return self._model if _can_be_pickled(self._model) else None, self._masks

    def __setstate__(self, state: tuple[nn.Module | None, dict[str, Tensor]]) -> None:
        """Restore masks, which are not held."""
        self._model, self._masks = state
        self._unexplained_zeros = []
        self._bit_masks = BitMasks()

    @classmethod
    def from_zeros(
        cls, model: nn.Module, *, skip: Iterable[str] = (), include: Iterable[str] = ()
    ) -> Masks:
        """Make the masks of a model that is already pruned: every zero is a removed weight.

        A layer in which every weight is zero is removed as well. If the layer is initialized at
        zero, such as LoRA's B or a new head, name it in `skip`, since it cannot be trained under
        these masks. `hold` warns about such a layer unless an earlier pruning of the model emptied
        it, or `apply` was called before, which confirms that its zeros were pruned.

        Args:
            model: Any module; a dense one gives masks that keep everything.
            skip: Names of modules or parameters to leave out, as in `magnitude_prune`.
            include: Names of further modules or parameters, as in `magnitude_prune`.

        Returns:
            The masks.

        Example:
            >>> from drophot import magnitude_prune
            >>> masks = magnitude_prune(model := nn.Linear(8, 8), 0.5)
            >>> Masks.from_zeros(model).sparsity
            0.5
        """
        skip = names_of("skip", skip)
        weights = prunable(model, skip, include)
        warn_of_uncovered(model, weights, skip)
        masks = cls(model, {name: weight.detach() != 0 for name, weight in weights.items()})
        masks._unexplained_zeros = _empty_layers(model, weights)
        return masks

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same names and keep the same weights."""
        if not isinstance(other, Mapping) or self.keys() != other.keys():
            return False
        return all(
            isinstance(other[name], Tensor) and torch.equal(mask, other[name].to(mask.device))
            for name, mask in self._masks.items()
        )

    @property
    def sparsity(self) -> float:
        """The share of the weights of the masked parameters that is removed, in [0, 1]."""
        removed, total = self._count()
        return removed / total

    def apply(self, model: nn.Module | None = None) -> None:
        """Set the removed weights to zero, once, in the current parameters of the model.

        Args:
            model: A model of the same architecture, such as a new one, a copy or an average of the
                weights, wrapped (DistributedDataParallel, AveragedModel, `torch.compile`) or not.
                `None` is the model that was pruned.

        Raises:
            ValueError: If a masked parameter is missing in the model, sharded over processes, of
                another shape, or an expanded or negated view. The model is unchanged then.
        """
        model = self._model_or_pruned(model)
        weights = current(model, self._masks)
        for name, weight in weights.items():
            check_changeable(name, weight)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(~self._masks[name].to(weight.device), 0)
        earlier_masks.remember(model, self._masks)  # so that pruning again keeps them
        self._unexplained_zeros = []

    def hold(self, optimizer: Optimizer, model: nn.Module | None = None) -> RemovableHandle:
        """Train the sparse network: keep the removed weights at zero while an optimizer trains.

        Gradients of removed weights are zero as soon as they are computed. Clipping, a check for
        infinite gradients, and optimizers that mix coordinates (LBFGS, Muon, Adafactor, SAM, LAMB)
        therefore do what they do on the sparse network. The optimizer's state of removed weights
        is set to zero, at once and when it loads a state. After each step the weights are set to
        zero again, so that they are exactly zero even if the step overflowed. While held, a copy of
        the masks of the weights' size makes each of these a fused multiplication.

        An optimizer holds the weights that it trains, including those of groups that are added
        later. If several optimizers train one model, hold each of them; a warning gives the number
        of removed weights that are trained but not held, at the first step and at each step before
        which the trained parameters have changed. If the optimizer is wrapped (accelerate,
        Lightning, SAM, Lookahead), the optimizers inside the wrapper are held. A copy of the
        optimizer together with its model, by `copy.deepcopy` or `pickle`, is held as well.

        Args:
            optimizer: The optimizer that trains the model, or a part of it.
            model: Another model of the same architecture, as in `apply`. `None` is the model that
                was pruned.

        Returns:
            A handle. The hold ends with `handle.remove()` or at the end of a `with handle` block.
            Both raise a `RuntimeError` if removed weights are not zero then, because something
            other than a step of the optimizer changed them.

        Raises:
            TypeError: If `optimizer` is not a torch optimizer.
            ValueError: If it trains none of the masked parameters, or the model no longer has
                them, or they are sharded over processes.
        """
        hold = Hold(self, self._model_or_pruned(model), optimizer)
        empty = [n for n in self._unexplained_zeros if n in hold.names and not self[n].any()]
        if empty:
            warn(
                f"`hold` keeps all weights of {shortened(empty)} at zero, so they cannot be "
                f"trained. They were zero when Masks.from_zeros made these masks, and no known "
                f"pruning has removed them. If they are initialized at zero, as LoRA's B and new "
                f"heads are, name them in its `skip`. If they were pruned, call masks.apply() "
                f"before masks.hold(optimizer)."
            )
        self.apply(model)
        return hold.begin()

    def check(self, optimizer: Optimizer) -> list[str]:
        """Check that an optimizer trains what was pruned.

        Args:
            optimizer: The optimizer.

        Returns:
            The names of the pruned parameters that it trains.

        Raises:
            TypeError: If `optimizer` is not a torch optimizer.
            ValueError: If it trains none of the masked parameters.
        """
        return Hold(self, self._model_or_pruned(None), optimizer).names

    def zero(self, names: Sequence[str] | None = None) -> None:
        """Set the removed weights to zero by one fused multiplication.

        Use it in a loop that calls it after each step, with an optimizer that treats weights
        independently; `hold` masks gradients and momentum as well. A copy of the masks of the
        weights' size is kept; `apply` does the same once, without the copy.

        Args:
            names: The names of the parameters; `None` means all.
        """
        masks = self._masks if names is None else {name: self._masks[name] for name in names}
        self._bit_masks.zero_(current(self._model_or_pruned(None), masks), masks)

    def _model_or_pruned(self, model: nn.Module | None) -> nn.Module:
        model = self._model if model is None else model
        if model is None:
            raise ValueError(
                "`model` must be given, since these masks are a copy that was made without the "
                "pruned model, which could not be copied."
            )
        check_module("model", model)
        return model

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, by parameter name, for `torch.save`.

        Returns:
            Copies of the bool tensors.
        """
        return {name: mask.clone() for name, mask in self._masks.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load saved masks and set the weights that they remove to zero.

        Args:
            state_dict: The state of masks for the same architecture, wrapped or not, as in `apply`.

        Raises:
            TypeError: If it is not a dict, or holds anything but tensors.
            ValueError: If names, shapes or dtypes are not this model's, or the model no longer has
                these parameters. Nothing is changed then.
        """
        check_mapping("state_dict", state_dict)
        names = own_names(state_dict.keys(), self._masks.keys())
        if len(set(names.values())) == len(state_dict):
            state_dict = {names[name]: mask for name, mask in state_dict.items()}
        if state_dict.keys() != self._masks.keys():
            different = sorted(state_dict.keys() ^ self._masks.keys())
            raise ValueError(
                f"`state_dict` must have the masks {sorted(self._masks)}, but the names differ in "
                f"{different}. It belongs to another model."
            )
        for name, mask in state_dict.items():
            own = self._masks[name]
            if not isinstance(mask, Tensor):
                raise TypeError(
                    f'`state_dict["{name}"]` must be a bool tensor, got '
                    f"{type(mask).__name__}. Convert it with torch.as_tensor."
                )
            if mask.dtype != torch.bool or mask.shape != own.shape:
                raise ValueError(
                    f'`state_dict["{name}"]` must be a bool tensor of shape {tuple(own.shape)}, '
                    f"got {mask.dtype} of shape {tuple(mask.shape)}. Convert it with .bool(), or "
                    f"load masks of this model."
                )
        if self._model is not None:
            current(self._model, self._masks)
        for name, mask in state_dict.items():
            self._masks[name] = _usable(mask.to(self._masks[name].device, copy=True))
        if self._model is not None:
            self.apply()

    def __repr__(self) -> str:
        removed, total = self._count()
        plural = "tensor" if len(self) == 1 else "tensors"
        return (
            f"Masks({len(self)} {plural}, {removed:,} of {total:,} weights removed, "
            f"sparsity {self.sparsity:.4f})"
        )

    def _count(self) -> tuple[int, int]:
        total = sum(mask.numel() for mask in self._masks.values())
        return total - sum(int(mask.count_nonzero()) for mask in self._masks.values()), total


def _empty_layers(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> list[str]:
    """The trainable layers that are all zero, and that no known pruning has emptied."""
    zero = {n: w for n, w in weights.items() if w.requires_grad and not w.detach().any()}
    earlier = earlier_masks.masks_of(model, zero)
    return [name for name in zero if name not in earlier or bool(earlier[name].any())]


def _usable(mask: Tensor) -> Tensor:
    """A mask that can be used in training, even if it was made in inference mode."""
    if not mask.is_inference():
        return mask
    with torch.inference_mode(False):
        return mask.clone()


def _can_be_pickled(model: nn.Module | None) -> bool:
    """Whether a model can be pickled, tried without copying its tensors."""
    try:
        _PicklerWithoutTensors(_NullFile()).dump(model)
    except (AttributeError, TypeError, RuntimeError, pickle.PicklingError):
        return False
    return True


class _PicklerWithoutTensors(pickle.Pickler):
    def persistent_id(self, obj: object) -> str | None:
        return "left out" if isinstance(obj, Tensor | Masks) else None


class _NullFile:
    def write(self, data: object) -> None:
        pass
