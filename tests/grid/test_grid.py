"""The grid: which stages it computes, that its records are the pipeline's, what it refuses."""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import TEST, TRAIN, drop_hot, points, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import Dataset

from drophot import Adaptive, DropHot, Grid, Record, Scored, Stratified, fit, records
from drophot._core import random_state
from drophot.coreset import Beta
from drophot.grid.plan import Plan
from drophot.grid.stages import stage_of
from drophot.grid.store import Store
from drophot.models import fcnet
from drophot.pipeline.provenance import environment

pytestmark = pytest.mark.filterwarnings("ignore:.*leave no sample of classes")

LISTS: dict[str, Any] = {
    "data_ratios": [0.2, 0.5],
    "modes": ["low", "high", "random"],
    "prune_ratios": [0.0, 0.6],
    "seeds": [0, 3],
}


def grid(pipeline: DropHot | None = None, **changes: Any) -> Grid:
    equal = {"score_epochs": 2, "train_epochs": 2, "finetune_epochs": 1}
    return Grid(drop_hot(**equal) if pipeline is None else pipeline, **(LISTS | changes))


@pytest.fixture(scope="module")
def first_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the cells of the first seed."""
    folder = tmp_path_factory.mktemp("first") / "store"
    grid(seeds=[0]).run(folder)
    return folder


@pytest.fixture
def held(first_store: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may change."""
    return shutil.copytree(first_store, tmp_path / "held")


class Calls:
    """A training loop that writes down what it was asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, model: nn.Module, dataset: Dataset[Any], epochs: int, **rest: Any) -> None:
        self.sizes.append(len(dataset))
        fit(model, dataset, epochs, **rest)


def alone(pipeline: DropHot, record: Record) -> Record:
    """The same cell without a grid."""
    torch.set_num_threads(1)
    return pipeline.replace(
        seed=record.seed,
        mode="random" if record.mode == "baseline" else record.mode,
        data_ratio=record.keep_ratio,
        prune_ratio=record.prune_ratio,
        equal_steps=record.equal_steps,
        reinitialize=record.reinitialized,
    ).run()


# --- what is computed ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score_epochs": 3},  # then the scoring network is not the baseline
        {"forgetting": "toneva"},
        {"protocol": "released"},
        {"scope": "global"},
        {"finetune_epochs": 0},
    ],
    ids=str,
)
def test_every_record_is_the_one_of_the_pipeline_alone(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = drop_hot(**({"score_epochs": 2, "train_epochs": 2, "finetune_epochs": 1} | changes))
    if changes:
        ratios, seeds, modes = [0.5], [3], ["low", "random"]
    else:
        ratios, seeds, modes = LISTS["data_ratios"], LISTS["seeds"], ["high"]
    wanted = grid(
        pipeline,
        data_ratios=ratios,
        seeds=seeds,
        modes=modes,
        controls=["equal_steps", "reinitialize"],
    )
    found = wanted.run(tmp_path)
    assert found == [alone(pipeline, record) for record in found]
    cells = {
        (r.seed, r.mode, r.keep_ratio, r.prune_ratio, r.equal_steps, r.reinitialized) for r in found
    }
    assert len(cells) == len(found) == len(seeds) * (3 + len(ratios) * len(modes) * 2 * 3)


@pytest.mark.slow
def test_every_cell_once_the_baseline_always_and_dense_too(tmp_path: Path) -> None:
    found = grid(prune_ratios=[0.3, 0.6], modes=["low", "random"]).run(tmp_path)
    cells = [(r.seed, r.mode, r.keep_ratio, r.prune_ratio) for r in found]
    assert len(set(cells)) == len(cells)
    baseline = [(s, "baseline", 1.0, p) for s in (0, 3) for p in (0.0, 0.3, 0.6)]
    rest = [
        (s, m, r, p)
        for s in (0, 3)
        for r in (0.2, 0.5)
        for m in ("low", "random")
        for p in (0.3, 0.6)
    ]
    assert sorted(cells) == sorted(baseline + rest)
    assert cells == sorted(cells, key=lambda cell: cell[0]), "by seed"
    dense = [r for r in found if r.mode == "baseline" and r.prune_ratio == 0]
    assert all(len(r.finetune_curve) == 1 and r.sparsity < 0.01 for r in dense)


@pytest.mark.slow
def test_controls_are_cells_beside_the_others(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"seeds": [0], "data_ratios": [0.5], "modes": ["low", "random"]}
    plain = grid(**asked).run(tmp_path / "plain")
    every = grid(**asked, controls=["equal_steps", "reinitialize"]).run(tmp_path / "controls")
    assert [r for r in every if not r.equal_steps and not r.reinitialized] == plain
    kinds = Counter((r.mode, r.equal_steps, r.reinitialized, r.prune_ratio) for r in every)
    for mode in ("low", "random"):
        assert kinds[mode, True, False, 0.0] == kinds[mode, False, False, 0.0] == 1
        assert kinds[mode, True, True, 0.6] == kinds[mode, False, True, 0.6] == 1
    assert not any(new and prune == 0 for _, _, new, prune in kinds), (
        "the dense one is the baseline"
    )
    assert not any(equal for mode, equal, _, _ in kinds if mode == "baseline")
    assert kinds["baseline", False, True, 0.6] == 1


@pytest.mark.slow
def test_what_cells_share_is_computed_once(tmp_path: Path) -> None:
    calls = Calls()
    pipeline = drop_hot(score_epochs=2, train_epochs=2, finetune_epochs=1, fit=calls)
    wanted = grid(pipeline)
    calls.sizes.clear()
    found = wanted.run(tmp_path)
    trainings = Counter(size for size in calls.sizes if size < 120)
    assert trainings == {24: 2 * 3, 60: 2 * 3}, "one for each seed, mode and ratio"
    assert len(calls.sizes) - sum(trainings.values()) == 2 + len(found), (
        "a scoring a seed and a fine-tuning a cell, and none to plan"
    )
    assert calls.sizes[0] == 120, "scores come first"


def test_a_loop_of_ones_own_is_not_called_to_plan(tmp_path: Path) -> None:
    calls = Calls()
    plan = grid(drop_hot(fit=calls)).plan(tmp_path)
    assert calls.sizes == []
    assert plan.seconds is None
    assert "time not known" in str(plan)
    assert plan.memory > 0
    assert plan.bytes > 0
    assert grid(drop_hot(fit=partial(fit))).plan(tmp_path).seconds, "this is drophot's"


@pytest.mark.parametrize("score_epochs", [10, 12])
def test_the_papers_grid_takes_590_epochs_instead_of_910(score_epochs: int) -> None:
    pipeline = drop_hot(score_epochs=score_epochs, train_epochs=10, finetune_epochs=10)
    ratios = [0.1, 0.2, 0.3, 0.4, 0.5]
    wanted = Grid(
        pipeline,
        data_ratios=ratios,
        modes=["low", "high"],
        prune_ratios=[0, 0.2, 0.4, 0.6, 0.8],
        seeds=[0],
    )
    plan = wanted.plan()
    assert (plan.runs, plan.finetunings) == (55, 55)
    shared = score_epochs == 10  # the scoring network is the baseline
    assert plan.epochs == pytest.approx(590 if shared else 602)
    assert (plan.scorings, plan.trainings) == (1, 10 if shared else 11)


def test_no_scores_where_none_are_needed(held: Path, tmp_path: Path) -> None:
    wanted = grid(modes=["random"], seeds=[0])
    plan = wanted.plan()
    assert plan.scorings + plan.trainings == 3
    found = wanted.run(tmp_path / "random")
    whole = records.read(held / "records.jsonl")
    assert found == whole[:2] + [record for record in whole if record.mode == "random"]


@pytest.mark.slow
@settings(max_examples=10)
@given(
    st.sets(st.sampled_from([0.2, 0.3, 0.5]), min_size=1),
    st.sets(st.sampled_from(["low", "high", "random"]), min_size=1),
    st.sets(st.sampled_from([0.0, 0.5, 0.8]), min_size=1),
    st.sets(st.integers(0, 5), min_size=1, max_size=3),
    st.sets(st.sampled_from(["equal_steps", "reinitialize"])),
)
def test_the_plan_counts_the_stages(
    ratios: set[float], modes: set[str], prunes: set[float], seeds: set[int], controls: set[str]
) -> None:
    wanted = grid(
        data_ratios=ratios, modes=modes, prune_ratios=prunes, seeds=seeds, controls=controls
    )
    plan = wanted.plan()
    trained = len(seeds) * len(ratios) * len(modes) * (1 + ("equal_steps" in controls))
    pruned = len(prunes) + ("reinitialize" in controls) * len(prunes - {0.0})
    cells = trained * pruned + len(seeds) * (pruned + (0.0 not in prunes))
    assert (plan.runs, plan.finetunings) == (cells, cells)
    assert plan.scorings + plan.trainings == trained + len(seeds)
    assert plan.stages == trained + len(seeds) + cells
    equal = "equal_steps" in controls
    rounds = 2 * len(seeds) * (1 + len(modes) * (sum(ratios) + len(ratios) * equal))
    assert plan.epochs == pytest.approx(rounds + cells)
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert plan.bytes > 0


class Counting(nn.Module):
    """A network that counts the samples that it evaluates."""

    evaluated = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc = small()

    def forward(self, inputs: Tensor) -> Tensor:
        Counting.evaluated += 0 if self.training else len(inputs)
        return self.fc(inputs)


@pytest.mark.parametrize(
    ("mode", "every", "ratio", "epochs", "size", "equal"),
    [
        ("high", 1, 0.3, 3, 16, False),
        ("random", 1, 0.3, 3, 16, False),
        ("facility_location", 2, 0.3, 3, 50, True),
        (Scored("el2n", Beta()), 4, 0.1, 5, 7, True),
        ("high", 3, 0.5, 0, 16, False),
    ],
    ids=str,
)
def test_the_plan_counts_the_passes_that_select_again(
    mode: Any, every: int, ratio: float, epochs: int, size: int, equal: bool
) -> None:
    lengths = {"train_epochs": epochs, "finetune_epochs": 0, "batch_size": size}
    run = drop_hot(model=Counting, **lengths)
    lists = {"data_ratios": [ratio], "prune_ratios": [0], "seeds": [0]}
    adaptive = Adaptive(mode, every=every)
    plan, control = (
        Grid(run, modes=[one], controls=["equal_steps"] * equal, **lists).plan()
        for one in (adaptive, "fresh_subset")
    )
    passes = 0.0
    for steps in {False, equal}:
        one = run.replace(mode=adaptive, data_ratio=ratio, equal_steps=steps)
        one.select()
        Counting.evaluated = 0
        one.train()
        passes += (Counting.evaluated - len(TEST)) / len(TRAIN)
    assert plan.epochs - control.epochs == pytest.approx(passes)
    assert plan.stages == control.stages


def test_a_training_without_a_second_selection_is_left_out(tmp_path: Path) -> None:
    """A mode that would never be used has no record, which would be that of a random subset."""
    run = drop_hot(train_epochs=2, score_epochs=2, finetune_epochs=0)
    adaptive = [Adaptive(mode, every=2) for mode in ("high", "random")]
    lists = {"data_ratios": [0.3], "prune_ratios": [0], "seeds": [0]}
    with pytest.raises(ValueError, match="`every`.*'adaptive2-high'.* 2, got 2.*equal_steps"):
        Grid(run, modes=adaptive, **lists)
    equal = {**lists, "controls": ["equal_steps"]}
    with pytest.warns(UserWarning, match="'adaptive2-high', 'adaptive2-random'.*`train_epochs`"):
        grid = Grid(run, modes=["fresh_subset", *adaptive], **equal)
    found = [(r.mode, r.equal_steps) for r in grid.run(tmp_path)]
    fresh = [("fresh_subset", False), ("fresh_subset", True)]
    assert found == [("baseline", False), *fresh, *((one.name, True) for one in adaptive)]
    assert grid.plan().runs == len(found)
    wide = {**equal, "data_ratios": [0.3, 0.9]}  # 3 epochs of 90 % are no 4th one
    with pytest.raises(ValueError, match=r"`every`.*'adaptive3-high'.* 3, got 3") as caught:
        Grid(run, modes=[Adaptive("high", every=3)], **wide)
    assert "equal_steps" not in str(caught.value)


def test_names_of_stages_differ() -> None:
    stages = {
        stage_of(
            {"seed": s, "mode": m, "data_ratio": r, "prune_ratio": p, "reinitialize": n}, settings
        )
        for settings in [drop_hot().config.settings]
        for s in (1, 11)
        for m in ("low", "baseline")
        for r in (0.1, 0.11)
        for p in (0.0, 0.1)
        for n in (False, True)
    }
    assert len({stage.name for stage in stages}) == len(stages) == 32


# --- what is shown --------------------------------------------------------------------------------


def test_the_plan_is_shown_before_the_start_and_a_bar_while_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tqdm")
    caplog.set_level("INFO", "drophot")
    wanted = grid(seeds=[0])
    wanted.run(tmp_path, progress=True)
    shown = capsys.readouterr()
    text = shown.out + shown.err
    line = "21 stages to do for 14 of 14 runs (1 scorings, 6 trainings, 14 fine-tunings)"
    assert line in text
    assert text.index(line) < text.index("0%") < text.index("100%")
    assert "epochs of 120 samples: about" in text
    assert line in caplog.messages[0]
    assert len(caplog.messages) == 1 + 21
    wanted.run(tmp_path)
    shown = capsys.readouterr()
    assert shown.out + shown.err == "", "silent unless asked"
    assert "0 stages to do for 0 of 14 runs" in caplog.messages[-1]


def test_a_plan_in_words() -> None:
    plan = Plan(
        runs=55,
        scorings=1,
        trainings=10,
        finetunings=55,
        epochs=590,
        samples=50_000,
        workers=2,
        seconds=3600,
        bytes=1_500_000,
        memory=450_000_000,
    )
    assert str(plan) == (
        "66 stages to do for 55 of 55 runs (1 scorings, 10 trainings, 55 fine-tunings), 590 "
        "epochs of 50,000 samples: about 60 min on 2 workers of 0.5 GB, 1.5 MB to store."
    )


def test_the_plan_of_a_store_that_holds_a_part(held: Path, tmp_path: Path) -> None:
    plan = grid().plan(held)
    assert (plan.runs, plan.finetunings, plan.scorings, plan.trainings) == (28, 14, 1, 6)
    assert grid(seeds=[0]).plan(held).seconds == 0
    assert grid().plan(tmp_path / "not there").finetunings == 28
    assert not (tmp_path / "not there").exists()


def test_a_plan_only_looks(held: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert grid().plan(tmp_path / "empty").finetunings == 28
    assert list((tmp_path / "empty").iterdir()) == []
    before = (held / "grid.json").read_bytes()
    grid().plan(held)
    assert (held / "grid.json").read_bytes() == before


def test_a_record_that_is_lost_at_the_end_is_an_error(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not a list with one record less."""
    tidy = Store.tidy

    def losing(self: Store, order: Any) -> None:
        tidy(self, order)
        for path in self.folder.glob("stages/finetune-*prune0.6*"):
            path.unlink()

    monkeypatch.setattr(Store, "tidy", losing)
    with pytest.raises(ValueError, match="`line`"):
        grid(seeds=[0]).run(held)


@pytest.mark.slow
def test_the_estimates_are_of_the_right_size(tmp_path: Path) -> None:
    wanted = grid(seeds=[0], controls=["equal_steps"])
    plan = wanted.plan()
    wanted.run(tmp_path)
    held = sum(path.stat().st_size for path in (tmp_path / "stages").iterdir())
    assert held / 20 < plan.bytes < held, "files of so small a network are mostly frame"


def test_the_callers_random_state_and_threads_are_left_alone(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        before = random_state.state()
        grid(seeds=[0], modes=["low"], data_ratios=[0.5]).run(tmp_path)
        assert random_state.state() == before
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_pipeline_is_left_alone(tmp_path: Path) -> None:
    pipeline = drop_hot(finetune_epochs=1)
    before = pipeline.run()
    grid(pipeline, seeds=[7], modes=["low"], data_ratios=[0.2]).run(tmp_path)
    assert pipeline.record is before
    assert (pipeline.seed, pipeline.data_ratio) == (0, 0.5)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data_ratios": []}, ValueError, "`data_ratios` .*at least one"),
        ({"modes": []}, ValueError, "`modes` .*at least one"),
        ({"prune_ratios": []}, ValueError, "`prune_ratios` .*at least one"),
        ({"seeds": []}, ValueError, "`seeds` .*at least one"),
        ({"data_ratios": [0.5, 0.2, 0.5]}, ValueError, "`data_ratios` .* 0.5 twice"),
        ({"prune_ratios": [0, 0.0]}, ValueError, "`prune_ratios` .* 0.0 twice"),
        ({"seeds": [0, 1, 1]}, ValueError, "`seeds` .* 1 twice"),
        ({"modes": ["low", "low"]}, ValueError, "`modes` .* 'low' twice"),
        ({"data_ratios": [50]}, ValueError, "`data_ratio` .* 50"),
        ({"data_ratios": [0.5, 1.0]}, ValueError, "`data_ratios` .* 1, .* baseline"),
        ({"data_ratios": [0.5, 0.999]}, ValueError, "`data_ratios` .* 0.999, .* 120 of 120"),
        ({"data_ratios": [0.5, 0.501]}, ValueError, "`data_ratios` .* 0.5 and 0.501, .* 60 of 120"),
        ({"data_ratios": [0.01]}, ValueError, "`data_ratio` .* 0.01"),
        ({"data_ratios": 0.5}, TypeError, "`data_ratios` .* list, got 0.5"),
        ({"modes": "low"}, TypeError, "`modes` .* list, got 'low'"),
        ({"modes": ["lowest"]}, ValueError, "`mode` .* 'lowest'"),
        ({"prune_ratios": [0.2, 1.0]}, ValueError, "`prune_ratio` .* 1.0"),
        ({"seeds": [-1]}, ValueError, "`seed` .*-1"),
        ({"seeds": [0.5]}, TypeError, "`seed` .*0.5"),
        ({"controls": ["steps"]}, ValueError, "`controls` .* 'steps'"),
        ({"threads": 0}, ValueError, "`threads` .*0"),
        ({"pipeline": nn.Linear(1, 2)}, TypeError, "`pipeline` .* Linear"),
    ],
    ids=str,
)
def test_wrong_values_are_named(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        grid(**changes)


@pytest.mark.parametrize("name", ["equal_steps", "reinitialize"])
def test_controls_belong_to_the_grid(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`pipeline` .* {name}=True.* controls=\['{name}'\]"):
        grid(drop_hot(**{name: True}))


def test_a_factory_that_gives_the_same_object_twice_is_refused() -> None:
    model = fcnet(in_features=2, hidden=4, num_classes=3)
    with pytest.raises(ValueError, match="the same object twice"):
        grid(drop_hot(model=lambda: model))


def test_progress_without_tqdm_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r'pip install "drophot\[progress\]"'):
        grid().run(tmp_path, progress=True)
    assert list(tmp_path.iterdir()) == [], "before any work"


# --- the store's configuration ----------------------------------------------------------------


@pytest.mark.slow
def test_a_store_can_be_extended(tmp_path: Path) -> None:
    calls = Calls()
    pipeline = drop_hot(score_epochs=2, train_epochs=2, finetune_epochs=1, fit=calls)
    small = grid(pipeline, seeds=[0], modes=["low"], data_ratios=[0.2], prune_ratios=[0.6])
    first = small.run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    larger = grid(pipeline, modes=["low", "random"], controls=["reinitialize"])
    whole = larger.run(tmp_path)
    assert all(record in whole for record in first)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert whole == larger.run(tmp_path / "other")
    calls.sizes.clear()
    assert small.run(tmp_path) == first, "only the cells that were asked for"
    assert calls.sizes == []
    assert len(records.read(tmp_path / "records.jsonl")) == len(whole)


@pytest.mark.parametrize(
    ("changes", "field", "values"),
    [
        ({"batch_size": 8}, "batch_size", "16 there, 8 here"),
        ({"finetune_epochs": 2}, "finetune_epochs", "1 there, 2 here"),
        ({"scope": "global"}, "scope", "'layer' there, 'global' here"),
        ({"protocol": "released"}, "protocol", "'paper' there, 'released' here"),
        ({"optimizer": partial(Adam, lr=0.01)}, "optimizer", "lr 0.02 there, 0.01 here"),
        ({"model": partial(small, hidden=9)}, "model", "hidden 16 there, 9 here"),
        ({"train_set": points(120, 5)}, "train_set", "inputs"),
        ({"test_set": points(60, 5)}, "test_set", "inputs"),
        ({"fit": Calls()}, "fit", "fit' there, .*Calls"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_another_configuration_is_refused_by_the_field_that_differs(
    changes: dict[str, Any], field: str, values: str, held: Path
) -> None:
    same = {"score_epochs": 2, "train_epochs": 2, "finetune_epochs": 1}
    found = records.read(held / "records.jsonl")
    with pytest.raises(ValueError, match=f"another `{field}` in .*{values}.*another folder"):
        grid(drop_hot(**(same | changes)), seeds=[0]).run(held)
    with pytest.raises(ValueError, match=f"another `{field}`"):
        grid(drop_hot(**(same | changes)), seeds=[0]).plan(held)
    assert grid(drop_hot(**same), seeds=[0]).run(held) == found, "nothing was lost"


def test_threads_belong_to_the_configuration(held: Path) -> None:
    with pytest.raises(ValueError, match="another `threads` in .*: 1 there, 2 here"):
        grid(seeds=[0], threads=2).run(held)


def test_test_sets_of_another_size_are_another_configuration(held: Path) -> None:
    same = {"score_epochs": 2, "train_epochs": 2, "finetune_epochs": 1}
    with pytest.raises(ValueError, match=r"`test_set`.* 60 there, 50 here"):
        grid(drop_hot(**same, test_set=points(50, 1)), seeds=[0]).run(held)
    assert TEST.tensors[0].shape == (60, 2)


def test_a_patch_release_takes_the_store_and_another_one_does_not(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = records.read(held / "records.jsonl")
    here = environment.versions()
    major, minor = here["torch"].split(".")[:2]
    for changed in (f"{major}.{minor}.99+cpu", f"{major}.{int(minor) + 1}.0"):
        monkeypatch.setattr(environment, "versions", lambda t=changed: here | {"torch": t})
        if ".99" in changed:
            assert grid(seeds=[0]).run(held) == found
        else:
            with pytest.raises(ValueError, match=rf"`versions`.* torch '{major}.{minor}' there"):
                grid(seeds=[0]).run(held)


def test_each_mode_is_held_against_each_ratio_before_any_work() -> None:
    cut = Stratified(cutoff=0.1)
    settings = {"prune_ratios": [0.5], "seeds": [0]}
    with pytest.raises(ValueError, match=r"cutoff=0.1 and ratio=0.95"):
        Grid(drop_hot(), data_ratios=[0.3, 0.95], modes=["random", cut], **settings)
    # What the pipeline itself would have done does not matter.
    Grid(drop_hot(data_ratio=0.95), data_ratios=[0.3], modes=[cut], **settings)
    Grid(drop_hot(mode=Stratified(cutoff=0.3)), data_ratios=[0.8], modes=["random"], **settings)


@pytest.mark.parametrize(
    "modes",
    [
        ["random", Scored("aum", "random")],
        ["high", Scored("forgetting", "high")],
        [Scored(mode=Stratified(bins=9)), Stratified(bins=9)],
    ],
)
def test_one_mode_under_two_names_is_refused(modes: list[Any]) -> None:
    with pytest.raises(ValueError, match="`modes` .* twice"):
        grid(modes=modes)
