"""What people give as scores, features, classes and positions: right, or named by its argument."""

from typing import Any

import numpy as np
import pytest
import torch

from drophot import DynamicsTracker, ForgettingTracker, facility_location, k_center, select

SCORES = [3, 1, 2, 0]
NUMBERS = [np.dtype(kind) for kind in (">f8", "<f8", ">f4", ">i2", ">u8", "f2", "i1", "u4")]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_any_order_of_bytes_is_read(dtype: np.dtype) -> None:
    array = np.array(SCORES).astype(dtype)
    assert select(array, 0.5).tolist() == [0, 2]
    assert select(array[::-1], 0.5).tolist() == [1, 3]
    assert select(SCORES, 0.5, targets=np.array([0, 0, 1, 1]).astype(">i4")).tolist() == [0, 2]
    rows = array[:, None]
    for selector in (k_center, facility_location):
        expected = selector(np.array(SCORES, dtype=np.float64)[:, None], 0.5)
        assert torch.equal(selector(rows, 0.5).ranking, expected.ranking)


def test_lists_of_numbers_and_masks_that_hide_nothing_are_read() -> None:
    assert select([torch.tensor(float(score)) for score in SCORES], 0.5).tolist() == [0, 2]
    assert select(np.ma.masked_array(SCORES), 0.5).tolist() == [0, 2]
    hidden = np.ma.masked_array([999, *SCORES], mask=[1, 0, 0, 0, 0])
    assert select(hidden, 0.5, among=[1, 2, 3, 4]).tolist() == [1, 3]


WRONG = {
    "a tracker": (ForgettingTracker(4), TypeError, r"ForgettingTracker.*\.scores\(\)"),
    "another one": (DynamicsTracker(4), TypeError, "DynamicsTracker"),
    "objects": (np.array([1, 2.5, 3, 4], dtype=object), TypeError, "object"),
    "None": (None, TypeError, "NoneType"),
    "a None": ([1, 2, None, 4], TypeError, "NoneType, int"),
    "strings": (["1", "2", "3", "4"], TypeError, "U1"),
    "bytes": (np.array([b"1", b"2"]), TypeError, "S1"),
    "a dict": ({"a": 1.0}, TypeError, "dict"),
    "an iterator": (iter([1.0]), TypeError, "list_iterator"),
    "complex": (np.array([1j, 2, 3, 4]), TypeError, "complex128"),
    "complex tensor": (torch.zeros(4, dtype=torch.complex64), TypeError, "complex64"),
    "dates": (np.array(["2020-01-01"], dtype="datetime64[D]"), TypeError, "datetime64"),
    "ragged": ([[1], [1, 2]], TypeError, "list of list"),
    "batches": ([torch.ones(2), torch.ones(3)], TypeError, r"list of Tensor.*torch\.cat"),
    "sparse": (torch.eye(4).to_sparse(), TypeError, "sparse_coo"),
    "meta": (torch.empty(4, device="meta"), TypeError, "on meta"),
    "masked": (np.ma.masked_array([9.0, 1, 2, 3], mask=[1, 0, 0, 0]), ValueError, "1 of 4"),
    "masked integers": (
        np.ma.masked_array([9, 1], mask=[0, 1]),
        ValueError,
        "1 of 2.* 1",
    ),
    "never presented": (torch.tensor([1.0, float("nan")]), ValueError, "1 of 2.*presented"),
    "a number": (3.0, ValueError, r"\(\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_scores_that_are_none_are_named(name: str) -> None:
    value, error, found = WRONG[name]
    with pytest.raises(error, match=f"`scores`.*{found}"):
        select(value, 0.5)


@pytest.mark.parametrize("selector", [k_center, facility_location])
@pytest.mark.parametrize("name", ["objects", "a None", "strings", "complex", "sparse", "meta"])
def test_features_that_are_none_are_named(selector: Any, name: str) -> None:
    value, error, found = WRONG[name]
    with pytest.raises(error, match=f"`features`.*{found}"):
        selector(value, 0.5)


@pytest.mark.parametrize("selector", [k_center, facility_location])
def test_a_masked_feature_does_not_count(selector: Any) -> None:
    rows = np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], mask=[[0, 0], [1, 0]])
    with pytest.raises(ValueError, match=r"`features` .*1 .* 1"):
        selector(rows, 0.5)


@pytest.mark.parametrize(
    ("targets", "error", "found"),
    [
        (np.ma.masked_array([0, 0, 1, 1], mask=[0, 0, 0, 1]), ValueError, "1 of 4"),
        (np.array([0, 1, "a", 2], dtype=object), TypeError, "object"),
        (["a", "b", "a", "b"], TypeError, "U1"),
        ([0, 1, None, 1], TypeError, "NoneType, int"),
        ([True, False, True, True], TypeError, "bool"),
        (torch.ones(4), TypeError, "float32"),
    ],
)
def test_classes_that_are_none_are_named(targets: Any, error: type[Exception], found: str) -> None:
    with pytest.raises(error, match=f"`targets`.*{found}"):
        select(SCORES, 0.5, targets=targets)
    with pytest.raises(error, match=f"`targets`.*{found}"):
        k_center(torch.arange(4.0)[:, None], 0.5, targets=targets)


@pytest.mark.parametrize("ratio", ["0.5", b"0.5", True, None])
def test_a_ratio_that_is_no_number_is_named(ratio: Any) -> None:
    with pytest.raises(TypeError, match=f"`ratio`.* {type(ratio).__name__}"):
        select(SCORES, ratio)
