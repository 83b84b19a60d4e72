"""What was seen of a call of a network, and whether two of them gave the same values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drophot._core.interruptions import must_propagate


@dataclass(slots=True)
class Seen:
    """What was seen of a call of the network."""

    failures: dict[int, str] = field(default_factory=dict)
    """Why a call does not do what it did, by its number."""
    end: int = 0
    """The number of calls that were reached."""
    outputs: list[Tensor] = field(default_factory=list)
    """What the network gave, if it came to its end."""
    prints: list[list[Tensor]] = field(default_factory=list)
    """A few sums of what each call gave."""
    error: Exception | None = None
    """What the network's own code raised."""


class Stop(BaseException):
    """Nothing can be compared any more."""


class UsersError(Exception):
    """The network's own code raised this error, which goes on as it is."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class InternalError(BaseException):
    """drophot went wrong in the middle of a network's code, which is not to catch that."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@contextmanager
def guarded() -> Iterator[None]:
    """Tell errors of drophot's own code from those of the network's code around it."""
    try:
        yield
    except Exception as error:
        if must_propagate(error):
            raise
        raise InternalError(error) from error


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two results are too far apart to be a matter of rounding."""
    if one.shape != other.shape:
        return True
    if not one.is_floating_point() or not one.numel():
        return False
    one, other = one.double(), other.double()
    same = (one == other) | ~one.isfinite() | ~other.isfinite()
    off = torch.where(same, 0, one - other).norm()
    size = torch.where(same & ~other.isfinite(), 0, other).norm()
    return bool(off > _TOLERANCE * size + 1e-30)


_TOLERANCE = 1e-2  # of float32 after many layers; what is really wrong is far off


def print_of(tensor: Tensor) -> Tensor:
    """A few sums that tell a tensor from others, in float64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1).double()
    flat = torch.where(flat.isfinite(), flat, 0)
    wave = (
        torch.arange(len(flat), device=flat.device, dtype=torch.float64).mul_(0.7548776662).cos_()
    )
    return torch.stack([flat.norm(), (flat * wave).sum()]).cpu()


def first_other(one: Seen, other: Seen) -> int | None:
    """The number of the first call that gives other values in two looks."""
    for number, (a, b) in enumerate(zip(one.prints, other.prints, strict=False)):
        for x, y in zip(a, b, strict=False):
            size = max(float(x[0]), float(y[0]))
            if bool(((x - y).abs() > _TOLERANCE * size + 1e-30).any()):
                return number
    return None
