"""docs/results.md and docs/result_tables.md say what the records say."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from helpers.record import one

from drophot import Record, records

pytest.importorskip("scipy", reason="`scipy` is not installed")


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper", ROOT / "benchmarks" / "paper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_pages_are_those_of_the_records(paper: ModuleType) -> None:
    found = paper.tables()
    names: list[str] = []
    for page in paper.PAGES:
        text = page.read_text()
        assert paper.filled(text, found) == text, "python benchmarks/paper.py --write"
        names += [name for name in re.findall(r"<!-- (\w+) -->", text) if name != "end"]
    assert sorted(names) == sorted(found), "each table is on one page, once"


def test_the_test_of_the_pages_can_fail(paper: ModuleType) -> None:
    text = paper.PAGES[0].read_text()
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


# The paper's Table 1: low − base and high − base, by data ratio and prune ratio.
TABLE_1 = {
    (0.1, 0.4): (2.88, 2.39),
    (0.1, 0.6): (2.5, 1.678),
    (0.1, 0.8): (2.49, 1.39),
    (0.2, 0.4): (1.74, 2.27),
    (0.2, 0.6): (1.7, 0.35),
    (0.2, 0.8): (2.52, 1.76),
    (0.3, 0.4): (-0.19, 0.41),
    (0.3, 0.6): (0.82, 0.81),
    (0.3, 0.8): (1.021, 0.89),
}


def test_the_published_accuracies_give_the_papers_table_1(paper: ModuleType) -> None:
    rows = paper.faults.published()
    assert len(rows) == len(TABLE_1)
    for row in rows:
        low, high = TABLE_1[row["data_ratio"], row["prune_ratio"]]
        base = row["finetuned_baseline"]
        assert row["finetuned_low"] - base == pytest.approx(low, abs=0.01)
        assert row["finetuned_high"] - base == pytest.approx(high, abs=0.01)


def faulty(paper: ModuleType, scores: float, masks: float, baseline: float) -> list[Record]:
    """Records of three seeds in which each fault adds some points to "coreset − base"."""
    runs: list[Record] = []
    for faults in paper.faults.COMBINATIONS:
        gain = scores * faults.scores + masks * faults.masks + baseline * faults.baseline
        for seed in range(3):
            base = 40 + seed
            values = {"low": base + gain + 0.1 * seed, "high": base + gain - 0.1 * seed}
            if not faults.scores:  # a baseline does not depend on the scores
                values["baseline"] = base
            if not faults.scores and not faults.baseline:
                values["random"] = base - 1
            runs += [
                one(
                    mode=mode,
                    keep_ratio=1.0 if mode == "baseline" else 0.3,
                    prune_ratio=0.8,
                    seed=seed,
                    protocol=faults.name,
                    finetuned_accuracy=value / 100,
                )
                for mode, value in values.items()
            ]
    return runs


def test_an_effect_that_is_put_in_is_the_one_that_is_found(paper: ModuleType) -> None:
    found = paper.Differences(faulty(paper, 0.0, 1.5, 4.0))
    assert found.complete == [0, 1, 2]
    effects = [paper.faults.main_effect(found, position).difference for position in range(3)]
    assert effects == pytest.approx([0.0, 1.5, 4.0])
    rows = [row.split("|") for row in paper.faults.combinations(found).splitlines()[2:]]
    assert len(rows) == 8
    low = {(r[1].strip(), r[2].strip(), r[3].strip()): r[6].split()[0] for r in rows}
    assert low["noise", "dropped", "evaluation mode"] == "+5.60"
    assert low["right", "held", "training mode"] == "+0.10"
    assert {r[8].split()[0] for r in rows} == {"−1.00"}


def test_a_seed_that_is_not_complete_does_not_count(paper: ModuleType) -> None:
    runs = faulty(paper, 0.0, 0.0, 4.0)
    lacking = [r for r in runs if (r.protocol, r.mode, r.seed) != ("released", "high", 1)]
    assert paper.Differences(lacking).complete == [0, 2]


def test_the_ablation_is_whole(paper: ModuleType) -> None:
    runs = records.read(paper.RESULTS / "table1_resnet18_cifar10.jsonl")
    assert len(paper.Differences(runs).complete) >= 3
    held = {r.protocol: r.sparsity for r in runs if r.mode == "low"}
    assert {name: sparsity > 0.79 for name, sparsity in held.items()} == {
        faults.name: not faults.masks for faults in paper.faults.COMBINATIONS
    }
