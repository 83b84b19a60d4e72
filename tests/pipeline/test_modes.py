"""Every selector as a mode of the pipeline and of a grid: one door, and what it is wired to."""

import json
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.runs import TRAIN, drop_hot, small
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset

from drophot import (
    Adaptive,
    AdaptiveSubset,
    CrestLoader,
    Grid,
    Scored,
    Stratified,
    features,
    fit,
    report,
    select,
    training,
)
from drophot import coreset as coresets
from drophot._core.mode_names import SAMPLING_MODES, FeatureMode
from drophot.grid.stages import stage_of
from drophot.pipeline import step_3_batches
from drophot.settings.names import name_of as name
from drophot.settings.names import needs_scoring
from drophot.tracking import DUAL, TDDS
from drophot.tracking.dynamics import Statistic

FEATURE_MODES = get_args(FeatureMode)

pytestmark = pytest.mark.filterwarnings("ignore:.*leave no sample of classes")

TARGETS = TRAIN.tensors[1]
STRATEGIES = [
    Stratified(),
    Scored("el2n"),
    Scored("aum", Stratified(hard="low", cutoff=0.1)),
    Scored("forgetting", "low", balanced=True),
]
ADAPTIVE = [
    Adaptive("high", every=1),
    Adaptive("k_center", every=1),
    Adaptive(Scored("el2n", balanced=True), every=1),
]
WHILE_TRAINING = [*SAMPLING_MODES, *ADAPTIVE]
BY_CLASS = Scored(mode="random", balanced=True)
MODES = ["high", "low", "random", BY_CLASS, *FEATURE_MODES, *WHILE_TRAINING, *STRATEGIES]
each = pytest.mark.parametrize("mode", MODES, ids=name)


@each
def test_every_mode_takes_the_five_steps(mode: Any) -> None:
    run = drop_hot(mode=mode, score_epochs=3)
    record = run.run()
    assert (record.mode, record.num_kept, record.keep_ratio) == (name(mode), 60, 0.5)
    assert record.trained_accuracy > 0.3
    assert record.sparsity == pytest.approx(0.6, abs=0.02)
    assert len(run.indices) == (120 if mode in WHILE_TRAINING else 60)
    held = record.indices()
    assert (held is None) == (mode in WHILE_TRAINING)
    assert held is None or held.tolist() == sorted(run.indices.tolist())
    assert drop_hot(mode=mode, score_epochs=3).run() == record, "one seed gives one record"
    assert ("score" in record.seconds) == (mode not in ("random", BY_CLASS, *WHILE_TRAINING))
    assert needs_scoring(mode) == needs_scoring(name(mode)) == ("score" in record.seconds)
    json.dumps(run.configuration)


@each
def test_everything_kept_is_the_baseline(mode: Any) -> None:
    if isinstance(mode, Scored) and not isinstance(mode.mode, str):
        mode = Scored("aum", Stratified(hard="low"))
    record = drop_hot(mode=mode, data_ratio=1.0).run()
    assert (record.mode, record.num_kept) == ("baseline", 120)


@pytest.mark.parametrize("statistic", get_args(Statistic))
@pytest.mark.parametrize("forgetting", ["paper", "toneva"])
def test_a_scored_mode_goes_by_that_score(statistic: Any, forgetting: Any) -> None:
    run = drop_hot(mode=Scored(statistic, "low"), forgetting=forgetting)
    scores = run.score()
    word = {"paper": "zero", "toneva": "hardest"}[forgetting]
    expected = run.tracker.scores(word if statistic == "forgetting" else statistic)
    assert torch.equal(scores, expected)
    assert torch.equal(run.select(), select(expected, 0.5, "low"))
    epochs = run.tracker.presentations
    assert (epochs == 6).all()


def test_the_long_form_of_high_is_high() -> None:
    long, short = (drop_hot(mode=mode) for mode in (Scored(), "high"))
    assert long.run().trained_accuracy == short.run().trained_accuracy
    assert torch.equal(long.indices, short.indices)
    torch.testing.assert_close(long.model.state_dict(), short.model.state_dict(), rtol=0, atol=0)


def test_balanced_keeps_each_classs_share() -> None:
    run = drop_hot(mode=Scored("loss", "high", balanced=True))
    scores = run.score()
    assert torch.equal(run.select(), select(scores, 0.5, targets=TARGETS))
    assert not torch.equal(run.indices, select(scores, 0.5))


def test_random_class_by_class_needs_no_score_and_keeps_each_classs_share() -> None:
    run = drop_hot(mode=BY_CLASS)
    record = run.run()
    assert "score" not in record.seconds
    assert record.mode == "random-balanced"
    expected = select(torch.zeros(120), 0.5, "random", targets=TARGETS)
    assert torch.equal(run.indices, expected)


def test_stratified_is_handed_on() -> None:
    mode = Stratified(bins=4, cutoff=0.2)
    run = drop_hot(mode=mode)
    scores = run.score()
    assert torch.equal(run.select(), select(scores, 0.5, mode))


@pytest.mark.parametrize("mode", FEATURE_MODES)
def test_features_are_those_of_step_1s_network_class_by_class(mode: Any) -> None:
    run = drop_hot(mode=mode)
    with pytest.raises(RuntimeError, match="needs a trained scoring network: call `run.score"):
        run.select()
    run.score()
    kind = "error" if mode == "facility_location" else "penultimate"
    vectors = features(run.scorer, TRAIN, kind)
    selector = getattr(coresets, mode)
    assert torch.equal(run.select(), selector(vectors, 0.5, targets=TARGETS).indices)


class Steps(Adam):
    """Counts its steps."""

    taken = 0

    def step(self, closure: Any = None) -> Any:
        type(self).taken += 1
        return super().step(closure)


@pytest.mark.parametrize("mode", ["random", *WHILE_TRAINING])
@pytest.mark.parametrize("equal_steps", [False, True])
def test_a_mode_that_chooses_while_it_trains_costs_what_a_coreset_costs(
    mode: Any, equal_steps: bool
) -> None:
    run = drop_hot(mode=mode, data_ratio=0.3, equal_steps=equal_steps, optimizer=Steps)
    run.select()
    Steps.taken = 0
    run.train()
    steps = 3 * ceil(36 / 16)
    assert Steps.taken == (3 * ceil(120 / 16) if equal_steps else steps)


def seen_by(mode: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The batches that step 3 trains on."""
    found: list[list[Any]] = []

    def spying(model: nn.Module, dataset: Any, epochs: int, **rest: Any) -> None:
        class Seen:
            def __iter__(self) -> Any:
                for batch in dataset:
                    found.append(list(batch))
                    yield batch

        fit(model, Seen(), epochs, **rest)

    run = drop_hot(mode=mode, data_ratio=0.3, fit=spying)
    run.select()
    run.train()
    return found


def test_fresh_subsets_are_other_ones_in_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = seen_by("fresh_subset", monkeypatch)
    epochs = [torch.cat([b[2] for b in batches[i : i + 3]]) for i in (0, 3, 6)]
    assert [len(epoch.unique()) for epoch in epochs] == [36, 36, 36]
    assert len({frozenset(epoch.tolist()) for epoch in epochs}) == 3
    assert all(len(batch) == 3 for batch in batches), "no weights"


def test_loss_sampling_weighs_and_sees_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = seen_by("loss_sampling", monkeypatch)
    first = torch.cat([batch[3] for batch in batches[:3]])
    assert first.unique().tolist() == pytest.approx([120 / 36]), "nothing is known yet"
    last = torch.cat([batch[3] for batch in batches[-3:]])
    assert len(last.unique()) == 2
    assert 1 in last
    assert last.sum() == pytest.approx(120, rel=1e-4)


def test_crest_gives_its_own_weighted_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CrestLoader] = []
    monkeypatch.setattr(
        step_3_batches,
        "CrestLoader",
        lambda *a, **k: made.append(CrestLoader(*a, **k)) or made[-1],
    )
    batches = seen_by("crest", monkeypatch)
    assert len(batches) == 9
    assert all(len(batch) == 4 for batch in batches)
    (loader,) = made
    assert loader.batch_size == 16
    assert loader.selections >= 1
    assert loader.model is not None


class NoLinearEnd(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 3), nn.Tanh())


class Named:
    needs = ()

    def __init__(self, name: str) -> None:
        self.name, self.power = name, 1.0

    def select(self, ratio: float, evidence: Any, seed: int) -> Tensor:
        self.power += 1
        return torch.arange(60)


def test_an_own_selector_that_changes_itself_is_refused_while_it_trains_too() -> None:
    with pytest.raises(ValueError, match="`mode`.*adaptive1-mine"):
        drop_hot(mode=Adaptive(Named("mine"), every=1)).run()


def test_what_does_not_go_together_is_named() -> None:
    with pytest.raises(ValueError, match="`mode` .*high.*k_center.*'medium'"):
        drop_hot(mode="medium")
    with pytest.raises(ValueError, match="`mode` .*<function select"):
        drop_hot(mode=select)
    with pytest.raises(ValueError, match="cutoff=0.6 and ratio=0.5"):
        drop_hot(mode=Stratified(cutoff=0.6))
    with pytest.raises(ValueError, match="cutoff=0.6 and ratio=0.5"):
        drop_hot(mode=Scored("aum", Stratified(cutoff=0.6)))
    with pytest.raises(ValueError, match="released.*mode='k_center'"):
        drop_hot(mode="k_center", protocol="released")
    with pytest.raises(ValueError, match="released.*mode='el2n-high'"):
        drop_hot(mode=Scored("el2n"), protocol="released")
    for mode in ("crest", Adaptive("high", every=2)):
        with pytest.raises(ValueError, match=f"`mode` .*'{name(mode)}'.*while step 3 trains"):
            Adaptive(mode, every=5)
    with pytest.raises(ValueError, match="`mode` .*'crest'.*\"facility_location\""):
        Adaptive("crest", every=5)
    with pytest.raises(ValueError, match="`mode` .*'medium'"):
        Adaptive("medium", every=5)
    with pytest.raises(ValueError, match="`every`.* 0"):
        Adaptive("high", every=0)
    with pytest.raises(ValueError, match="cutoff=0.6 and ratio=0.5"):
        drop_hot(mode=Adaptive(Stratified(cutoff=0.6), every=5))
    with pytest.raises(ValueError, match="`mode=.k_center.`"):
        drop_hot(mode=Adaptive("k_center", every=5), model=NoLinearEnd)
    with pytest.raises(ValueError, match="released.*mode='adaptive5-el2n-high'"):
        drop_hot(mode=Adaptive(Scored("el2n"), every=5), protocol="released")
    with pytest.raises(ValueError, match="adaptive5-high.*library"):
        drop_hot(mode=Named("adaptive5-high"))
    for own in (DUAL(window=7, until=None), TDDS(num_classes=3, window=7)):
        longer = Scored(own)
        run = drop_hot(mode=longer, score_epochs=6)
        for begin in (run.run, run.score):
            with pytest.raises(ValueError, match=f"`score_epochs` .*7.*'{own.name}'.* 6"):
                begin()
        assert drop_hot(mode=longer, score_epochs=7).score().isfinite().all()
        lists = {"data_ratios": [0.5], "prune_ratios": [0], "seeds": [0]}
        with pytest.raises(ValueError, match=f"`score_epochs` .*7.*'{own.name}'.* 6"):
            Grid(drop_hot(score_epochs=6), modes=["high", longer], **lists)
        with pytest.raises(ValueError, match=f"`mode` .*'{own.name}' needs 7"):
            Adaptive(longer, every=5)
        with pytest.raises(ValueError, match=f"`mode` .*'{own.name}' needs 7"):
            AdaptiveSubset(TRAIN, small(), 0.5, longer, every=5)
    with pytest.raises(ValueError, match="`statistic` .*'el3n'"):
        Scored("el3n")
    with pytest.raises(ValueError, match="`mode` .*middle"):
        Scored("el2n", "middle")


@pytest.mark.parametrize(
    ("every", "epochs", "ratio", "equal", "found"),
    [
        (3, 3, 0.5, False, 3),
        (5, 3, 0.5, False, 3),
        (1, 1, 0.5, False, 1),
        (6, 3, 0.5, True, 6),  # 24 steps, of which 4 are an epoch of 60 samples
        (4, 3, 0.8, True, 4),  # 24 steps, of which 6 are an epoch of 96 samples
    ],
)
def test_an_adaptive_mode_that_would_not_be_used_is_refused(
    every: int, epochs: int, ratio: float, equal: bool, found: int
) -> None:
    lengths = {"train_epochs": epochs, "data_ratio": ratio, "equal_steps": equal}
    run = drop_hot(**lengths)
    for mode in ("high", "random"):
        with pytest.raises(ValueError, match=rf"`every`.*{mode}'.* {found}, got {every}") as caught:
            run.replace(mode=Adaptive(mode, every=every))
        assert ("lower `every`" in str(caught.value).lower()) == (found > 1)
        assert ("equal_steps" in str(caught.value)) == (not equal and every < 6)
    mode = Adaptive("high", every=every)
    for longer in ({"train_epochs": epochs + every}, {"data_ratio": 1.0}, {"train_epochs": 0}):
        assert drop_hot(mode=mode, **(lengths | longer)).mode == mode
    with pytest.raises(ValueError, match="`every`"):
        drop_hot(mode=mode, **lengths)


def test_a_window_longer_than_step_1_matters_only_where_its_score_is_used() -> None:
    longer = Scored(DUAL(window=7, until=None))
    run = drop_hot(mode=longer, score_epochs=6)
    run.scores = torch.arange(len(TRAIN)).float()
    record = run.run()
    assert record.num_kept == len(TRAIN) // 2
    assert run.tracker is None, "step 1 was not taken"
    whole = drop_hot(mode=longer, score_epochs=6, data_ratio=1.0).run()
    assert whole.num_kept == len(TRAIN)


# --- a user's own training loop ----------------------------------------------------------------


def own_fit(
    model: nn.Module,
    dataset: Dataset[Any],
    epochs: int,
    *,
    optimizer: Any,
    batch_size: int,
    seed: int,
    on_batch: Any,
    on_epoch: Any,
) -> None:
    """As the manual writes it: one loop for datasets and for loaders."""
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for inputs, targets, *more in training.batches(
            dataset, batch_size, torch.device("cpu"), shuffle=order
        ):
            logits = model(inputs)
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")
            mean = (losses * more[1]).mean() if len(more) == 2 else losses.mean()
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            if on_batch is not None:
                on_batch(more[0], logits.detach(), targets)
        if on_epoch is not None:
            on_epoch(epoch)


@each
@pytest.mark.parametrize("equal_steps", [False, True])
def test_a_users_own_loop_trains_in_every_mode_as_drophots_own(
    mode: Any, equal_steps: bool
) -> None:
    def weights(**fit: Any) -> list[Any]:
        adam = partial(Adam, lr=0.02, fused=True)
        run = drop_hot(
            mode=mode,
            score_epochs=2,
            data_ratio=0.55,  # of which equal steps are no whole epochs
            optimizer=adam,
            equal_steps=equal_steps,
            **fit,
        )
        run.run()
        return [*run.model.state_dict().values(), run.indices]

    torch.testing.assert_close(weights(fit=own_fit), weights(), rtol=0, atol=0)


def by_position(model: nn.Module, dataset: Any, epochs: int, **rest: Any) -> None:
    """Reads its samples one by one."""
    fit(model, [dataset[i] for i in range(len(dataset))], epochs, **rest)


def by_data_loader(model: nn.Module, dataset: Any, epochs: int, **rest: Any) -> None:
    fit(model, DataLoader(dataset, 16, shuffle=True), epochs, **rest)


@pytest.mark.parametrize("mode", WHILE_TRAINING)
@pytest.mark.parametrize("wrong", [by_position, by_data_loader])
def test_a_loop_that_takes_a_loader_for_a_dataset_is_told(mode: Any, wrong: Any) -> None:
    run = drop_hot(mode=mode, fit=wrong)
    run.select()
    with pytest.raises(TypeError, match=r"`dataset` is a loader.*drophot\.training\.batches"):
        run.train()
    drop_hot(mode="random", fit=wrong).run()


def test_a_loop_that_reports_no_losses_is_refused_where_these_choose() -> None:
    def silent(*arguments: Any, on_batch: Any, **rest: Any) -> None:
        fit(*arguments, **rest)

    drop_hot(mode="fresh_subset", fit=silent).run()
    with pytest.raises(RuntimeError, match="`fit`.*on_batch.*loss_sampling"):
        drop_hot(mode="loss_sampling", fit=silent).run()


def test_options_of_fit_go_with_every_mode_by_partial() -> None:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    for mode in ("high", *WHILE_TRAINING):
        found = drop_hot(mode=mode, fit=partial(fit, loss=loss)).run()
        assert found.trained_accuracy > 0.3
        assert found != drop_hot(mode=mode).run()
    with pytest.raises(ValueError, match='`loss`.*reduction="none"'):
        drop_hot(mode="crest", fit=partial(fit, loss=nn.CrossEntropyLoss())).run()


@each
def test_a_mode_has_a_name_that_a_file_can_have(mode: Any) -> None:
    assert set(name(mode)) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    assert len({name(mode) for mode in MODES}) == len(MODES)


@pytest.mark.parametrize("mode", WHILE_TRAINING)
def test_everything_is_the_baseline_for_what_chooses_while_it_trains_too(mode: Any) -> None:
    found = drop_hot(mode=mode, data_ratio=1.0).run()
    plain = drop_hot(mode="random", data_ratio=1.0).run()
    assert (found.mode, found.trained_accuracy) == ("baseline", plain.trained_accuracy)
    assert found.finetune_curve == plain.finetune_curve


@pytest.mark.slow
def test_a_grid_holds_all_modes_and_its_records_are_the_pipelines(tmp_path: Path) -> None:
    pipeline = drop_hot(score_epochs=2, train_epochs=2, finetune_epochs=1)
    grid = Grid(pipeline, data_ratios=[0.3], modes=MODES, prune_ratios=[0.6], seeds=[1])
    found = grid.run(tmp_path / "store")
    assert [r.mode for r in found] == ["baseline", "baseline", *map(name, MODES)]
    torch.set_num_threads(1)
    for record, mode in zip(found[2:], MODES, strict=True):
        alone = pipeline.replace(mode=mode, data_ratio=0.3, prune_ratio=0.6, seed=1).run()
        assert record == alone, name(mode)
        assert record.fingerprint == alone.fingerprint
    assert len({r.fingerprint for r in found}) == len(found)
    again = grid.run(tmp_path / "store")
    assert again == found
    assert "k_center" in report.table(found)
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    assert "| crest " in report.differences([*found, *_other_seed(found)])


def _other_seed(found: list[Any]) -> list[Any]:
    from dataclasses import replace

    return [
        replace(r, seed=r.seed + 1, trained_accuracy=0.5, finetuned_accuracy=0.5) for r in found
    ]


def test_a_grid_whose_scoring_is_no_baseline_has_its_network_for_the_features(
    tmp_path: Path,
) -> None:
    pipeline = drop_hot(score_epochs=3, train_epochs=2, finetune_epochs=1)
    grid = Grid(pipeline, data_ratios=[0.3], modes=["k_center"], prune_ratios=[0.6], seeds=[0])
    *_, record = grid.run(tmp_path)
    torch.set_num_threads(1)
    assert record == pipeline.replace(mode="k_center", data_ratio=0.3).run()


def test_what_chooses_while_it_trains_waits_for_nothing() -> None:
    settings = drop_hot(data_ratio=0.3).config.settings
    for mode in ("random", BY_CLASS, *WHILE_TRAINING):
        assert stage_of({"mode": mode}, settings, kind="train").predecessor is None
    for mode in ("high", *FEATURE_MODES, *STRATEGIES):
        need = stage_of({"mode": mode}, settings, kind="train").predecessor
        assert need is not None
        assert need == stage_of({}, settings, kind="score")


@pytest.mark.slow
def test_a_page_and_figures_of_many_modes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pipeline = drop_hot(score_epochs=2, train_epochs=2, finetune_epochs=1)
    grid = Grid(pipeline, data_ratios=[0.3, 0.5], modes=MODES, prune_ratios=[0.6], seeds=[0])
    found = grid.run(tmp_path / "store")
    ax = report.plot_ratios([r for r in found if r.prune_ratio == 0.6])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == sorted(["baseline", *map(name, MODES)])
    looks = {
        (line.get_marker(), line.get_color())
        for line in ax.get_lines()
        if len(line.get_xdata()) == 2
    }
    assert len(looks) >= len(MODES), "no two look alike"
    page = report.html(tmp_path / "store", tmp_path / "report.html").read_text()
    assert all(name(mode) in page for mode in MODES)


def test_scores_of_ones_own_serve_any_scored_mode() -> None:
    run = drop_hot(mode=Scored("aum", Stratified(hard="low")))
    run.scores = torch.arange(120.0)
    assert torch.equal(run.select(), select(run.scores, 0.5, Stratified(hard="low")))
    with pytest.raises(RuntimeError, match="`statistic` needs a tracker"):
        run.statistic("aum")


def test_data_that_is_not_in_memory_can_be_balanced_and_covered() -> None:
    class Lazy(Dataset[Any]):
        def __len__(self) -> int:
            return 120

        def __getitem__(self, place: int) -> tuple[Tensor, int]:
            torch.rand(1)  # as augmentation would
            return TRAIN.tensors[0][place], int(TARGETS[place])

    for mode in (Scored("loss", balanced=True), "k_center", "crest", "loss_sampling"):
        run = drop_hot(mode=mode, train_set=Lazy(), score_epochs=1)
        run.run()
        if mode not in WHILE_TRAINING:
            counts = TARGETS[run.indices].bincount()
            assert (counts - TARGETS.bincount() / 2).abs().max() < 1
