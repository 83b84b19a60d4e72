"""Multiply by masks in integers, since zero times infinity or NaN is not zero in floats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class BitMasks:
    """Masks as integers of the size of what they multiply, cached until a mask changes."""

    def __init__(self) -> None:
        self._cache: dict[str, tuple[Tensor, Tensor, int]] = {}  # integers, mask, its version

    def of(self, name: str, mask: Tensor, like: Tensor) -> Tensor:
        """A mask as ones and zeros in the device and the dtype of the integers `like`."""
        cached = self._cache.get(name)
        fits = (
            cached is not None and cached[0].device == like.device and cached[0].dtype == like.dtype
        )
        if torch.compiler.is_compiling():  # which has no versions
            return cached[0] if cached is not None and fits else torch.empty_like(like).copy_(mask)
        if cached is None or not fits or cached[1] is not mask or cached[2] != mask._version:
            cached = torch.empty_like(like).copy_(mask), mask, mask._version
            self._cache[name] = cached
        return cached[0]

    def zero_(self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Set the removed elements of plain float tensors to zero.

        This takes one fused multiplication per device and size of an element.
        """
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in tensors.items():
            plain = tensor.detach() if tensor.requires_grad else tensor
            bits = plain.view(_BITS[tensor.element_size()])
            group = groups.setdefault((bits.device, bits.dtype), ([], []))
            group[0].append(bits)
            group[1].append(self.of(name, masks[name], bits))
        for bits, ones in groups.values():
            torch._foreach_mul_(bits, ones)  # pyright: ignore[reportPrivateImportUsage]

    def masked(self, name: str, mask: Tensor, gradient: Tensor) -> Tensor:
        """A masked copy of a gradient, which may be sparse or be differentiated."""
        if gradient.layout != torch.strided:
            gradient = gradient.coalesce().clone()
            removed = ~mask.to(gradient.device)[tuple(gradient.indices())]
            gradient.values().masked_fill_(removed, 0)
            return gradient
        if gradient.requires_grad or torch.compiler.is_compiling():
            return torch.where(mask.to(gradient.device), gradient, 0)
        bits = gradient.view(_BITS[gradient.element_size()])
        return (bits * self.of(name, mask, bits)).view(gradient.dtype)


def version_of(gradient: Tensor) -> tuple[int, int] | None:
    """A value that changes when the gradient's values do, or `None` if there is none."""
    if gradient.layout != torch.strided or gradient.is_inference():
        return None
    return gradient.data_ptr(), gradient._version


def can_be_changed(gradient: Tensor) -> bool:
    """Whether a gradient can change in place: it is not expanded, and no graph needs its values."""
    if gradient.layout != torch.strided or gradient.requires_grad or gradient.is_inference():
        return False
    if gradient.is_contiguous():
        return True
    layout = zip(gradient.stride(), gradient.shape, strict=True)
    return not any(step == 0 and size > 1 for step, size in layout)
