"""Panels of small figures as inline SVG."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

from drophot._core.mode_names import BASELINE
from drophot.records.cells import group_by_cell
from drophot.records.record import Record
from drophot.report import plots
from drophot.report.tables import finite, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "low": "low: least forgotten",
    "high": "high: most forgotten",
    "random": "random",
    BASELINE: "baseline: all data",
}
ONE_SEED = "There is only one seed, so there are no intervals."

_FEW_SEEDS = 5
"""With fewer seeds, intervals are so wide that they would hide the lines: at 3 seeds, each is four
times as long as the range of the seeds."""

# The inches of a panel by the number of columns: the page is 11.3 inches wide at most.
_SIZES = {1: (5.4, 2.7), 2: (5.4, 2.5), 3: (3.6, 2.1), 4: (2.7, 1.9)}
_SMALLEST = (2.15, 1.75)
_STYLE: Any = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#333",
    "axes.linewidth": 0.6,
    "xtick.color": "#8a8f98",
    "ytick.color": "#8a8f98",
    "xtick.labelcolor": "#333",
    "ytick.labelcolor": "#333",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 2.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "drophot",  # the same page from the same records
}


class Panels:
    """The figures of a page, in which each mode has the same style everywhere."""

    def __init__(self, modes: Iterable[str]) -> None:
        self._styles = plots.styles_of(modes)
        self._numbers = itertools.count(1)

    def ratios(self, runs: Sequence[Record]) -> str:
        """Accuracy against the share of data, and against the share of weights."""
        shares, ratios = values(runs, "keep_ratio"), values(runs, "prune_ratio")
        text = ""
        draw = partial(plots.ratios, styles=self._styles, ends=_ends(runs))
        if len(shares) > 1:
            text += note("Against the share of data kept, for each share of weights removed:")
            panels = {
                f"{percent(r)} removed": [x for x in runs if x.prune_ratio == r] for r in ratios
            }
            text += self._figure(panels, draw)
        if len(ratios) > 1:
            text += note("Against the share of weights removed, for each share of data kept:")
            panels = {f"{percent(share)} kept": _at(runs, share) for share in shares}
            text += self._figure(panels, partial(draw, x="prune_ratio"))
        if not text:
            return note("Left out: there is one data ratio and one prune ratio only.")
        bars = f"Bars and bands {_said(runs)}." if several(runs) else ONE_SEED
        return note(f"Test accuracy in % after fine-tuning. {bars}") + text

    def curves(self, runs: Sequence[Record]) -> str:
        """Accuracy over the epochs of fine-tuning, for each data ratio and prune ratio."""
        if not any(record.finetune_curve for record in runs):
            return note("Left out: there are no epochs of fine-tuning.")
        ratios = values(runs, "prune_ratio")
        panels = {
            f"{percent(share)} kept, {percent(ratio)} removed": _at(runs, share, ratio)
            for share in values(runs, "keep_ratio")
            for ratio in ratios
        }
        most = max(len(group_by_cell(found)) for found in panels.values() if found)
        if most > plots.MOST:
            return note(f"Left out: {most} lines in one figure; {plots.MOST} can be told apart.")
        if not finite(accuracy for record in runs for accuracy in record.finetune_curve):
            return note("Left out: every run diverged.")
        bands = f"bands {_said(runs)}" if several(runs) else "one seed"
        start = "and may lie below the frame"
        if runs[0].reinitialized or runs[0].rewound:
            start = "and is left out, since fine-tuning began from other weights"
        text = f"Test accuracy in % over the epochs of fine-tuning; {bands}. Each column has its "
        text += f"own scale. Epoch 0 is right after pruning {start}."

        def draw(found: Sequence[Record], ax: Axes) -> None:
            plots.curves(found, ax=ax, styles=self._styles, ends=_ends(runs)).set_xlabel("")
            later = finite(100 * a for record in found for a in record.finetune_curve)
            if not later:
                return
            low, high = min(later), max(later)
            # If pruning removed most of the accuracy, a frame that includes it would hide the rest.
            start = min(finite(100 * record.pruned_accuracy for record in found), default=low)
            if not (found[0].reinitialized or found[0].rewound) and start > 2 * low - high:
                low = min(low, start)
            edge = 0.06 * (high - low) or 1
            ax.set_ylim(low - edge, high + edge)

        return note(text) + self._figure(panels, draw, columns=len(ratios))

    def steps(self, runs: Sequence[Record]) -> str:
        """Accuracy before and after pruning and after fine-tuning, at the smallest data ratio."""
        share, *larger = values(runs, "keep_ratio")
        ratios = values(runs, "prune_ratio")
        if ratios == [0] and not any(record.finetune_curve for record in runs):
            return note("Left out: nothing was pruned and nothing fine-tuned.")
        text = f"Test accuracy in % with {percent(share)} of the data kept"
        text += ", the smallest share" * bool(larger) + "; "
        text += "bars are standard deviations over seeds." if several(runs) else "one seed."

        def draw(found: Sequence[Record], ax: Axes) -> None:
            plots.steps(found, ax=ax, styles=self._styles)
            labels = [label.get_text().replace(" ", "\n", 1) for label in ax.get_xticklabels()]
            ax.set_xticks(ax.get_xticks(), labels)
            ax.set_xlim(-0.45, 2.45)

        ratios = [ratio for ratio in ratios if ratio > 0] or ratios
        panels = {f"{percent(ratio)} removed": _at(runs, share, ratio) for ratio in ratios}
        return note(text) + self._figure(panels, draw)

    def _figure(
        self,
        panels: Mapping[str, Sequence[Record]],
        draw: Callable[..., object],
        columns: int | None = None,
    ) -> str:
        """A legend and the panels, which share one scale, or one for each column."""
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        if columns is None:
            columns, scales = _columns(len(panels)), 1
        else:
            scales = columns
        size = _SIZES.get(columns, _SMALLEST)
        modes = {record.mode for found in panels.values() for record in found}
        with mpl.rc_context():
            mpl.rcdefaults()  # independent of the settings of the caller
            mpl.rcParams.update(_STYLE)
            drawn: list[Axes | None] = []
            for title, found in panels.items():
                ax = None
                if found:
                    ax = Figure(figsize=size, layout="constrained").subplots()
                    draw(found, ax=ax)
                    if (legend := ax.get_legend()) is not None:
                        legend.remove()  # all panels share one
                    ax.set(title=title, ylabel="")
                drawn.append(ax)
            for first in range(scales):
                column = [ax for ax in drawn[first::scales] if ax is not None]
                column = [ax for ax in column if isfinite(ax.dataLim.ymin)]  # not all nan
                ends = [end for ax in column for end in ax.get_ylim()]
                for ax in column:
                    ax.set_ylim(min(ends), max(ends))
            legend = ""
            for mode, (marker, style, color) in self._styles.items():
                if mode in modes:
                    look = {"marker": marker, "linestyle": style, "color": color}
                    figure = Figure(figsize=(0.4, 0.16))
                    figure.add_artist(Line2D([0, 0.5, 1], [0.5] * 3, markevery=[1], **look))
                    legend += f"<span>{self._svg(figure)}{escape(NAMES.get(mode, mode))}</span>"
            svg = []
            for title, ax in zip(panels, drawn, strict=True):
                svg.append("<div></div>" if ax is None else self._svg(ax.figure, title))
        alone = " class=one" * (columns == 1)
        text = f'<div class="legend">{legend}</div><div class="panels" '
        text += f'style="--columns:{columns}">{"".join(svg)}</div>'
        return f"<figure{alone}>{text}</figure>"

    def _svg(self, figure: Any, label: str = "") -> str:
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", text, count=5)
        # All drawings use the same ids, which must be unique within a page.
        text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>f{next(self._numbers)}-", text)
        said = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
        return text.replace("<svg", f"<svg {said}", 1).strip()


def note(text: str) -> str:
    """An HTML paragraph in a softer color."""
    return f'<p class="note">{escape(text)}</p>'


def values(runs: Sequence[Record], name: str) -> list[float]:
    """The sorted values of a ratio among the coresets, or among all runs if there are none."""
    coresets = [record for record in runs if record.mode != BASELINE] or runs
    return sorted({getattr(record, name) for record in coresets})


def several(runs: Sequence[Record]) -> bool:
    """Whether a cell has several seeds."""
    return any(len(found) > 1 for found in group_by_cell(runs))


def _columns(panels: int) -> int:
    """The number of columns that fill a row, or leave the fewest places of the last one empty."""
    return panels if panels < 5 else min((4, 5, 3), key=lambda columns: -panels % columns)


def _few_seeds(runs: Sequence[Record]) -> bool:
    """Whether intervals would hide the lines."""
    return any(1 < len(found) < _FEW_SEEDS for found in group_by_cell(runs))


def _ends(runs: Sequence[Record]) -> plots.Ends:
    return plots.extreme_ends if _few_seeds(runs) else plots.confidence_ends


def _said(runs: Sequence[Record]) -> str:
    """The meaning of bars and bands."""
    if not _few_seeds(runs):
        return "are 95 % intervals over seeds"
    return "reach from the lowest to the highest seed, since there are few seeds"


def _at(runs: Sequence[Record], share: float, ratio: float | None = None) -> list[Record]:
    """The runs of a data ratio, the baseline included, and of a prune ratio if one is given."""
    return [
        record
        for record in runs
        if (record.keep_ratio == share or record.mode == BASELINE)
        and ratio in (None, record.prune_ratio)
    ]
