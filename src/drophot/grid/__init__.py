"""Many runs, resumable, each shared stage computed once."""

from drophot.grid.grid import Grid
from drophot.grid.plan import Plan

__all__ = [
    "Grid",
    "Plan",
]
