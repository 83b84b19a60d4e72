"""Multiplication by masks in integers, since zero times infinity or NaN is not zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Factors:
    """Masks as integers of the size of what they multiply, kept until a mask changes."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, Tensor, int]] = {}  # factor, mask, its version

    def of(self, name: str, mask: Tensor, like: Tensor) -> Tensor:
        """A mask as integers that multiply the bits `like`.

        Args:
            name: Whose mask it is.
            mask: True where a weight is kept. It may change in place.
            like: Integers, on any device.

        Returns:
            Ones where the mask is true, in the device and the dtype of `like`.
        """
        known = self._known.get(name)
        fits = known is not None and known[0].device == like.device and known[0].dtype == like.dtype
        if torch.compiler.is_compiling():  # which has no versions
            return known[0] if known is not None and fits else torch.empty_like(like).copy_(mask)
        if known is None or not fits or known[1] is not mask or known[2] != mask._version:
            known = torch.empty_like(like).copy_(mask), mask, mask._version
            self._known[name] = known
        return known[0]

    def zero(self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Set what masks remove to zero, by one fused multiplication.

        Args:
            tensors: Plain float tensors, by name.
            masks: At least theirs.
        """
        pairs = []
        for name, tensor in tensors.items():
            bits = tensor.detach().view(_BITS[tensor.element_size()])
            pairs.append((bits, self.of(name, masks[name], bits)))
        if pairs:
            bits, factors = ([pair[side] for pair in pairs] for side in (0, 1))
            torch._foreach_mul_(bits, factors)  # pyright: ignore[reportPrivateImportUsage]

    def masked(self, name: str, mask: Tensor, gradient: Tensor) -> Tensor:
        """A gradient without what a mask removes, which is left as it is.

        Args:
            name: Whose mask it is.
            mask: True where a weight is kept.
            gradient: Dense or sparse, to be differentiated or not.

        Returns:
            A new tensor.
        """
        if gradient.layout != torch.strided:
            gradient = gradient.coalesce().clone()
            removed = ~mask.to(gradient.device)[tuple(gradient.indices())]
            gradient.values().masked_fill_(removed, 0)
            return gradient
        if gradient.requires_grad or torch.compiler.is_compiling():
            return torch.where(mask.to(gradient.device), gradient, 0)
        bits = gradient.view(_BITS[gradient.element_size()])
        return (bits * self.of(name, mask, bits)).view(gradient.dtype)


def stamp_of(gradient: Tensor) -> tuple[int, int] | None:
    """What changes with a gradient's values; `None` is unknown."""
    if gradient.layout != torch.strided or gradient.is_inference():
        return None
    return gradient.data_ptr(), gradient._version


def can_be_changed(gradient: Tensor) -> bool:
    """Whether a gradient may change in place: it has its memory, and no graph needs its values."""
    if gradient.layout != torch.strided or gradient.requires_grad or gradient.is_inference():
        return False
    layout = zip(gradient.stride(), gradient.shape, strict=True)
    return not any(step == 0 and size > 1 for step, size in layout)
