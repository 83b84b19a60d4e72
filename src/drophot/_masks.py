"""Masks that hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from drophot._weights import prunable


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
        self._masks = dict(masks)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_zeros(cls, model: nn.Module, *, skip: Collection[str] = ()) -> Masks:
        """The masks of a model that is pruned already: what is zero is removed.

        Args:
            model: Any module; a dense one gives masks that keep everything.
            skip: Names of modules or parameters to leave out, as in `magnitude_prune`.

        Returns:
            The masks.

        Example:
            >>> from drophot import magnitude_prune
            >>> masks = magnitude_prune(model := nn.Linear(8, 8), 0.5)
            >>> Masks.from_zeros(model).sparsity
            0.5
        """
        weights = prunable(model, skip)
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

    def hold(self, optimizer: Optimizer) -> RemovableHandle:
        """Keep the removed weights at zero through every step of an optimiser.

        After each step they are set to zero again, so that neither gradients nor momentum nor
        weight decay, nor state from dense training, bring them back. While held, a copy of the
        masks in the weights' dtype makes that one fused multiplication.

        Args:
            optimizer: The optimiser that trains the model.

        Returns:
            A handle: `handle.remove()` lifts the masks, and so does leaving `with handle:`.

        Raises:
            TypeError: If `optimizer` is not a torch optimiser.
            ValueError: If it trains none of the masked parameters.
        """
        names = self.check(optimizer)
        self.apply()
        return optimizer.register_step_post_hook(lambda *_: self.zero(names))

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
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [name for name, weight in self._weights.items() if id(weight) in trained]
        if not names:
            raise ValueError(
                "`optimizer` should train the model that was pruned. Found none of its pruned "
                "weights in it; prune the model whose parameters the optimiser was given, not a "
                "copy."
            )
        return names

    def zero(self, names: Sequence[str] | None = None) -> None:
        """Set the removed weights to zero, by one fused multiplication.

        What `hold` calls after each step, for loops that would rather call it themselves. It keeps
        a copy of the masks in the weights' dtype; `apply` does the same once, without.

        Args:
            names: Of these parameters; `None` is all of them.
        """
        names = list(self._weights) if names is None else names
        weights: list[Tensor] = [self._weights[name] for name in names]
        for name, weight in zip(names, weights, strict=True):
            mask, factor = self._masks[name], self._factors.get(name)
            # Loaded anew, or the model has moved, or become another dtype.
            if factor is None or factor[0] is not mask or not _alike(factor[1], weight):
                self._factors[name] = mask, torch.empty_like(weight).copy_(mask)
        factors = [self._factors[name][1] for name in names]
        with torch.no_grad():
            torch._foreach_mul_(weights, factors)  # pyright: ignore[reportPrivateImportUsage]

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
            self._masks[name] = mask.to(self._masks[name].device, copy=True)
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


def _alike(factor: Tensor, weight: Tensor) -> bool:
    return factor.device == weight.device and factor.dtype == weight.dtype
