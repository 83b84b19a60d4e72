"""A grid's folder under `kill -9`, damage, company and a full disk."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import processes
from helpers.executors import stamps
from helpers.runs import drop_hot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset

from drophot import Grid, Record, fit, records
from drophot.grid import store as grid_store
from drophot.grid.store import Store, open_store, write_file
from drophot.pipeline.provenance import digests

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*leave no sample of classes"),
]

STAGES = 1 + 4 + 6


def logged(model: nn.Module, dataset: Dataset[Any], epochs: int, **rest: Any) -> None:
    """A training loop that says when it starts and ends, and takes its time."""
    _log("start")
    time.sleep(float(_setting("PAUSE") or 0))
    fit(model, dataset, epochs, **rest)
    _log("end")


def _log(word: str) -> None:
    if (path := _setting("LOG")) is not None:
        with Path(path).open("a") as file:
            file.write(f"{word} {os.getpid()}\n")


def _setting(name: str) -> str | None:
    """What the test asks of the loop: by a computed key, as a constant one is of the experiment."""
    return os.environ.get(f"DROPHOT_TEST_{name}")


def grid() -> Grid:
    pipeline = drop_hot(score_epochs=2, train_epochs=2, finetune_epochs=1, fit=logged)
    return Grid(
        pipeline, data_ratios=[0.2, 0.5], modes=["high", "random"], prune_ratios=[0.6], seeds=[0]
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    store = tmp_path_factory.mktemp("uninterrupted")
    return store, grid().run(store)


@pytest.fixture(scope="module")
def done(uninterrupted: tuple[Path, list[Record]]) -> Path:
    """The store of an uninterrupted run, which tests copy before they change anything."""
    return uninterrupted[0]


@pytest.fixture(scope="module")
def wanted(uninterrupted: tuple[Path, list[Record]]) -> list[Record]:
    """What an uninterrupted run gives."""
    return uninterrupted[1]


@pytest.fixture
def store(done: Path, tmp_path: Path) -> Path:
    """A finished store."""
    return shutil.copytree(done, tmp_path / "store")


def test_a_finished_store_is_the_same_in_another_place(store: Path, wanted: list[Record]) -> None:
    before = stamps(store)
    assert grid().run(store) == wanted
    assert stamps(store) == before, "nothing twice"


def begin(store: Path, workers: int, pause: float = 0.0) -> BaseProcess:
    """The grid in a process of its own, in a process group of its own."""
    environment = {"DROPHOT_TEST_LOG": str(store) + ".log", "DROPHOT_TEST_PAUSE": str(pause)}
    output = Path(str(store) + ".errors")
    return processes.begin(
        main, store, workers, folder=store.parent, output=output, environment=environment
    )


def ended(process: BaseProcess, seconds: float = 120) -> int | None:
    """The exit code, which is None if the process is still running."""
    process.join(seconds)
    return process.exitcode


def errors(store: Path) -> str:
    return Path(str(store) + ".errors").read_text()


def log(store: Path) -> list[str]:
    path = Path(str(store) + ".log")
    return path.read_text().split("\n")[:-1] if path.exists() else []


def finished(store: Path) -> list[Path]:
    """The files of stages that are there, but for what is being written."""
    return [path for path in store.glob("stages/*") if path.suffix != ".part"]


def wait_for(condition: Any, process: BaseProcess) -> None:
    end = time.monotonic() + 120
    while not condition() and process.exitcode is None:
        assert time.monotonic() < end, "it never came that far"
        time.sleep(0.005)


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("whom", ["all", "driver"])
def test_kill_9_twice_in_a_row(
    workers: int, whom: str, tmp_path: Path, wanted: list[Record]
) -> None:
    """With and without workers; the driver alone, whose workers then live on for a while."""
    store = tmp_path / "store"
    chance = random.Random(f"{workers}{whom}")
    done = [0]
    groups = []
    try:
        for _ in range(2):
            process = begin(store, workers, pause=0.1)
            groups.append(process.pid)
            more = done[-1] + chance.randrange(1, 4)

            def came_so_far(more: int = more) -> bool:
                return len(finished(store)) >= more

            wait_for(came_so_far, process)
            time.sleep(chance.random() * 0.1)
            assert process.exitcode is None, "it was to be killed before its end"
            if whom == "all":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.join()
            done.append(len(finished(store)))
        if whom == "all":
            before = {path: path.stat().st_mtime_ns for path in finished(store)}
        else:
            before = {}
        process = begin(store, workers)
        assert ended(process) == 0, errors(store)
        assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing twice"
    finally:
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
    assert grid().run(store) == wanted
    assert records.read(store / "records.jsonl") == wanted
    assert 0 < done[1] < done[2] < STAGES


def forked(do: Any) -> int:
    """Something in a copy of this process; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            do()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("moment", ["before", "cut", "after"])
def test_kill_9_at_every_file_that_is_written(
    moment: str, tmp_path: Path, wanted: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is killed at the second file that it writes of its own; the last one finds all."""
    monkeypatch.setenv("DROPHOT_TEST_LOG", str(tmp_path / "store.log"))
    store = tmp_path / "store"
    replace, deaths = Path.replace, 0

    def run_and_die() -> None:
        written = 0

        def deadly(self: Path, target: Path) -> Path:
            nonlocal written
            written += "stages" in str(target)
            if written == 2 and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if written == 2 and moment == "cut":
                os.truncate(self, self.stat().st_size // 2)
            result = replace(self, target)
            if written == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        Path.replace = deadly  # type: ignore[method-assign]  # of this copy of the process
        grid().run(store)

    while forked(run_and_die) == signal.SIGKILL:
        deaths += 1
        assert deaths <= STAGES
    assert deaths == {"before": STAGES - 1, "cut": STAGES - 1, "after": STAGES // 2}[moment]
    assert grid().run(store) == wanted
    assert records.read(store / "records.jsonl") == wanted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_what_a_killed_process_left_half_written_is_removed_when_it_is_old(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", {"a": 1}, {})

    def die() -> None:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # of this copy of the process
        store.save("score-seed0.pt", b"x" * 1000)

    assert forked(die) == signal.SIGKILL
    (left,) = (tmp_path / "store" / "stages").iterdir()
    assert left.suffix == ".part"
    store.tidy({})
    assert left.exists(), "another process may be writing it"
    os.utime(left, (0, 0))
    store.tidy({})
    assert not left.exists()


@pytest.mark.parametrize("hours", [-30, -3, 3, 30])
def test_a_clock_that_is_off_costs_no_other_machines_file(
    hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files have the time of the file server, which is not that of the machine that tidies."""
    store = open_store(tmp_path / "store", {"a": 1}, {})
    now, sync = time.time(), os.fsync

    def tidied_meanwhile(descriptor: int) -> None:
        sync(descriptor)
        monkeypatch.setattr(os, "fsync", sync)
        with monkeypatch.context() as other:
            other.setattr(time, "time", lambda: now + 3600 * hours)
            store.tidy({})
        assert len(list(tmp_path.glob("store/stages/*.part"))) == 1

    monkeypatch.setattr(os, "fsync", tidied_meanwhile)
    store.save("score-seed0.pt", b"hours of work")
    assert store.load("score-seed0.pt") == b"hours of work"


def test_a_file_that_vanishes_as_it_is_written_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sync = open_store(tmp_path / "store", {"a": 1}, {}), os.fsync

    def remove(descriptor: int) -> None:
        sync(descriptor)
        monkeypatch.setattr(os, "fsync", sync)
        for part in tmp_path.glob("store/stages/*.part"):
            part.unlink()

    monkeypatch.setattr(os, "fsync", remove)
    store.save("score-seed0.pt", b"hours of work")
    assert store.load("score-seed0.pt") == b"hours of work"
    assert len(list((tmp_path / "store" / "stages").iterdir())) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_stops_cleanly(workers: int, tmp_path: Path, wanted: list[Record]) -> None:
    store = tmp_path / "store"
    process = begin(store, workers, pause=0.2)
    wait_for(lambda: len(finished(store)) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process, 60) not in (0, None)
    said = errors(store)
    assert "KeyboardInterrupt" in said
    assert f"Finished stages are in {store}. The same call resumes from there." in said
    assert 3 <= len(finished(store)) < STAGES
    assert list(store.rglob("*.part")) == []
    assert grid().run(store) == wanted


# --- damaged --------------------------------------------------------------------------------------


def damage(path: Path, how: str, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    place = int(at * len(content))
    if how == "cut":
        content = content[:place]
    elif how == "flipped":
        content[place] ^= 1
    elif how == "longer":
        content += b"x"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped", "longer"])
@pytest.mark.parametrize(
    "name", ["score-seed0", "train-seed0-high-keep0.5", "finetune-", "grid", "records"]
)
def test_what_is_damaged_is_computed_again(
    name: str, how: str, store: Path, wanted: list[Record]
) -> None:
    for path in [p for p in store.rglob("*") if p.is_file() and p.name.startswith(name)]:
        damage(path, how)
    if name.startswith(("score", "train")):  # needed again only for what goes on from it
        for path in store.glob("stages/finetune-*"):
            path.unlink()
    assert grid().run(store) == wanted
    assert records.read(store / "records.jsonl") == wanted
    assert json.loads((store / "grid.json").read_text())["plan"] == {"runs": 6}


@given(st.binary(max_size=200), st.data())
@settings(max_examples=100)
def test_no_damage_passes(content: bytes, data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "store", {"a": 1}, {})
        store.save("one", content)
        assert store.load("one") == content
        path = store.folder / "stages" / "one"
        whole = path.read_bytes()
        kind = data.draw(st.sampled_from(["cut", "flip", "longer"]))
        place = data.draw(st.integers(0, len(whole) - 1))
        if kind == "cut":
            path.write_bytes(whole[:place])
        elif kind == "flip":
            bit = 1 << data.draw(st.integers(0, 7))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        else:
            path.write_bytes(whole + data.draw(st.binary(min_size=1)))
        assert store.load("one") is None


def test_an_empty_stage_whose_head_is_cut_short_is_none(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", {"a": 1}, {})
    store.save("one", b"")
    assert store.load("one") == b""
    path = store.folder / "stages" / "one"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert store.load("one") is None


def test_a_file_of_another_stage_or_configuration_is_none(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", {"a": 1}, {})
    store.save("one", b"content")
    (tmp_path / "store" / "stages" / "one").rename(tmp_path / "store" / "stages" / "two")
    assert store.load("two") is None
    store.save("one", b"content")
    assert Store(store.folder, "another").load("one") is None
    assert store.load("three") is None


def test_the_data_for_workers_is_made_anew(tmp_path: Path, wanted: list[Record]) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        grid().run(tmp_path, pool)
    damage(tmp_path / "data.pt", "cut")
    for path in tmp_path.glob("stages/finetune-*"):
        path.unlink()
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert grid().run(tmp_path, pool) == wanted


def test_damage_while_it_runs_is_an_error_and_nothing_is_lost(
    tmp_path: Path, wanted: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Store.save

    def damaged(self: Store, name: str, content: bytes) -> None:
        save(self, name, content)
        if name == "train-seed0-high-keep0.2.pt":
            damage(self.folder / "stages" / name, "flipped", 0.9)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", damaged)
        with pytest.raises(RuntimeError, match=r"train-seed0-high-keep0\.2\.pt"):
            grid().run(tmp_path)
    assert grid().run(tmp_path) == wanted


# --- in company -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_on_one_store(workers: int, tmp_path: Path, wanted: list[Record]) -> None:
    store = tmp_path / "store"
    for process in [begin(store, workers, pause=0.05) for _ in range(2)]:
        assert ended(process) == 0, errors(store)
    assert records.read(store / "records.jsonl") == wanted
    assert grid().run(store) == wanted
    assert list(store.rglob("*.part")) == []


def test_a_stage_that_another_process_finished_is_not_computed_again(
    done: Path, tmp_path: Path, wanted: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found when the stage's turn comes, not only when the run starts."""
    monkeypatch.setenv("DROPHOT_TEST_LOG", str(tmp_path / "store.log"))
    open_, store = Store.append, tmp_path / "store"

    def append(self: Store, record: Record) -> None:  # the first record brings all the others
        for path in (done / "stages").iterdir():
            (self.folder / "stages" / path.name).write_bytes(path.read_bytes())
        open_(self, record)

    monkeypatch.setattr(Store, "append", append)
    assert grid().run(store) == wanted
    plan = [line for line in log(store) if line.startswith("start")]
    assert len(plan) <= 11 + 2, "the plan's measuring, a scoring and a fine-tuning"


def test_records_can_be_read_while_it_runs(
    tmp_path: Path, wanted: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Record]] = []
    append = Store.append

    def watched(self: Store, record: Record) -> None:
        append(self, record)
        seen.append(records.read(self.folder / "records.jsonl"))

    monkeypatch.setattr(Store, "append", watched)
    grid().run(tmp_path)
    assert seen == [wanted[: n + 1] for n in range(len(wanted))]


def test_a_line_that_was_cut_is_mended_before_others_follow(
    store: Path, wanted: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (store / "stages" / "finetune-seed0-random-keep0.5-prune0.6.json").unlink()
    append = Store.append

    def watched(self: Store, record: Record) -> None:
        assert records.read(path) == wanted[:-1]
        append(self, record)
        assert records.read(path) == wanted

    monkeypatch.setattr(Store, "append", watched)
    assert grid().run(store) == wanted


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("limit", [0, 1000, 3000, 6000])
def test_a_file_that_cannot_grow_is_an_error_and_nothing_is_lost(
    limit: int, tmp_path: Path, wanted: list[Record]
) -> None:
    store, said = tmp_path / "store", tmp_path / "said"
    said.touch()

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        opened = said.open("w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            grid().run(store)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))
            opened.write("\n".join([str(error), *getattr(error, "__notes__", [])]))
            opened.close()

    assert forked(run) == 0
    text = said.read_text()
    assert "intact" in text
    assert list(store.rglob("*.part")) == []
    kept = {path: path.read_bytes() for path in store.glob("stages/*")}
    assert len(kept) <= STAGES
    assert grid().run(store) == wanted
    assert {path: path.read_bytes() for path in kept} == kept, "what was there was good"


def test_a_disk_that_is_full(tmp_path: Path, wanted: list[Record]) -> None:
    """A real one, of 60 kB; mounting it needs rights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small disk")
    try:
        with pytest.raises(OSError, match="No space left on device.*intact.*run again"):
            grid().run(disk / "store")

        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert grid().run(disk / "store") == wanted
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- what is no store -------------------------------------------------------------------------


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="`store` .*'thesis.tex'"):
        grid().run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_text("x")
    with pytest.raises(ValueError, match="`store` .*folder.* file "):
        grid().run(path)
    assert path.read_text() == "x"


def test_a_new_or_an_empty_folder_is_taken(tmp_path: Path, wanted: list[Record]) -> None:
    assert grid().run(str(tmp_path / "a" / "b")) == wanted
    (tmp_path / "empty").mkdir()
    assert grid().run(tmp_path / "empty") == wanted


def test_a_finished_store_can_be_read_where_it_cannot_be_written(
    store: Path, wanted: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = grid().run(store)  # and so can a part of it, whose lines and plan would be others
    with monkeypatch.context() as patched:
        for name in ("touch", "unlink", "replace", "mkdir", "write_bytes"):
            patched.setattr(Path, name, read_only)
        open_ = Path.open
        patched.setattr(
            Path,
            "open",
            lambda path, mode="r", *rest, **how: (
                read_only() if set(mode) & set("wxa") else open_(path, mode, *rest, **how)
            ),
        )
        assert grid().run(store) == part == wanted
        cells: dict[str, Any] = {"data_ratios": [0.2], "modes": ["high"], "prune_ratios": [0.6]}
        few = Grid(grid().pipeline, **cells, seeds=[0])
        assert [record in wanted for record in few.run(store)] == [True] * 3
        called: list[str] = []
        patched.setattr(grid_store.Store, "save", lambda *_: called.append("save"))
        more = Grid(grid().pipeline, **cells, seeds=[7])
        with pytest.raises(OSError, match="Read-only"):
            more.run(store)
        assert called == [], "before anything is computed"
    assert records.read(store / "records.jsonl") == wanted


def read_only(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    "name",
    ["grid.json", "records.jsonl", "stages/finetune-seed0-random-keep0.5-prune0.6.json"],
)
def test_a_folder_in_place_of_a_file_is_named(name: str, store: Path) -> None:
    (store / name).unlink()
    (store / name).mkdir()
    with pytest.raises(ValueError, match=rf"`store`.*{Path(name).name}.*folder"):
        grid().run(store)


def test_stages_that_were_removed_by_hand_are_computed_again(
    store: Path, wanted: list[Record]
) -> None:
    shutil.rmtree(store / "stages")
    assert grid().plan(store).finetunings == 6
    assert grid().run(store) == wanted
    shutil.rmtree(store / "stages")
    (store / "stages").touch()
    with pytest.raises(ValueError, match="`store`.*stages"):
        grid().run(store)


def test_what_is_written_whole_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(OSError, match="intact"):
        write_file(tmp_path / "no" / "file", b"")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(2)],
        [torch.zeros(3)],
        [torch.zeros(1, 2)],
        [torch.zeros(2), torch.zeros(2)],
        [torch.zeros(2, dtype=torch.int64)],
        [torch.zeros(2, dtype=torch.bfloat16)],
        [torch.tensor([0.0, 1.0])],
        [],
    ],
)
def test_digests_differ(tensors: list[torch.Tensor]) -> None:
    others = [[torch.ones(2)], [torch.zeros(5)], [torch.zeros(2, 1)]]
    assert all(digests.digest(tensors) != digests.digest(other) for other in others)
    assert digests.digest(tensors) == digests.digest([t.clone() for t in tensors])


def main(store: Path, workers: int) -> None:
    if workers == 0:
        grid().run(store)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        grid().run(store, pool)
