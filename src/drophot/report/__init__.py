"""Records as tables, figures and a page."""

from drophot.report.functions import (
    Format,
    differences,
    html,
    plot_curves,
    plot_ratios,
    plot_steps,
    table,
)

__all__ = [
    "Format",
    "differences",
    "html",
    "plot_curves",
    "plot_ratios",
    "plot_steps",
    "table",
]
