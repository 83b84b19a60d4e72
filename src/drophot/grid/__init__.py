"""Grids of runs, which can be resumed and compute shared stages once."""

from drophot.grid.gpu_pool import GpuPool
from drophot.grid.grid import Grid
from drophot.grid.plan import Plan

__all__ = [
    "GpuPool",
    "Grid",
    "Plan",
]
