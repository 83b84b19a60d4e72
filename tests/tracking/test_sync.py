"""Several processes, with the environment of torchrun, against one that saw everything."""

import re
from typing import Any

import pytest
import torch
from helpers import ranks as worker
from helpers.one_process import assert_same
from helpers.processes import ranks

from drophot import DynamicsTracker, ForgettingTracker


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank has at the end of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks(request.param, worker.main, folder, folder=folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def replayed(kind: str, name: str, ranks: int, interleaved: bool = False) -> dict[str, Any]:
    """One process that saw everything: rank after rank, or step by step."""
    size, parts = worker.CASES[name]
    tracker = worker.TRACKERS[kind](size)
    for part in zip(*(parts(rank, ranks) for rank in range(ranks)), strict=True):
        batches = [(step, rank) for rank in range(ranks) for step in range(len(part[rank]))]
        for step, rank in sorted(batches) if interleaved else batches:
            tracker.update(*part[rank][step])
    return worker.last(tracker.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), worker.RUNS)
def test_ranks_equal_one_process_that_saw_everything(found: Any, kind: str, name: str) -> None:
    # A sample that two ranks have seen is put together from both, in the last digits of floats.
    digits = 0.0 if name in ("even", "beyond float") else 1e-5
    expected = replayed(kind, name, len(found))
    assert expected["history"].sum() > 0
    for rank in found:
        assert_same(rank[f"{kind}, {name}"], expected, digits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["even", "padded", "fewer samples than ranks"])
def test_distributed_sampler_pads_in_the_order_of_the_steps_too(found: Any, name: str) -> None:
    assert_same(
        found[0][f"forgetting, {name}"],
        replayed("forgetting", name, len(found), interleaved=True),
        0.0,
    )


def test_the_cases_are_hard_enough() -> None:
    """Counts simply added over ranks would be wrong in each, and some samples repeat."""
    for name in ("padded", "chance"):
        size, parts = worker.CASES[name]
        alone = 0
        for rank in range(2):
            tracker = ForgettingTracker(size)
            for seen in parts(rank, 2):
                for batch in seen:
                    tracker.update(*batch)
            alone += tracker.counts
        whole = ForgettingTracker(size)
        whole.load_state_dict(replayed("forgetting", name, 2))
        assert (alone != whole.counts).any(), name
    assert whole.presentations.unique().numel() > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forgetting", "dynamics"])
def test_a_restart_on_several_ranks(found: Any, kind: str) -> None:
    for rank in found:
        assert_same(rank[f"{kind}, restarted"], found[0][f"{kind}, padded"], 0.0)


@pytest.mark.slow
def test_a_loop_that_knows_nothing_of_indices_under_ddp(found: Any) -> None:
    for rank in found:
        assert_same(rank["watched"]["tracker"], rank["trained"]["tracker"], 0.0)
        for one, other in zip(rank["watched"]["weights"], rank["trained"]["weights"], strict=True):
            assert torch.equal(one, other)
    tracker = DynamicsTracker(53)
    tracker.load_state_dict(found[0]["watched"]["tracker"])
    assert tracker.presentations.sum() == 3 * -(-53 // len(found)) * len(found)
    assert tracker.presentations.min() == 3


@pytest.mark.slow
def test_ranks_that_share_a_batch_count_it_once(found: Any) -> None:
    tracker = DynamicsTracker(8)
    for epoch in range(3):
        for part in range(len(found) // 2):
            tracker.update(*worker.batch(range(part, 8, len(found) // 2), 10 * epoch + part))
    for rank in found:
        assert_same(rank["shared"], tracker.state_dict(), 0.0)


@pytest.mark.slow
def test_distributed_checkpoint_takes_the_tracker(found: Any) -> None:
    for rank in found:
        assert_same(rank["checkpointed"]["loaded"], found[0]["checkpointed"]["saved"], 0.0)
        assert rank["checkpointed"]["loaded"]["history"].count_nonzero() == 2 * len(found) + 1


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_is_an_error_on_all(found: Any) -> None:
    for number, rank in enumerate(found):
        errors = rank["errors"]
        assert re.search("RuntimeError.*`sync`.* 1 samples", errors["unsynced"])
        assert errors["scores"] == str([int(i == number) for i in range(10)]), "its own view"
        assert re.search(
            "`targets`.*sample 4 with target (0.* 1|1.* 0) .*IndexedDataset", errors["targets"]
        )
        assert errors["targets left"] == str([0, 0, 0, 0, 1, 0, 0, 0, 0, 0])
        assert re.search("`update_loss`.*sample 4 by both", errors["loss and logits"])
        assert re.search(r"num_samples.*\[10, 11", errors["sizes"])
        assert re.search(r"columns.*\[4, 1", errors["kinds"])
        mine = r"`index`.*\[0, 10\).*50" if number == 1 else r"[Rr]anks \[1\]"
        assert re.search(mine, errors["fault"])
        assert "started from" in errors["past"]
        if number != 1:
            assert "`group`" in errors["not a member"]
        assert errors["alone before"] == str([len(found) * (i == 6) for i in range(10)])
        assert "`init_process_group`" in errors["loaded before"]
        assert errors["in place"] == "True", "a captured graph writes where it wrote before"
        assert errors["afterwards"] == str([int(i < len(found)) for i in range(10)])


def test_in_one_process_sync_raises_what_a_step_could_not() -> None:
    tracker = ForgettingTracker(4)
    unchecked = torch.compile(tracker.update, fullgraph=True, backend="eager")
    unchecked(torch.tensor([0, 9]), torch.zeros(2, 3), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="`index`.*9"):
        tracker.sync()


def test_one_process_needs_no_sync() -> None:
    tracker, plain = DynamicsTracker(20), DynamicsTracker(20)
    for seen in worker.by_chance(0, 1):
        for batch in seen:
            tracker.update(*batch)
            plain.update(*batch)
        tracker.sync()
    assert_same(tracker.state_dict(), plain.state_dict(), 0.0)
