"""Sample selection during training: samplers and loaders that reselect as the model learns."""

from drophot.sampling.adaptive_subset import AdaptiveSubset
from drophot.sampling.crest import CrestLoader
from drophot.sampling.loss_sampling import LossSampling
from drophot.sampling.random_subset import FreshSubset

__all__ = [
    "AdaptiveSubset",
    "CrestLoader",
    "FreshSubset",
    "LossSampling",
]
