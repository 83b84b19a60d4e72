"""Multiply by masks in integers, since zero times infinity or NaN is not zero in floats."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_COPIED = 1 << 27  # bytes of gradients that are copied at a time


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
        """Set the removed elements of plain float tensors to zero, by one fused multiplication.

        It is one for each dtype and device, since others would be multiplied one after the other.
        """
        groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in tensors.items():
            bits = tensor.detach().view(_BITS[tensor.element_size()])
            group = groups.setdefault((bits.dtype, bits.device), ([], []))
            group[0].append(bits)
            group[1].append(self.of(name, masks[name], bits))
        for bits, masked in groups.values():
            torch._foreach_mul_(bits, masked)  # pyright: ignore[reportPrivateImportUsage]

    def masked_copies(
        self, gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Masked copies of plain float tensors, by one fused multiplication for each 128 MiB."""
        groups: dict[object, list[str]] = {}
        sizes: Counter[object] = Counter()
        for name, gradient in gradients.items():
            kind = gradient.dtype, gradient.device
            groups.setdefault((kind, sizes[kind] // _MOST_COPIED), []).append(name)
            sizes[kind] += gradient.nbytes
        for names in groups.values():
            bits = [_bits(gradients[n]) for n in names]
            masked = [self.of(n, masks[n], each) for n, each in zip(names, bits, strict=True)]
            found = torch._foreach_mul(bits, masked)  # pyright: ignore[reportPrivateImportUsage]
            for name, each in zip(names, found, strict=True):
                yield name, each.view(gradients[name].dtype)

    def masked(self, name: str, mask: Tensor, gradient: Tensor) -> Tensor:
        """A masked copy of a gradient, which may be sparse or be differentiated."""
        if gradient.layout != torch.strided:
            gradient = gradient.coalesce().clone()
            removed = ~mask.to(gradient.device)[tuple(gradient.indices())]
            gradient.values().masked_fill_(removed, 0)
            return gradient
        if gradient.requires_grad or torch.compiler.is_compiling():
            return torch.where(mask.to(gradient.device), gradient, 0)
        bits = _bits(gradient)
        return (bits * self.of(name, mask, bits)).view(gradient.dtype)


def _bits(gradient: Tensor) -> Tensor:
    """The values of a gradient as integers; torch may have put off negating them."""
    return gradient.resolve_neg().view(_BITS[gradient.element_size()])


class SeenValues:
    """The values that a gradient has now, to tell later whether it has others."""

    def __init__(self, gradient: Tensor) -> None:
        # The gradient of the next pass may have the same address.
        self._gradient = weakref.ref(gradient)
        self._version = _version_of(gradient)

    def are_in(self, gradient: Tensor) -> bool:
        if self._version is None or self._gradient() is not gradient:
            return False
        return self._version == _version_of(gradient)


def _version_of(gradient: Tensor) -> tuple[int, int] | None:
    """A value that changes when the gradient's values do, or `None` if there is none."""
    if gradient.layout != torch.strided or gradient.is_inference():
        return None
    return gradient.data_ptr(), gradient._version


def can_be_changed(gradient: Tensor) -> bool:
    """Whether a gradient can change in place: not expanded, not negated later, not in a graph."""
    if gradient.layout != torch.strided or gradient.requires_grad or gradient.is_inference():
        return False
    return not gradient.is_neg() and not is_expanded(gradient)


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements of a tensor share memory with each other, as `expand` leaves them."""
    layout = zip(tensor.stride(), tensor.shape, strict=True)
    return any(step == 0 and size > 1 for step, size in layout)
