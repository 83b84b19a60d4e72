"""Masks that hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from drophot import _older
from drophot._uncovered import warn_of_uncovered
from drophot._weights import names_of, prunable

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Masks(Mapping[str, Tensor]):
    """What pruning kept: a bool tensor for each pruned parameter, `True` where a weight is kept.

    Made by `magnitude_prune`, or by `Masks.from_zeros` from a model that holds its zeros already.
    A mapping from parameter name to mask, in the model's order. The model itself is not touched
    beyond its zeros: no hooks, no buffers, no renamed keys.

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

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)
        self._masks = {name: _usable(mask) for name, mask in masks.items()}
        self._pairs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        # What is held, by which hooks, and whether a step has shown what is not.
        self._held: list[tuple[RemovableHandle, list[str]]] = []
        self._compared = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy is held by nobody."""
        return self.__dict__ | {"_pairs": {}, "_held": []}

    @classmethod
    def from_zeros(
        cls, model: nn.Module, *, skip: Iterable[str] = (), include: Iterable[str] = ()
    ) -> Masks:
        """The masks of a model that is pruned already: what is zero is removed.

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
        return cls(weights, {name: weight.detach() != 0 for name, weight in weights.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def sparsity(self) -> float:
        """The share of the masked parameters' weights that the masks remove, in [0, 1]."""
        removed, total = self._count()
        return removed / total

    def apply(self) -> None:
        """Set the removed weights to zero, now."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.masked_fill_(~self._masks[name].to(weight.device), 0)
        _older.remember(self._weights, self._masks)  # pruning again keeps them

    def hold(self, optimizer: Optimizer) -> RemovableHandle:
        """Keep the removed weights at zero through every step of an optimiser.

        After each step they are set to zero again, so that neither gradients nor momentum nor
        weight decay, nor state from dense training, bring them back, and no step that overflows
        makes them anything else. While held, a copy of the masks of the weights' size makes that
        one fused multiplication.

        An optimiser holds the weights that it trains, those of groups that are added later too.
        Where several train one model, hold each of them; if at the first step, or at one before
        which that changed, some of the weights that are trained are held by none, a warning says
        how many.

        Args:
            optimizer: The optimiser that trains the model, or a part of it.

        Returns:
            A handle: `handle.remove()` lifts the masks, and so does leaving `with handle:`.

        Raises:
            TypeError: If `optimizer` is not a torch optimiser.
            ValueError: If it trains none of the masked parameters.
        """
        names = self.check(optimizer)
        self.apply()
        before = self._trained(optimizer)

        def after_step(*_: Any) -> None:
            nonlocal before
            looks = not torch.compiler.is_compiling()
            if looks and (now := self._trained(optimizer)) != before:  # a group joined, say
                names[:], before = self._names(optimizer), now
                self._compared = False
            self.zero(names)
            if looks and not self._compared:
                self._compare()

        handle = optimizer.register_step_post_hook(after_step)
        self._held.append((handle, names))
        self._compared = False
        return handle

    def _trained(self, optimizer: Optimizer) -> list[Any]:
        """What differs when an optimiser takes up more weights, or others are trained."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        return [*sizes, *(weight.requires_grad for weight in self._weights.values())]

    def _names(self, optimizer: Optimizer) -> list[str]:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, weight in self._weights.items() if id(weight) in trained]

    def _compare(self) -> None:
        """Say once what is trained and held by no optimiser."""
        self._compared = True
        self._held = [(h, names) for h, names in self._held if h.id in (h.hooks_dict_ref() or ())]
        held = {name for _, names in self._held for name in names}
        loose = [
            name
            for name, weight in self._weights.items()
            if name not in held and weight.requires_grad and not self._masks[name].all()
        ]
        if loose:
            removed = sum(int((~self._masks[name]).sum()) for name in loose)
            shown = ", ".join(f"`{name}`" for name in loose[:3]) + ", …" * (len(loose) > 3)
            warnings.warn(
                f"`hold` keeps the weights that its optimizer trains. Found {removed:,} of "
                f"{self._count()[0]:,} removed weights in none that is held ({shown}): they can "
                f"grow back. Call masks.hold(optimizer) for each optimizer that trains them; if "
                f"none does, requires_grad_(False) says so.",
                stacklevel=2,
            )

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
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"`optimizer` should be a torch.optim.Optimizer. Found {type(optimizer).__name__}."
            )
        names = self._names(optimizer)
        if not names:
            raise ValueError(
                "`optimizer` should train the model that was pruned. Found none of its pruned "
                "weights in it. If it trains a copy of that model, or one that was loaded anew, "
                "hold Masks.from_zeros(copy); else prune the model whose parameters it was given."
            )
        return names

    def zero(self, names: Sequence[str] | None = None) -> None:
        """Set the removed weights to zero, by one fused multiplication of their bits.

        What `hold` calls after each step, for loops that would rather call it themselves. It keeps
        a copy of the masks of the weights' size; `apply` does the same once, without.

        Args:
            names: Of these parameters; `None` is all of them.
        """
        names = list(self._weights) if names is None else names
        looks = not torch.compiler.is_compiling()  # which has no addresses
        pairs = [self._pair(name, looks) for name in names]
        weights, factors = ([pair[side] for pair in pairs] for side in (0, 1))
        torch._foreach_mul_(weights, factors)  # pyright: ignore[reportPrivateImportUsage]

    def _pair(self, name: str, looks: bool) -> tuple[Tensor, Tensor]:
        """A weight's bits and its mask, as integers: zero times infinity or NaN is not zero."""
        weight, mask, known = self._weights[name], self._masks[name], self._pairs.get(name)
        if known is not None and known[2] is not mask:  # loaded anew
            known = None
        if looks and known is not None and _same_memory(known[0], weight):
            return known[:2]
        bits = weight.detach().view(_BITS[weight.element_size()])
        if known is not None and _alike(known[1], bits):
            factor = known[1]
        else:
            factor, looks = torch.empty_like(bits).copy_(mask), True
        if looks:
            self._pairs[name] = bits, factor, mask
        return bits, factor

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, by parameter name, for `torch.save`.

        Returns:
            Copies of the bool tensors.
        """
        return {name: mask.clone() for name, mask in self._masks.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over saved masks and set the weights that they remove to zero.

        Args:
            state_dict: What `state_dict` gave for the same architecture.

        Raises:
            ValueError: If names, shapes or dtypes are not this model's. Nothing is changed then.
        """
        if state_dict.keys() != self._masks.keys():
            strange = sorted(state_dict.keys() ^ self._masks.keys())
            raise ValueError(
                f"`state_dict` should hold masks for {sorted(self._masks)}. Found a difference "
                f"in {strange}; it belongs to another model."
            )
        for name, mask in state_dict.items():
            mine = self._masks[name]
            if mask.dtype != torch.bool or mask.shape != mine.shape:
                raise ValueError(
                    f'`state_dict["{name}"]` should be a bool tensor of shape '
                    f"{tuple(mine.shape)}. Found {mask.dtype}, {tuple(mask.shape)}."
                )
        for name, mask in state_dict.items():
            self._masks[name] = _usable(mask.to(self._masks[name].device, copy=True))
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
        return total - sum(int(mask.sum()) for mask in self._masks.values()), total


def _usable(mask: Tensor) -> Tensor:
    """A mask that training can use, wherever it was made."""
    if not mask.is_inference():
        return mask
    with torch.inference_mode(False):
        return mask.clone()


def _same_memory(bits: Tensor, weight: Tensor) -> bool:
    """Whether a weight is where it was: nothing else can be, while its memory is kept."""
    return bits.data_ptr() == weight.data_ptr() and bits.stride() == weight.stride()


def _alike(factor: Tensor, bits: Tensor) -> bool:
    return factor.device == bits.device and factor.dtype == bits.dtype
