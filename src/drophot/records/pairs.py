"""Pairs of runs: each with the run of its reference that has the same seed."""

from __future__ import annotations

from collections.abc import Iterable

from drophot._core.mode_names import BASELINE
from drophot.records.cells import check_names, group_by_cell, shared_settings
from drophot.records.record import Record
from drophot.settings.names import Mode, needs_scoring
from drophot.settings.tables import SCORING_ONLY


def pairs(records: Iterable[Record], against: str | Mode) -> list[list[tuple[Record, Record]]]:
    """Pair the runs of each cell with the runs of its reference that have the same seed.

    Args:
        records: The records.
        against: The mode of the references, as an object or by its name.

    Returns:
        The pairs of each cell. Left out are the cells that share no seed with their reference,
        those that have the mode of the reference, and the baseline.

    Raises:
        TypeError: If an item is not a record, or `against` is not a mode.
        ValueError: If `group_by_cell` raises one, no record has the mode `against`, or records of
            different objects have it.
    """
    groups = group_by_cell(records)
    mode = mode_name(against)
    modes = dict.fromkeys(runs[0].mode for runs in groups)
    if mode not in modes:
        raise ValueError(
            f"`against` must be a mode of the records, got {mode!r}. The modes of the records are "
            f"{', '.join(modes)}. Add the records of the reference, or choose another one."
        )
    check_names((runs[0] for runs in groups if runs[0].mode == mode), "records")
    free = free_settings(against)
    # References that were scored alike take precedence. Of several, the first counts.
    precedence = (free - SCORING_ONLY, free)
    references: list[dict[object, dict[int, Record]]] = [{}, {}]
    for runs in groups:
        if runs[0].mode == mode:
            for by_settings, ignored in zip(references, precedence, strict=True):
                by_seed = by_settings.setdefault(shared_settings(runs[0], ignored), {})
                for run in runs:
                    by_seed.setdefault(run.seed, run)
    found = []
    for runs in groups:
        if runs[0].mode in (mode, BASELINE):
            continue
        alike, scored_otherwise = (
            by_settings.get(shared_settings(runs[0], ignored), {})
            for by_settings, ignored in zip(references, precedence, strict=True)
        )
        by_seed = {**scored_otherwise, **alike}
        paired = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]
        if paired:
            found.append(sorted(paired, key=lambda pair: pair[0].seed))
    return found


def mode_name(mode: str | Mode, argument: str = "against") -> str:
    """The name by which records call a mode."""
    name = mode if isinstance(mode, str) else getattr(mode, "name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"`{argument}` must be a mode or the name of one, got {mode!r:.80}. Pass a name such "
            f'as "random", or an object with a `name`.'
        )
    return name


def free_settings(mode: str | Mode) -> frozenset[str]:
    """The settings in which a reference of a mode may differ from what is compared with it."""
    free = {"mode"}
    if mode == BASELINE:  # it keeps all samples, whatever share and number of steps are requested
        free |= {"keep_ratio", "equal_steps"}
    return frozenset(free if needs_scoring(mode) else free | SCORING_ONLY)
