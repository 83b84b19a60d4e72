"""Masks that hold."""

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
from drophot.prune.masked_products import Factors
from drophot.prune.prunable_weights import (
    check_changeable,
    check_mapping,
    check_module,
    names_of,
    prunable,
)
from drophot.prune.unpruned_weights import warn_of_uncovered


class Masks(Mapping[str, Tensor]):
    """What pruning kept: a bool tensor for each pruned parameter, `True` where a weight is kept.

    Made by `magnitude_prune`, or by `Masks.from_zeros` from a model that holds its zeros already.
    A mapping from parameter name to mask, in the model's order. The model itself is not touched
    beyond its zeros: no buffers, no renamed keys. The masks belong to the model, not to the
    parameters that it had when it was pruned: names are looked up each time.

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
        self._doubtful: list[str] = []  # all zero, and perhaps not because of a pruning
        self._masks = {name: _usable(mask) for name, mask in masks.items()}
        self._factors = Factors()

    def __deepcopy__(self, memo: dict[int, Any]) -> Masks:
        """A copy is of the model's copy, if both are copied in one call, and held by nobody."""
        memo[id(self)] = twin = Masks.__new__(Masks)
        try:
            model = copy.deepcopy(self._model, memo)
        except (RuntimeError, TypeError):  # a model that cannot be copied, alone or with its masks
            model = None
        twin.__setstate__((model, {name: mask.clone() for name, mask in self._masks.items()}))
        return twin

    def __getstate__(self) -> tuple[nn.Module | None, dict[str, Tensor]]:
        """In a file the model goes with its masks, if it can be pickled."""
        return self._model if _can_be_pickled(self._model) else None, self._masks

    def __setstate__(self, state: tuple[nn.Module | None, dict[str, Tensor]]) -> None:
        """Held by nobody."""
        self._model, self._masks = state
        self._doubtful = []
        self._factors = Factors()

    @classmethod
    def from_zeros(
        cls, model: nn.Module, *, skip: Iterable[str] = (), include: Iterable[str] = ()
    ) -> Masks:
        """The masks of a model that is pruned already: what is zero is removed.

        A layer in which every weight is zero is removed as well. If it is one that starts at zero,
        such as LoRA's B or a new head, name it in `skip`, since it cannot be trained under these
        masks. Where no earlier pruning of the model emptied it, `hold` warns about it, unless
        `apply` was called before, which says that these zeros were pruned.

        Args:
            model: Any module; a dense one gives masks that keep everything.
            skip: Names of modules or parameters to leave out, as in `magnitude_prune`.
            include: Names of further ones to take in, as in `magnitude_prune`.

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
        masks._doubtful = _blank(model, weights)
        return masks

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Whether the same weights are kept, of parameters of the same names."""
        if not isinstance(other, Mapping) or self.keys() != other.keys():
            return False
        return all(
            isinstance(other[name], Tensor) and torch.equal(mask, other[name].to(mask.device))
            for name, mask in self._masks.items()
        )

    @property
    def sparsity(self) -> float:
        """The share of the masked parameters' weights that the masks remove, in [0, 1]."""
        removed, total = self._count()
        return removed / total

    def apply(self, model: nn.Module | None = None) -> None:
        """Set the removed weights to zero, now, in the parameters that the model has now.

        Args:
            model: A model of the same architecture, such as a new one, a copy or an average of the
                weights, wrapped (DistributedDataParallel, AveragedModel, `torch.compile`) or not.
                `None` is the model that was pruned.

        Raises:
            ValueError: If a masked parameter is missing in it, sharded over processes or of another
                shape. The model is untouched then.
        """
        model = self._known(model)
        weights = current(model, self._masks)
        for name, weight in weights.items():
            check_changeable(name, weight)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(~self._masks[name].to(weight.device), 0)
        earlier_masks.remember(model, self._masks)  # pruning again keeps them
        self._doubtful = []

    def hold(self, optimizer: Optimizer, model: nn.Module | None = None) -> RemovableHandle:
        """Train the sparse network: keep the removed weights at zero while an optimiser trains.

        Gradients of removed weights are zero as soon as they are computed, so that clipping, a
        check for infinite gradients, and optimisers that mix coordinates (LBFGS, Muon, Adafactor,
        SAM, LAMB) do what they do on the sparse network. What the optimiser remembers of removed
        weights becomes zero: at once, and when it loads a state. After each step the weights are
        set to zero again, so that no step that overflows makes them anything else. While held, a
        copy of the masks of the weights' size makes each of these one fused multiplication.

        An optimiser holds the weights that it trains, those of groups that are added later too.
        Where several train one model, hold each of them; if at the first step, or at one before
        which that changed, some of the weights that are trained are held by none, a warning says
        how many. A wrapper around an optimiser (accelerate, Lightning, SAM, Lookahead) holds those
        in it. A copy of the optimiser, by `copy.deepcopy` or `pickle`, together with its model,
        is held as well.

        Args:
            optimizer: The optimiser that trains the model, or a part of it.
            model: Another model of the same architecture, as in `apply`. `None` is the model that
                was pruned.

        Returns:
            A handle: `handle.remove()` lifts the masks, and so does leaving `with handle:`. Both
            raise a `RuntimeError` if removed weights are not zero then, because something other
            than a step of the optimiser changed them.

        Raises:
            TypeError: If `optimizer` is not a torch optimiser.
            ValueError: If it trains none of the masked parameters, or the model no longer has
                them, or they are sharded over processes.
        """
        hold = Hold(self, self._known(model), optimizer)
        frozen = [f"`{n}`" for n in self._doubtful if n in hold.names and not self[n].any()]
        if frozen:
            warn(
                f"`hold` keeps all of {', '.join(frozen[:3])}{', …' * (len(frozen) > 3)} at zero, "
                f"so that these weights cannot be trained. They were zero when Masks.from_zeros "
                f"made these masks, and no earlier pruning is known to have removed them. If they "
                f"start at zero, as LoRA's B and new heads do, name them in its `skip`; if they "
                f"were pruned, call masks.apply() before masks.hold(optimizer)."
            )
        self.apply(model)
        return hold.begin()

    def check(self, optimizer: Optimizer) -> list[str]:
        """Refuse an optimiser that does not train what was pruned.

        Args:
            optimizer: The optimiser.

        Returns:
            The names of the pruned parameters that it trains.

        Raises:
            TypeError: If `optimizer` is not a torch optimiser.
            ValueError: If it trains none of the masked parameters.
        """
        return Hold(self, self._known(None), optimizer).names

    def zero(self, names: Sequence[str] | None = None) -> None:
        """Set the removed weights to zero, by one fused multiplication of their bits.

        For loops that call it after each step themselves, with an optimiser that treats each weight
        alone; `hold` masks gradients and momentum as well. It keeps a copy of the masks of the
        weights' size; `apply` does the same once, without.

        Args:
            names: Of these parameters; `None` is all of them.
        """
        masks = self._masks if names is None else {name: self._masks[name] for name in names}
        self._factors.zero(current(self._known(None), masks), masks)

    def _known(self, model: nn.Module | None) -> nn.Module:
        """The model that was given, or the one that was pruned."""
        model = self._model if model is None else model
        if model is None:
            raise ValueError(
                "`model` must be given. These masks are a copy that was made without the model "
                "that was pruned, which could not be copied."
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
        """Take over saved masks and set the weights that they remove to zero.

        Args:
            state_dict: What `state_dict` gave for the same architecture, wrapped or not, as in
                `apply`.

        Raises:
            TypeError: If it is no dict, or holds anything but tensors.
            ValueError: If names, shapes or dtypes are not this model's, or the model no longer has
                these parameters. Nothing is changed then.
        """
        check_mapping("state_dict", state_dict)
        own = own_names(state_dict.keys(), self._masks.keys())
        if len(set(own.values())) == len(state_dict):
            state_dict = {own[name]: mask for name, mask in state_dict.items()}
        if state_dict.keys() != self._masks.keys():
            strange = sorted(state_dict.keys() ^ self._masks.keys())
            raise ValueError(
                f"`state_dict` should hold masks for {sorted(self._masks)}. Found a difference "
                f"in {strange}; it belongs to another model."
            )
        for name, mask in state_dict.items():
            mine = self._masks[name]
            if not isinstance(mask, Tensor):
                raise TypeError(
                    f'`state_dict["{name}"]` should be a bool tensor. Found a '
                    f"{type(mask).__name__}; convert it by torch.as_tensor."
                )
            if mask.dtype != torch.bool or mask.shape != mine.shape:
                raise ValueError(
                    f'`state_dict["{name}"]` should be a bool tensor of shape '
                    f"{tuple(mine.shape)}. Found {mask.dtype}, {tuple(mask.shape)}."
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


def _blank(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> list[str]:
    """The layers that can be trained, are all zero, and that no known pruning has emptied."""
    zero = {n: w for n, w in weights.items() if w.requires_grad and not w.detach().any()}
    older = earlier_masks.masks_of(model, zero)
    return [name for name in zero if name not in older or bool(older[name].any())]


def _usable(mask: Tensor) -> Tensor:
    """A mask that training can use, wherever it was made."""
    if not mask.is_inference():
        return mask
    with torch.inference_mode(False):
        return mask.clone()


def _can_be_pickled(model: nn.Module | None) -> bool:
    """Whether a model can be pickled, found without copying its tensors."""
    try:
        _Dry(_Nowhere()).dump(model)
    except (AttributeError, TypeError, RuntimeError, pickle.PicklingError):
        return False
    return True


class _Dry(pickle.Pickler):
    def persistent_id(self, obj: object) -> str | None:
        return "left out" if isinstance(obj, Tensor | Masks) else None


class _Nowhere:
    def write(self, data: object) -> None:
        pass
