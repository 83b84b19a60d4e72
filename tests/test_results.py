"""docs/results.md says what the records say."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from drophot import records

pytest.importorskip("scipy", reason="`scipy` is not installed")


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper", ROOT / "benchmarks" / "paper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_records(paper: ModuleType) -> None:
    text = paper.PAGE.read_text()
    assert paper.filled(text, paper.tables()) == text, "python benchmarks/paper.py --write"
    assert text.count("<!-- end -->") == len(paper.tables())


def test_the_test_of_the_page_can_fail(paper: ModuleType) -> None:
    text = paper.PAGE.read_text()
    changed = re.sub(r"\+0\.01", "+0.02", text)
    assert changed != text
    assert paper.filled(changed, paper.tables()) != changed


@pytest.mark.parametrize(("model", "seeds"), [("fcnet", 5), ("lenet", 3)])
def test_the_grid_is_the_papers_whole_one(paper: ModuleType, model: str, seeds: int) -> None:
    cells = [paper.cell(r) for r in paper.read(model) if paper.uncontrolled(r)]
    kept = [(m, k) for m in ("low", "high", "random") for k in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert cells == [
        (mode, keep, prune, seed)
        for mode, keep in [("baseline", 1.0), *kept]
        for prune in (0.0, 0.2, 0.4, 0.6, 0.8)
        for seed in range(seeds)
    ]
    assert {r.model for r in paper.read(model)} == {model}
    assert {r.protocol for r in paper.read(model)} == {"paper"}


def test_the_fast_loop_is_compared_on_the_cells_that_both_have(paper: ModuleType) -> None:
    """A difference that is put in is the one that is found, and cells of one side do not count."""
    slow = [r for r in paper.read("fcnet_plain") if paper.uncontrolled(r)]
    better = [replace(r, trained_accuracy=r.trained_accuracy + 0.01) for r in slow]
    lacking = [r for r in better if r.keep_ratio != 0.3]
    rows = paper.agreement({"fcnet": slow}, {"fcnet": lacking}).splitlines()[2:]
    found = [[part.strip() for part in row.strip("|").split("|")] for row in rows]
    assert [row[1:4] for row in found] == [
        ["before pruning", "65", "3"],
        ["after pruning", "65", "3"],
        ["after fine-tuning", "65", "3"],
    ]
    assert [row[5] for row in found] == ["+1.00", "+0.00", "+0.00"]


def test_every_committed_record_held_what_it_says(paper: ModuleType) -> None:
    for path in Path(paper.RESULTS).glob("grid_*.jsonl"):
        found = records.read(path)
        assert len({(r.fingerprint, r.mode) for r in found}) == len(found), "each cell once"
        for r in found:
            assert r.finetuned_accuracy == (*r.finetune_curve[-1:], r.pruned_accuracy)[0]
            if r.structured:  # a layer loses inputs too
                lost = 1 - (1 - r.prune_ratio) ** 2
                assert r.sparsity == pytest.approx(lost, abs=0.02)
            elif r.protocol == "paper":
                assert r.sparsity == pytest.approx(r.prune_ratio, abs=1e-3)
            else:
                after = r.sparsity < 0.2 if r.finetune_curve else True
                assert after, "the released code lets weights grow back"


def test_the_published_numbers_are_the_published_ones(paper: ModuleType) -> None:
    path = ROOT.parent / "shared" / "paper" / "published_accuracies.csv"
    if not path.exists():
        pytest.skip("the published accuracies are not beside the checkout")
    import csv

    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "LeNet"]
    for (mode, keep, prune), numbers in paper.PUBLISHED.items():
        (row, *_) = [
            row
            for row in rows
            if float(row["prune_ratio"]) == prune
            and (mode == "baseline" or float(row["data_ratio"]) == keep)
        ]
        assert numbers == tuple(float(row[f"{step}_{mode}"]) for step in ("pruned", "finetuned"))
