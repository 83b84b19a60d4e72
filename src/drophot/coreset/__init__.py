"""Coreset selection: from scores or features to the indices of the samples to keep."""

from drophot.coreset.beta_sampling import Beta
from drophot.coreset.density_facility_location import density_facility_location
from drophot.coreset.feature_extraction import features
from drophot.coreset.greedy import Coreset
from drophot.coreset.greedy_facility_location import facility_location
from drophot.coreset.greedy_k_center import k_center
from drophot.coreset.score_selection import select
from drophot.coreset.selectors import Evidence, Selector
from drophot.coreset.stratified import Stratified

__all__ = [
    "Beta",
    "Coreset",
    "Evidence",
    "Selector",
    "Stratified",
    "density_facility_location",
    "facility_location",
    "features",
    "k_center",
    "select",
]
