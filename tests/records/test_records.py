import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.record import one
from hypothesis import given
from hypothesis import strategies as st

from drophot import Record
from drophot.records import fingerprint, from_line, read, to_line, write
from drophot.records.coreset_text import to_text

share = st.floats(0, 1)
text = st.text(max_size=20)
records = st.builds(
    Record,
    model=text,
    mode=st.sampled_from(["high", "low", "random"]),
    keep_ratio=share,
    num_kept=st.integers(1, 10**9),
    prune_ratio=share,
    seed=st.integers(0, 2**40),
    trained_accuracy=share,
    pruned_accuracy=share,
    finetuned_accuracy=share,
    finetune_curve=st.lists(share, max_size=10).map(tuple),
    sparsity=share,
    seconds=st.dictionaries(text, st.floats(0, 1e6)),
    device=text,
    versions=st.dictionaries(text, text),
    fingerprint=text,
    settings=st.dictionaries(text, st.integers() | text | st.lists(st.integers(), max_size=2)),
    cell=text,
    test_samples=st.integers(0, 10**6),
    coreset=text,
)


@given(st.lists(records, max_size=4))
def test_writing_and_reading_is_the_identity(found: list[Record]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        write(found[:1], path)
        write(found[1:], str(path))
        again = read(path)
    assert again == found
    assert [r.seconds for r in again] == [r.seconds for r in found]


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_a_record_holds_its_coreset(kept: list[bool]) -> None:
    indices = np.flatnonzero(kept)
    record = from_line(to_line(one(coreset=to_text(indices, len(kept)))))
    assert (found := record.indices()) is not None
    assert found.tolist() == indices.tolist()
    assert one().indices() is None
    with pytest.raises(ValueError, match="`coreset`.*spoiled"):
        one(coreset="spoiled").indices()


@pytest.mark.parametrize("total", ["-20", "3", "100"])
def test_a_coreset_of_another_number_of_samples_is_refused(total: str) -> None:
    text = to_text(np.array([0, 3]), 20).partition(":")[2]
    with pytest.raises(ValueError, match=f"`coreset`.*{total}:"):
        one(coreset=f"{total}:{text}").indices()


def test_a_record_is_frozen_and_equal_but_for_its_seconds() -> None:
    record = one()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.seed = 1  # type: ignore[misc]
    assert record == one(seconds={"train": 99.0})
    assert record != one(pruned_accuracy=0.51)


def test_records_make_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([one(), one(seed=1)])
    assert frame["seed"].tolist() == [0, 1]
    assert frame["keep_ratio"].tolist() == [0.1, 0.1]
    assert set(frame.columns) == {field.name for field in dataclasses.fields(Record)}


@pytest.mark.parametrize("bad", ["{", "[]", "{}", '{"model": "x"}', "3"])
def test_a_foreign_line_is_named(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write([one()], path)
    with path.open("a") as file:
        file.write(bad + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*records.jsonl"):
        read(path)
    extra = tmp_path / "extra.jsonl"
    extra.write_text(json.dumps({**dataclasses.asdict(one()), "flavour": 1}) + "\n")
    with pytest.raises(ValueError, match="flavour"):
        read(extra)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("seed", value) for value in ("zero", 0.5, True, None)],
        *[("trained_accuracy", value) for value in ("x", None, [0.5], True)],
        *[("finetune_curve", value) for value in (0.5, ["x"], [None], "0.5")],
        *[("seconds", value) for value in ([1], {"train": "x"})],
        *[("versions", {"torch": 2}), ("equal_steps", 1), ("model", 3), ("num_kept", 1.5)],
    ],
    ids=str,
)
def test_a_value_of_another_type_is_named(name: str, value: Any) -> None:
    line = json.dumps(dataclasses.asdict(one()) | {name: value})
    with pytest.raises(ValueError, match=name):
        from_line(line)


def test_a_missing_and_a_newer_field_are_named() -> None:
    values = dataclasses.asdict(one())
    with pytest.raises(ValueError, match=r"flavour"):
        from_line(json.dumps(values | {"flavour": 1}))
    del values["seed"]
    with pytest.raises(ValueError, match="'seed'"):
        from_line(json.dumps(values))


def test_old_records_are_read() -> None:
    new = {"settings", "cell", "test_samples", "parameters", "structured"}
    values = {k: v for k, v in dataclasses.asdict(one()).items() if k not in new}
    found = from_line(json.dumps(values))
    assert found == one()
    assert (found.settings, found.cell, found.test_samples) == ({}, "", 0)


json_values = st.recursive(
    st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), text),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(text, json_values, max_size=4), st.dictionaries(text, json_values))
def test_fingerprints_are_equal_if_and_only_if_configurations_are(one: Any, other: Any) -> None:
    assert fingerprint(dict(reversed(one.items()))) == fingerprint(one)
    assert (fingerprint(one) == fingerprint(other)) == (
        json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    )
