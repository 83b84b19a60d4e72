"""Sample selection during training: samplers and loaders that reselect as the model learns."""

from drophot.sampling.crest import CrestLoader
from drophot.sampling.loss_sampling import LossSampling
from drophot.sampling.random_subset import FreshSubset

__all__ = [
    "CrestLoader",
    "FreshSubset",
    "LossSampling",
]
