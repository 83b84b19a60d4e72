"""Many runs, resumable, each shared stage computed once."""

from drophot.grid.grid import Grid

__all__ = [
    "Grid",
]
