"""The result of one checked pass of a network, and how the values of two passes are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drophot._core.interruptions import must_propagate


@dataclass(slots=True)
class PassResult:
    """The findings of a checked pass of the network."""

    failures: dict[int, str] = field(default_factory=dict)
    """By the number of a call: why it differs from the recorded one."""
    num_reached: int = 0
    """The number of calls that were reached."""
    outputs: list[Tensor] = field(default_factory=list)
    """The network's outputs, if it ran to the end."""
    fingerprints: list[list[Tensor]] = field(default_factory=list)
    """A few sums of the outputs of each call."""
    error: Exception | None = None
    """The error that the network's own code raised."""


class StopPass(BaseException):
    """The rest of the pass cannot be compared with the recorded one."""


class UserError(BaseException):
    """An error of the user's code, which is raised unchanged.

    The code may be the network's, a rule's or an importance's. The network's code must not catch
    this.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class InternalError(BaseException):
    """An error of drophot's own code during a pass, which the network's code must not catch."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@contextmanager
def guarded() -> Iterator[None]:
    """Mark errors raised inside as drophot's own, not the network's."""
    try:
        yield
    except Exception as error:
        if must_propagate(error):
            raise
        raise InternalError(error) from error


def differs(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by more than rounding."""
    if one.shape != other.shape:
        return True
    if not one.is_floating_point() or not one.numel():
        return False
    one, other = one.double(), other.double()
    same = (one == other) | ~one.isfinite() | ~other.isfinite()
    off = torch.where(same, 0, one - other).norm()
    size = torch.where(same & ~other.isfinite(), 0, other).norm()
    return bool(off > _TOLERANCE * size + 1e-30)


_TOLERANCE = 1e-2  # for float32 after many layers; wrong results differ much more


def fingerprint(tensor: Tensor) -> Tensor:
    """A few sums in float64 that tell a tensor from others."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1).double()
    flat = torch.where(flat.isfinite(), flat, 0)
    wave = (
        torch.arange(len(flat), device=flat.device, dtype=torch.float64).mul_(0.7548776662).cos_()
    )
    return torch.stack([flat.norm(), (flat * wave).sum()]).cpu()


def first_difference(one: PassResult, other: PassResult) -> int | None:
    """The number of the first call whose outputs differ between two passes."""
    for number, (a, b) in enumerate(zip(one.fingerprints, other.fingerprints, strict=False)):
        for x, y in zip(a, b, strict=False):
            size = max(float(x[0]), float(y[0]))
            if bool(((x - y).abs() > _TOLERANCE * size + 1e-30).any()):
                return number
    return None
