from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from drophot._core.ratios import check_keep_ratio, check_prune_ratio, num_kept, num_removed


@given(st.integers(1, 10**6), st.integers(1, 256))
@example(5, 128)  # 2.5 is rounded up
def test_counts_are_rounded_half_up_and_one_sample_is_always_kept(total: int, parts: int) -> None:
    ratio = parts / 256  # exact in binary
    rounded = int(Fraction(parts, 256) * total + Fraction(1, 2))
    assert num_removed(total, ratio) == rounded
    assert num_kept(total, ratio) == max(1, rounded)


@pytest.mark.parametrize(
    ("check", "ratio", "hint"),
    [
        (check_keep_ratio, 80, "pass 0.8"),
        (check_keep_ratio, 0, r"\(0, 1\]"),
        (check_keep_ratio, 1.5, "1.5"),
        (check_keep_ratio, float("nan"), "nan"),
        (check_prune_ratio, 12.5, "pass 0.125"),
        (check_prune_ratio, 1, r"\[0, 1\)"),
        (check_prune_ratio, -0.1, "-0.1"),
    ],
)
def test_a_ratio_out_of_range_is_refused(check: Any, ratio: float, hint: str) -> None:
    with pytest.raises(ValueError, match=f"`share` .*{ratio}") as error:
        check("share", ratio)
    assert error.match(hint)
