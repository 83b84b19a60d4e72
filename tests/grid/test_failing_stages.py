"""A stage that fails stops no other; what stops everything says which stage it was."""

import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import pytest
from helpers.executors import (
    STAGES,
    AwkwardError,
    Backwards,
    Noting,
    Promise,
    Watching,
    of_any_fit,
    quick_pool,
    stamps,
    tiniest,
    tiny,
)
from torch import nn

from drophot import Record, fit, records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with quick_pool() as executor:
        yield executor


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What the tiny grid gives where nothing fails."""
    return tiny().run(tmp_path_factory.mktemp("here"))


FAILED = [
    f"finetune-seed1-{mode}-keep{ratio}-prune{p}.json"
    for mode, ratio in [
        ("baseline", 1.0),
        *((m, r) for r in (0.2, 0.5) for m in ("high", "random")),
    ]
    for p in ([0.0, 0.8] if mode == "baseline" else [0.8])
]


@pytest.mark.parametrize(
    ("kind", "fault", "raised"),
    [
        ("here", "raise", FloatingPointError),
        ("here", "awkward", AwkwardError),
        ("backwards", "raise", FloatingPointError),
        ("processes", "raise", FloatingPointError),
        ("processes", "awkward", RuntimeError),
    ],
)
def test_a_stage_that_raises_stops_no_other(
    kind: str,
    fault: str,
    raised: type[Exception],
    pool: ProcessPoolExecutor,
    reference: list[Record],
    tmp_path: Path,
) -> None:
    noting = Noting(tmp_path)
    grid, store = tiny(fit=noting), tmp_path / "store"
    (tmp_path / "fault").write_text(fault)
    executor = {"here": None, "backwards": Backwards(2), "processes": pool}[kind]
    watching = executor and Watching(executor)
    with pytest.raises(raised, match="as if") as caught:
        grid.run(store, watching)
    notes = "\n".join(caught.value.__notes__)
    assert all(name in notes for name in FAILED)
    assert not re.search("finetune-seed0|train-|score-", notes)
    assert str(store) in notes
    kept = stamps(store)
    assert len(kept) == STAGES - len(FAILED)
    assert not kept.keys() & set(FAILED)
    assert [record.seed for record in records.read(store / "records.jsonl")] == 6 * [0]

    (tmp_path / "fault").unlink()
    before = len(noting.notes)
    found = grid.run(store, executor)
    assert len(noting.notes) - before == len(FAILED)
    assert of_any_fit(found) == of_any_fit(reference)
    assert kept.items() <= stamps(store).items()


def test_what_needs_a_stage_that_failed_is_left_out(tmp_path: Path) -> None:
    """The scoring of one seed: its modes by score and its baseline, and nothing else."""

    def failing(model: nn.Module, data: Any, epochs: int, *, seed: int, **how: Any) -> None:
        if seed == 2 and len(data) == 200:  # a scoring draws from twice the seed
            raise FloatingPointError("as if")
        fit(model, data, epochs, seed=seed, **how)

    with pytest.raises(FloatingPointError) as caught:
        tiny(fit=failing).run(tmp_path)
    notes = "\n".join(caught.value.__notes__)
    assert "score-seed1.pt" in notes
    kept = stamps(tmp_path)
    assert {name for name in kept if "seed1" in name and "random" not in name} == set()
    assert len(kept) == STAGES - (1 + 2 + 2 * 2)


@pytest.mark.parametrize(("fault", "raised"), [("interrupt", KeyboardInterrupt), ("full", OSError)])
def test_what_had_not_begun_is_cancelled(
    fault: str, raised: type[BaseException], tmp_path: Path
) -> None:
    """By what would stop everything else too."""
    (tmp_path / "fault").write_text(fault)
    watching = Watching(Backwards())
    with pytest.raises(raised):
        tiny(fit=Noting(tmp_path)).run(tmp_path / "store", watching)
    good = {name for name, f in watching.futures.items() if f in watching.good()}
    cancelled = {name for name, future in watching.futures.items() if future.cancelled()}
    assert stamps(tmp_path / "store").keys() == good
    assert len(cancelled) > 1
    assert len(watching.futures) <= len(cancelled) + len(good) + 1


def test_a_loop_that_no_stage_can_use_is_called_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def silent(model: nn.Module, data: Any, epochs: int, **how: Any) -> None:
        calls.append(epochs)

    with pytest.raises(RuntimeError, match="`fit`") as caught:
        tiny(fit=silent).run(tmp_path)
    assert calls == [3]
    assert "score-seed0.pt" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("given", [None, "nothing", Promise(lambda: None)])
def test_an_executor_that_gives_no_results(given: Any, tmp_path: Path) -> None:
    class Forgetful:
        def submit(self, *_: Any) -> Any:
            return given

    with pytest.raises(TypeError, match="`executor` .* Forgetful"):
        tiniest().run(tmp_path, Forgetful())


def test_futures_that_can_be_waited_for_are_not_looked_at_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []
    done = Future.done
    monkeypatch.setattr(Future, "done", lambda self: (looks.append(self), done(self))[1])

    def slow(model: nn.Module, data: Any, epochs: int, **how: Any) -> None:
        time.sleep(0.5)
        fit(model, data, epochs, **how)

    with ThreadPoolExecutor(1) as executor:
        assert len(tiniest(fit=slow).run(tmp_path, executor)) == 2
    assert len(looks) < 40  # of four stages


def test_a_worker_that_dies(
    pool: ProcessPoolExecutor, reference: list[Record], tmp_path: Path
) -> None:
    grid, store = tiny(fit=Noting(tmp_path)), tmp_path / "store"
    (tmp_path / "fault").write_text("die")
    with quick_pool() as mortal, pytest.raises(BrokenProcessPool) as caught:
        grid.run(store, mortal)
    named = re.findall(r"(?:score|train|finetune)-\S*\.(?:pt|json)", caught.value.__notes__[0])
    assert len(named) == 1, "of the stages that ran, and those that waited for a worker"
    assert named[0] in FAILED
    assert str(store) in caught.value.__notes__[-1]
    assert not (tmp_path / "fault").exists()
    kept = stamps(store)
    assert len(kept) < STAGES
    done = [path.name for path in store.glob("stages/finetune-*")]
    assert len(records.read(store / "records.jsonl")) == len(done)
    assert of_any_fit(grid.run(store, pool)) == of_any_fit(reference)
    assert kept.items() <= stamps(store).items()


class Unborn:
    """As a pool whose workers end before they have begun."""

    _max_workers = 2

    def __init__(self, method: str) -> None:
        self._mp_context = get_context(method)
        self._processes: dict[int, Any] = {}

    def submit(self, *_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("as if"))
        return future


@pytest.mark.parametrize("method", get_all_start_methods())
@pytest.mark.parametrize("guard", [False, True])
def test_a_pool_that_never_began(
    method: str, guard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most often the script does not look whether it is the main one."""
    script = tmp_path / "script.py"
    script.write_text("if __name__ == '__main__':\n    ..." if guard else "...")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    with pytest.raises(BrokenProcessPool) as caught:
        tiniest().run(tmp_path / "store", Unborn(method))
    notes = "\n".join(caught.value.__notes__)
    assert "memory" in notes
    assert ('if __name__ == "__main__"' in notes) == (method != "fork")
    assert (str(script) in notes) == (method != "fork")
    assert ("no such line" in notes) == (method != "fork" and not guard)
    assert not re.search("train-|score-|finetune-", notes)


def test_a_pool_that_broke_before(tmp_path: Path) -> None:
    """Has run none of these stages, and its workers came up."""

    class Broken:
        def submit(self, *_: Any) -> None:
            raise BrokenProcessPool("as if")

    with pytest.raises(BrokenProcessPool) as caught:
        tiniest().run(tmp_path, Broken())
    notes = "\n".join(caught.value.__notes__)
    assert "before this call" in notes
    assert not re.search("__main__|memory|train-", notes)
