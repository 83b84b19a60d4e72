"""Pruning of weights by magnitude or importance, with masks that keep removed weights at zero."""

from drophot._core.importance import Importance
from drophot.prune.activation_repair import repair
from drophot.prune.batchnorm import recalibrate_bn
from drophot.prune.compressed_checkpoint import load_compressed, save_compressed
from drophot.prune.magnitude import magnitude_prune
from drophot.prune.masks import Masks
from drophot.prune.model_summary import LayerSummary, Summary, summary
from drophot.prune.schedule import Schedule, cubic, geometric, rewind
from drophot.prune.semi_structured import to_semi_structured

__all__ = [
    "Importance",
    "LayerSummary",
    "Masks",
    "Schedule",
    "Summary",
    "cubic",
    "geometric",
    "load_compressed",
    "magnitude_prune",
    "recalibrate_bn",
    "repair",
    "rewind",
    "save_compressed",
    "summary",
    "to_semi_structured",
]
