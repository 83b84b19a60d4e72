"""Which settings of a run cannot be combined, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drophot._core.importance import FromBatches

if TYPE_CHECKING:
    from drophot.settings.declarations import Settings

_START = "fine-tuning starts either from the first weights or from new ones"
_BOTH = "it corrects the outputs of BatchNorm too"
_MASK = "the mask of a schedule is not final when fine-tuning starts"
_NO_DENSE = "there is no network before pruning with the same training"
_ONCE = "it is computed once, from the trained network"
_NO_MASK = "removed channels leave no mask to put other weights under"


def check_combinations(settings: Settings) -> None:
    """Refuse values of two settings that exclude each other."""
    scheduled = settings.schedule != "one-shot"
    unfinished = scheduled and settings.schedule != "joint"  # when fine-tuning starts
    schedule, scope = f"schedule={settings.schedule!r}", f"scope={settings.scope!r}"
    computed = isinstance(settings.importance, FromBatches)
    for name, other, given, why in (
        ("rewind", "reinitialize=True", settings.reinitialize, _START),
        ("repair", "recalibrate_bn=True", settings.recalibrate_bn, _BOTH),
        ("repair", schedule, settings.schedule == "joint", _NO_DENSE),
        ("rewind", schedule, unfinished, _MASK),
        ("reinitialize", schedule, unfinished, _MASK),
        ("importance", schedule, scheduled and computed, _ONCE),
        ("structured", schedule, scheduled, "channels are removed in one shot"),
        ("structured", "rewind=True", settings.rewind, _NO_MASK),
        ("structured", "reinitialize=True", settings.reinitialize, _NO_MASK),
        ("structured", scope, settings.scope != "layer", "it has its own rule"),
    ):
        if getattr(settings, name) and given:
            raise ValueError(
                f"`{name}={getattr(settings, name)!r}` cannot be combined with `{other}`: {why}. "
                f"Remove one of them."
            )
    if settings.repair and settings.batch_size == 1:
        raise ValueError(
            "`repair=True` needs `batch_size` of at least 2, since one sample has no variance, "
            "got 1. Raise `batch_size`, or remove `repair`."
        )
    if settings.rules and not settings.structured:
        raise ValueError(
            f"`rules` can only be used with `structured=True`, got rules for "
            f"{', '.join(settings.rules)}. Remove them, or set `structured`."
        )
