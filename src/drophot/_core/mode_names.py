"""The names of the modes of a run: those that a user passes, and those of the library's objects."""

from __future__ import annotations

from typing import Literal, get_args

ScoreMode = Literal["high", "low", "random"]
FeatureMode = Literal["k_center", "facility_location", "density_facility_location"]
SamplingMode = Literal["crest", "fresh_subset", "loss_sampling"]
ModeName = Literal[ScoreMode, FeatureMode, SamplingMode]

SAMPLING_MODES: tuple[str, ...] = get_args(SamplingMode)
"""The modes that choose samples while step 3 trains."""

BASELINE = "baseline"
"""The mode of records that keep all samples, whatever mode was requested."""

# The names that Scored, Stratified, Beta and Adaptive give themselves.
_STATISTIC = "((forgetting|aum|el2n|confidence|variability|loss)-)?"
SELECTOR_NAMES = (
    rf"({_STATISTIC}(high|low)|random|{_STATISTIC}beta(-exponent\d[\d.e+-]*)?|"
    rf"{_STATISTIC}stratified(-bins\d+)?(-cutoff\d[\d.e-]*)?(-low)?)(-balanced)?"
)
ADAPTIVE_NAMES = rf"adaptive\d+-({SELECTOR_NAMES}|{'|'.join(get_args(FeatureMode))})"
