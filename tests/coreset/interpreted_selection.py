"""Selection by the kernels for GPUs, run by Triton's interpreter, against selection on a CPU.

`test_interpreted.py` runs these tests in a process of their own, because Triton chooses its
interpreter when it is imported. To run them alone:

    TRITON_INTERPRET=1 python -m pytest tests/coreset/interpreted_selection.py
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drophot.coreset import Stratified, select

few = settings(max_examples=10)
# NumPy, which the interpreter uses, warns of operations that overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, float("inf"), -float("inf"), 1e-42, -1e-42]),
    st.floats(allow_nan=False, width=16),
)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, *INTEGERS])


@st.composite
def scores(draw: Any) -> Tensor:
    dtype = draw(DTYPES)
    if dtype in INTEGERS:
        limits = torch.iinfo(dtype) if dtype != torch.bool else None
        low, high = (0, 1) if limits is None else (limits.min, limits.max)
        few = st.integers(max(low, -2), min(high, 2))
        values = draw(st.lists(few | st.integers(low, high), min_size=1, max_size=40))
    else:
        values = draw(st.lists(FLOATS, min_size=1, max_size=40))
    return torch.tensor(values, dtype=dtype)


def on_a_cpu(*arguments: Any, **options: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "0")
        return select(*arguments, **options)


@few
@given(scores(), st.floats(0.01, 1), st.sampled_from(["high", "low", "random"]), st.data())
def test_kernels_select_the_same_samples(
    values: Tensor, ratio: float, mode: str, data: st.DataObject
) -> None:
    options: dict[str, Any] = {"seed": data.draw(st.integers(-(2**70), 2**70))}
    count = len(values)
    if data.draw(st.booleans()):
        classes = st.lists(st.integers(-1, 2), min_size=count, max_size=count)
        options["targets"] = torch.tensor(data.draw(classes))
    if data.draw(st.booleans()):
        part = st.lists(st.integers(0, count - 1), min_size=1, unique=True)
        options["among"] = data.draw(part)
    found = select(values, ratio, mode, **options)
    assert found.dtype == torch.int64
    assert torch.equal(found, on_a_cpu(values, ratio, mode, **options))


@pytest.mark.parametrize("mode", ["high", "low", "random"])
@pytest.mark.parametrize("levels", [3, 1 << 30])
def test_several_chunks(mode: str, levels: int) -> None:
    values = torch.randint(levels, (20_000,)).float()
    found = select(values, 0.3, mode)
    assert torch.equal(found, on_a_cpu(values, 0.3, mode))


def test_several_chunks_of_each_class() -> None:
    values, targets = torch.randint(3, (40_000,)), torch.arange(40_000) % 2
    found = select(values, 0.3, targets=targets)
    assert torch.equal(found, on_a_cpu(values, 0.3, targets=targets))


def test_scores_that_are_not_contiguous() -> None:
    values = torch.randn(30, 2)[:, 1]
    assert torch.equal(select(values, 0.4), on_a_cpu(values, 0.4))


def test_a_stratified_selection() -> None:
    values = torch.randint(9, (60,))
    mode = Stratified(bins=5, cutoff=0.2)
    assert torch.equal(select(values, 0.4, mode), on_a_cpu(values, 0.4, mode))


def test_more_classes_than_histograms() -> None:
    values, targets = torch.randn((1 << 14) + 1), torch.arange((1 << 14) + 1)
    assert torch.equal(
        select(values, 1e-9, targets=targets), on_a_cpu(values, 1e-9, targets=targets)
    )


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`scores`.*NaN.*1 of 3"):
        select([0.0, float("nan"), 1.0], 0.5)


@pytest.mark.parametrize("wrong", [torch.zeros(2).long(), torch.zeros(3), torch.zeros(3, 1).long()])
def test_targets_are_checked(wrong: Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match="`targets`"):
        select(torch.zeros(3), 0.5, targets=wrong)
