"""Train a classifier and measure its accuracy."""

from drophot.data.cache import Cache, in_memory
from drophot.data.samples import first_sample
from drophot.training.evaluation import evaluate
from drophot.training.loaders import BatchLoader, batches
from drophot.training.loop import Fit, fit
from drophot.training.loss import Loss
from drophot.training.schedulers import SchedulerInterval
from drophot.training.step import onednn_linear

__all__ = [
    "BatchLoader",
    "Cache",
    "Fit",
    "Loss",
    "SchedulerInterval",
    "batches",
    "evaluate",
    "first_sample",
    "fit",
    "in_memory",
    "onednn_linear",
]
