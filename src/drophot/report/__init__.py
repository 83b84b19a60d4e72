"""Tables, figures and a page of records.

A row is a cell: the runs that differ only in their seed. Every other setting in which rows differ,
data and code included, has a column. A run that is given twice counts once, and two runs of one
cell and seed with different results are refused. The device and the versions are not settings, so
a cell may have seeds from several devices. Accuracies are those after the last epoch, never after
the best one.

Example:
    >>> from drophot.records import Record
    >>> same = dict(model="lenet", prune_ratio=0.8, sparsity=0.8, finetune_curve=(0.97,))
    >>> same |= dict(trained_accuracy=0.97, pruned_accuracy=0.6, fingerprint="", device="cpu")
    >>> same |= dict(seconds={}, versions={})
    >>> baseline = dict(mode="baseline", keep_ratio=1.0, num_kept=60_000, finetuned_accuracy=0.98)
    >>> tenth = dict(mode="high", keep_ratio=0.1, num_kept=6_000, finetuned_accuracy=0.9725)
    >>> runs = [Record(**same, **coreset, seed=0) for coreset in (baseline, tenth)]
    >>> print(differences(runs, format="text"))
    share  removed    n  high − base
    -----  -------  ---  -----------
      10%      80%    1        −0.75
    >>> table(runs, "csv").count("lenet")
    2
    >>> figures = plot_curves(runs), plot_ratios(runs), plot_steps(runs)
    >>> figures[0].get_ylabel()
    'test accuracy (%)'
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     html(runs, f"{folder}/report.html").name
    'report.html'
"""

from drophot.report.functions import (
    Format,
    agreement,
    differences,
    html,
    plot_curves,
    plot_forgotten,
    plot_ratios,
    plot_steps,
    table,
)
from drophot.report.sample_figures import plot_data_map, plot_score_change, plot_suspects

__all__ = [
    "Format",
    "agreement",
    "differences",
    "html",
    "plot_curves",
    "plot_data_map",
    "plot_forgotten",
    "plot_ratios",
    "plot_score_change",
    "plot_steps",
    "plot_suspects",
    "table",
]
