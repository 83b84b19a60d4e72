"""Data and weights together: pruning in step 3, compared with a loop that does so by hand."""

from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.controls import assert_same_weights
from helpers.runs import TEST, TRAIN, drop_hot, small
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.data import Dataset

from drophot import Adaptive, Grid, Masks, Scored, evaluate, report, select, training
from drophot.prune import cubic
from drophot.stats import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*leave no sample of classes")

INPUTS, TARGETS = TRAIN.tensors
ADAM = partial(Adam, lr=0.02, fused=True)  # the arithmetic of drophot's own loop


class Loop:
    """A user's own loop, which keeps the samples of each step, and may stop early."""

    def __init__(self, steps_per_epoch: int | None = None) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.steps: list[Tensor] = []

    def __call__(
        self,
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
        order, device = torch.Generator().manual_seed(seed), torch.device("cpu")
        for epoch in range(epochs):
            model.train()
            found = training.batches(dataset, batch_size, device, shuffle=order)
            for batch in islice(found, self.steps_per_epoch):
                inputs, targets, index, *_ = batch
                self.steps.append(index.clone())
                logits = model(inputs)
                optimizer.zero_grad()
                F.cross_entropy(logits, targets).backward()
                optimizer.step()
                if on_batch is not None:
                    on_batch(index, logits.detach(), targets)
            if on_epoch is not None:
                on_epoch(epoch)


def joint(**changes: Any) -> Any:
    settings = {
        "mode": Adaptive(Scored("el2n"), every=2),
        "schedule": "joint",
        "prunings": 3,
        "prune_ratio": 0.75,
        "data_ratio": 0.4,  # 48 samples, 3 steps
        "train_epochs": 8,
        "optimizer": ADAM,
    }
    return drop_hot(**(settings | changes))


def test_data_and_weights_are_selected_in_turn() -> None:
    loop = Loop()
    run = joint(fit=loop)
    run.select()
    run.train()
    assert len(loop.steps) == 8 * 3

    torch.manual_seed(0)  # by hand: the same network, on the same batches
    model = small()
    optimizer = ADAM(model.parameters())
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    kept = [torch.ones_like(weight) for weight in weights]
    for step, index in enumerate(loop.steps):
        if step and step % (2 * 3) == 0:
            with torch.no_grad():
                errors = (model(INPUTS).softmax(1) - F.one_hot(TARGETS, 3)).norm(dim=1)
            chosen = torch.cat(loop.steps[step : step + 3])
            assert len(chosen.unique()) == 48
            highest = errors[select(errors, 0.4)].sort().values  # of which some are equal
            assert torch.allclose(errors[chosen].sort().values, highest), "by the pruned network"
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS[index]), TARGETS[index]).backward()
        optimizer.step()
        for number, weight in enumerate(weights):
            weight.data *= kept[number]
            if (step + 1) % 6 == 0 and step < 18:
                ratio = cubic(0.75, 3)[step // 6]
                smallest = weight.detach().abs().flatten().argsort(stable=True)
                flat = torch.ones(weight.numel())
                flat[smallest[: int(ratio * weight.numel() + 0.5)]] = 0
                kept[number] = flat.view_as(weight)
                weight.data *= kept[number]
    assert_same_weights(run.model, model)
    assert all(torch.equal(m, k.bool()) for m, k in zip(run.masks.values(), kept, strict=True))
    assert run.trained_accuracy == evaluate(model, TEST)


MODES = ["high", "random", "fresh_subset", "loss_sampling", Adaptive("k_center", every=1)]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("equal_steps", [False, True])
def test_both_ratios_are_reached_in_every_mode(mode: Any, equal_steps: bool) -> None:
    run = joint(mode=mode, equal_steps=equal_steps, scope="global", score_epochs=2)
    record = run.run()
    assert record.schedule == "joint"
    assert record.num_kept == 48
    assert record.trained_accuracy == record.pruned_accuracy, "step 4 removes nothing more"
    assert record.sparsity == run.masks.sparsity == Masks.from_zeros(run.model).sparsity
    assert record.sparsity == pytest.approx(0.75, abs=0.01)
    assert joint(mode=mode, equal_steps=equal_steps, scope="global", score_epochs=2).run() == record


def test_the_prunings_divide_the_training_into_equal_parts() -> None:
    zeros: list[int] = []

    class Watched(Adam):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)
            weights = [p for group in self.param_groups for p in group["params"] if p.dim() > 1]
            zeros.append(sum(int((weight == 0).sum()) for weight in weights))

    for mode in ("random", "fresh_subset", Adaptive("random", every=3)):
        zeros.clear()
        run = joint(mode=mode, optimizer=Watched, equal_steps=True, train_epochs=3)
        run.select()
        run.train()
        ratios, sizes = (0.0, *cubic(0.75, 3)), [mask.numel() for mask in run.masks.values()]
        assert len(zeros) == (steps := 3 * ceil(120 / 16))
        assert zeros == [
            sum(int(ratios[step // (steps // 4)] * size + 0.5) for size in sizes)
            for step in range(steps)
        ], "the same in every mode"


def test_without_fine_tuning_and_with_the_first_weights() -> None:
    plain = joint(finetune_epochs=0)
    record = plain.run()
    assert record.finetuned_accuracy == record.pruned_accuracy == record.trained_accuracy
    ticket = joint(finetune_epochs=0, rewind=True)
    ticket.run()
    torch.manual_seed(0)
    start = small()
    for name, weight in start.named_parameters():
        mask = plain.masks.get(name, torch.ones_like(weight))
        assert torch.equal(ticket.model.get_parameter(name), weight * mask)


def large_is_unimportant(name: str, weight: Tensor) -> Tensor:
    return -weight.abs()


def test_an_own_importance_decides_what_is_removed() -> None:
    own, plain = joint(importance=large_is_unimportant), joint()
    for run in (own, plain):
        assert run.run().sparsity == pytest.approx(0.75, abs=0.01)
    weights = [run.model.state_dict() for run in (own, plain)]
    largest = [max(float(weight.abs().max()) for weight in one.values()) for one in weights]
    assert largest[0] < largest[1]


def test_a_users_own_loop_prunes_as_drophots_own() -> None:
    for mode in ("random", Adaptive("high", every=2)):
        own, library = (joint(mode=mode, equal_steps=True, **fit) for fit in ({"fit": Loop()}, {}))
        assert own.run().finetune_curve == library.run().finetune_curve
        assert_same_weights(own.model, library.model)


def test_a_grid_compares_it_with_fresh_subsets(tmp_path: Path) -> None:
    modes = [Adaptive("high", every=2), "fresh_subset"]
    pipeline = drop_hot(train_epochs=4, finetune_epochs=1, score_epochs=4, prunings=3)
    grid = Grid(
        pipeline,
        data_ratios=[0.4],
        modes=modes,
        prune_ratios=[0.5, 0.8],
        seeds=[0, 1],
        controls=["equal_steps", "joint"],
    )
    found = grid.run(tmp_path)
    torch.set_num_threads(1)
    for mode in modes:
        for equal in (False, True):
            for schedule in ("one-shot", "joint"):
                settings = {"schedule": schedule, "equal_steps": equal, "mode": mode}
                settings |= {"prune_ratio": 0.8, "data_ratio": 0.4, "seed": 1}
                alone = pipeline.replace(**settings).run()
                assert [record for record in found if record == alone] == [alone], settings
    baselines = [r for r in found if (r.mode, r.prune_ratio, r.seed) == ("baseline", 0.8, 1)]
    assert {record.schedule for record in baselines} == {"one-shot", "joint"}
    whole = pipeline.replace(
        mode="random", data_ratio=1.0, schedule="joint", prune_ratio=0.8, seed=1
    ).run()
    assert whole in baselines
    together = [r for r in found if r.schedule == "joint" and r.mode != "baseline"]
    assert len(together) == 2 * 2 * 2 * 2
    assert len({record.fingerprint for record in found}) == len(found)

    for path in list((tmp_path / "stages").iterdir()):
        if "joint" in path.name and "finetune" in path.name:
            path.unlink()
    (tmp_path / "records.jsonl").unlink()
    assert grid.run(tmp_path) == found, "from the masks in the store"
    assert "joint" in report.table(found)
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    differences = compare(found, against="fresh_subset")
    assert any(one.schedule == "joint" for one in differences)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prunings": 24}, "`prunings`.* 24, got 24"),
        ({"train_epochs": 0}, "`prunings`.* 0, got 3"),
        ({"structured": True}, "structured.*schedule='joint'"),
        ({"protocol": "released-masks", "mode": "high"}, "released-masks.*schedule='joint'"),
    ],
)
def test_what_does_not_go_together_is_named(change: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        joint(**change)


def test_prunings_need_steps_on_the_smallest_coreset_of_a_grid() -> None:
    pipeline = drop_hot(train_epochs=1, prunings=5)
    grid: Any = {"seeds": [0], "modes": ["random"], "prune_ratios": [0.5], "controls": ["joint"]}
    Grid(pipeline, data_ratios=[0.8], **grid)
    with pytest.raises(ValueError, match="`prunings`.* 1, got 5"):
        Grid(pipeline, data_ratios=[0.1, 0.8], **grid)


def test_a_model_of_the_users_own_has_no_masks() -> None:
    run = joint()
    run.select()
    run.model = small()
    with pytest.raises(RuntimeError, match=r"schedule=.joint.*run\.masks"):
        run.prune()


def test_a_loop_that_takes_too_few_steps_is_refused() -> None:
    run = joint(mode="random", fit=Loop(1), prunings=12)
    run.select()
    with pytest.raises(RuntimeError, match="`fit`.*24 times.*joint.* 12, got 8"):
        run.train()


def test_own_masks_are_applied_in_step_4() -> None:
    run = joint()
    run.select()
    run.model = small()
    name, weight = next(iter(run.model.named_parameters()))
    run.masks = Masks(run.model, {name: torch.arange(weight.numel()).view_as(weight) % 4 == 0})
    run.prune()
    assert int(weight.count_nonzero()) == weight.numel() // 4
    assert run.pruned_accuracy == evaluate(run.model, TEST)
