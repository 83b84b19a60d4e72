"""Choose samples while the model trains."""

from drophot.sampling.crest import CrestLoader
from drophot.sampling.epochwise import FreshSubset, LossSampling

__all__ = [
    "CrestLoader",
    "FreshSubset",
    "LossSampling",
]
