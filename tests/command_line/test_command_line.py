"""The command line, called as a function; once as a process that another one reads from."""

import csv
import io
import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from helpers.record import one
from torch import nn

import drophot
from drophot import DynamicsTracker, ForgettingTracker, magnitude_prune, records
from drophot.__main__ import main
from drophot.prune import save_compressed
from drophot.report import table
from drophot.tracking import (
    DUAL,
    TDDS,
    FirstLearned,
    Last,
    MovingAverage,
    Score,
    Spread,
    WindowSpread,
)
from drophot.tracking.statistics import named_score


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4, bias=False))


def tracker(num_samples: int = 50) -> DynamicsTracker:
    """Trained on all samples but the last five; sample 7 has a wrong label."""
    found = DynamicsTracker(num_samples)
    index = torch.arange(num_samples - 5)
    logits = 4 * nn.functional.one_hot(index % 4).float() + torch.rand(len(index), 4)
    targets = index % 4
    targets[7] = 0
    found.update(index, logits, targets)
    return found


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(part) for part in arguments]) == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(part) for part in arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    return found.err


def rows(text: str) -> list[list[str]]:
    """The cells of a summary without its second column, the kind."""
    lines = [line.split() for line in text.splitlines()[2:]]
    return [[line[0], *line[-5:]] for line in lines if len(line) > 1]


@pytest.mark.parametrize("kind", ["state", "checkpoint", "compressed", "factory"])
def test_a_summary_has_the_numbers_of_the_model(
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network()
    magnitude_prune(model, 0.5)
    file = tmp_path / "network.pt"
    match kind:
        case "state":
            torch.save(model.state_dict(), file)
        case "checkpoint":
            optimizer = torch.optim.Adam(model.parameters())
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
            magnitude_prune(model, 0.5)
            parts = {"epoch": 3, "best": torch.tensor(1), "optimizer": optimizer.state_dict()}
            torch.save(parts | {"nested": {"model": model.state_dict()}}, file)
        case "compressed":
            save_compressed(model, file)
        case _:
            (tmp_path / "own_models.py").write_text(
                "from torch import nn\nclass models:\n"
                "    pruned = staticmethod(lambda: nn.Sequential(nn.Linear(8, 16)))\n"
            )
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "path", [*sys.path])
            model = nn.Sequential(nn.Linear(8, 16))
    source = "own_models:models.pruned" if kind == "factory" else file
    found = output(capsys, "summary", source)
    wanted = str(drophot.summary(model))
    assert rows(found) == rows(wanted)
    if kind == "factory":
        assert found == wanted + "\n"


def test_a_weight_that_two_layers_share_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_compressed(model, tmp_path / "b")
    for name in ("a.pt", "b"):
        assert rows(output(capsys, "summary", tmp_path / name))[-1][1] == str(36 + 12)


def test_one_of_several_networks_is_chosen_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.pt"
    ema = nn.Linear(3, 2)
    torch.save({"model": nn.Linear(5, 5).state_dict(), "a": {"ema": ema.state_dict()}}, file)
    message = error(capsys, "summary", file)
    assert "'model'" in message
    assert "'a.ema'" in message
    assert "--key" in message
    assert rows(output(capsys, "summary", file, "--key", "a.ema"))[-1][1] == "8"
    assert "'b'" in error(capsys, "summary", file, "--key", "b")
    torch.save(ema.state_dict(), file)
    save_compressed(ema, tmp_path / "compressed")
    for source in (file, tmp_path / "compressed", "torch.nn:Identity"):  # each is one network
        assert "'b'" in error(capsys, "summary", source, "--key", "b")


def test_files_that_could_run_code_are_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(network(), tmp_path / "whole.pt")
    assert "state_dict" in error(capsys, "summary", tmp_path / "whole.pt")


def test_wrong_sources_are_errors_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "nothing.pt").touch()
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": Path()}))
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    torch.save(network().state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    pickles = {"garbage.pt": b"\x80\x02garbage!!", "protocol_5.pt": pickle.dumps({"a": Path()}, 5)}
    for name, content in pickles.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
    damaged = tmp_path / "damaged"
    save_compressed(network(), damaged)
    damaged.write_bytes(damaged.read_bytes().replace(b'"nonzeros"', b'"nonzeroz"'))
    for name, problem in {
        "text": "not a checkpoint",
        "nothing.pt": "empty",
        "arrays.npz": "not a checkpoint",
        "pickle.pt": "not safe",
        "empty.pt": "`state_dict`",
        "half.pt": "damaged",
        "garbage.pt": "damaged",
        "protocol_5.pt": "damaged",
        "damaged": "damaged",
        "missing": "no file",
        "missing.safetensors": "no file",
        ".": "folder",
    }.items():
        found = error(capsys, "summary", tmp_path / name)
        assert problem in found
        assert str(tmp_path / name) in found
    for name in pickles:
        assert "damaged" in error(capsys, "suspects", tmp_path / name)


@pytest.mark.skipif(os.access("/root", os.R_OK), reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.pt"
    torch.save(network().state_dict(), file)
    file.chmod(0)
    assert str(file) in error(capsys, "summary", file)
    assert str(file) in error(capsys, "suspects", file)


def test_wrong_factories_are_errors_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_models.py").write_text(
        "import sys\n"
        "def raises(): raise RuntimeError('boom')\n"
        "def exits(): sys.exit('a script')\n"
        "def builds_nothing(): pass\n"
    )
    (tmp_path / "wrong_script.py").write_text("raise SystemExit('usage')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for source, problem in {
        "missing:network": "'missing'",
        "torch:missing": "'missing'",
        "torch.nn:Linear": "in_features",
        "torch:": "module:function",
        ":torch": "module:function",
        "builtins:dict": "type dict",
        "wrong_models:raises": "boom",
        "wrong_models:exits": "a script",
        "wrong_models:builds_nothing": "NoneType",
        "wrong_models.py:raises": "`.py`",
        "wrong_script:network": "usage",
    }.items():
        found = error(capsys, "summary", source)
        assert problem in found
        assert source in found


def test_programs_are_told_from_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("program/code/network.py", "program/archive_format"):  # torch.jit, torch.export
        with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
            archive.writestr(name, "")
            archive.writestr("program/data.pkl", "")
        assert "program" in error(capsys, "summary", tmp_path / "program.pt")


def test_a_file_of_safetensors_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = network()
    magnitude_prune(model, 0.5)
    for name in ("model.safetensors", "renamed.pt"):
        save_file(model.state_dict(), tmp_path / name)
        assert rows(output(capsys, "summary", tmp_path / name)) == rows(str(drophot.summary(model)))
    assert "DynamicsTracker" in error(capsys, "suspects", tmp_path / "renamed.pt")
    file = tmp_path / "half.safetensors"
    for end in (-1, 20):  # in the last tensor and in the description of all
        file.write_bytes((tmp_path / "renamed.pt").read_bytes()[:end])
        assert "damaged" in error(capsys, "summary", file)


def test_without_safetensors_its_files_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    found = error(capsys, "summary", tmp_path / "a.safetensors")
    assert "a.safetensors" in found
    assert "pip install safetensors" in found


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_weights_that_are_not_dense_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.pt"
    torch.save({"fc.weight": torch.eye(3).to_sparse()}, file)
    found = error(capsys, "summary", file)
    assert "`fc.weight`" in found
    assert "sparse" in found
    torch.save({"fc.weight": torch.empty(3, device="meta")}, file)
    assert "meta" in error(capsys, "summary", file)
    torch.save({"fc.weight": torch.eye(3, dtype=torch.complex64)}, file)
    assert rows(output(capsys, "summary", file))[-1][2] == "3"


def test_an_error_of_several_lines_is_printed_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lines_models.py").write_text("def network(): raise ValueError('a\\nb')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "a b" in error(capsys, "summary", "lines_models:network")


def test_suspects_are_the_samples_of_lowest_margin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tracker()
    torch.save({"model": network().state_dict(), "tracker": found.state_dict()}, tmp_path / "c.pt")
    lines = list(csv.DictReader(io.StringIO(output(capsys, "suspects", tmp_path / "c.pt"))))
    assert len(lines) == 45  # those that were presented
    assert lines[0]["index"] == "7"
    margins = [float(line["aum"]) for line in lines]
    assert margins == sorted(margins)
    columns = found.columns()
    assert [line.keys() for line in lines] == [columns.keys()] * 45
    for line in lines:
        at = int(line["index"])
        for name in ("target", "presentations", "forgetting", "loss", "el2n"):
            assert float(line[name]) == pytest.approx(float(columns[name][at]), rel=1e-6)
    few = output(capsys, "suspects", tmp_path / "c.pt", "--number", "3", "--score", "loss")
    losses = [float(line["loss"]) for line in csv.DictReader(io.StringIO(few))]
    assert len(losses) == 3
    assert losses == pytest.approx(sorted(columns["loss"][:45], reverse=True)[:3], rel=1e-6)


class Top:
    name = "top"
    hard_end: Literal["low"] = "low"

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.amax(dim=1)


def test_suspects_that_cannot_be_told_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.pt"
    missing = error(capsys, "suspects", file)
    assert str(file) in missing
    assert "module" not in missing  # only a network can be built by a function
    torch.save(tracker().state_dict(), file)
    wrong = error(capsys, "suspects", file, "--score", "forgetting")
    assert "`--score`" in wrong
    assert "'forgetting'" in wrong
    assert "0" in error(capsys, "suspects", file, "--number", "0")
    torch.save(ForgettingTracker(5).state_dict(), file)
    assert "DynamicsTracker" in error(capsys, "suspects", file)
    torch.save(network().state_dict(), file)
    assert "DynamicsTracker" in error(capsys, "suspects", file)
    for own in (Top(), Last(score=Top()), Spread(score=Top(), name="top_spread")):
        torch.save(DynamicsTracker(5, statistics=["aum", own]).state_dict(), file)
        assert repr(own.name) in error(capsys, "suspects", file)
    torch.save(tracker().state_dict() | {"statistics": [5]}, file)
    assert "DynamicsTracker" in error(capsys, "suspects", file)
    torch.save(tracker().state_dict() | {"history": torch.tensor(0)}, file)
    assert "DynamicsTracker" in error(capsys, "suspects", file)


def test_of_two_trackers_the_one_that_keeps_the_score_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.pt"
    wanted = tracker()
    losses = DynamicsTracker(9, statistics=["loss"])
    losses.update(torch.arange(9), torch.randn(9, 4), torch.arange(9) % 4)
    states = {"b": wanted.state_dict(), "a": ForgettingTracker(50).state_dict()}
    torch.save(states, file)
    found = output(capsys, "suspects", file)
    assert found.splitlines()[1].startswith("7,")
    torch.save(states | {"losses": losses.state_dict()}, file)
    assert output(capsys, "suspects", file) == found
    several = error(capsys, "suspects", file, "--score", "loss")
    assert "'b'" in several
    assert "'losses'" in several
    assert "ForgettingTracker" in error(capsys, "suspects", file, "--key", "a")


def test_trackers_in_lists_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.pt"
    state = tracker().state_dict()
    torch.save({"callbacks": [1, ({"tracker": state},)], "numbers": [0.5] * 9}, file)
    found = output(capsys, "suspects", file)
    assert found.splitlines()[1].startswith("7,")
    assert output(capsys, "suspects", file, "--key", "callbacks.1.0.tracker") == found
    torch.save([network().state_dict()], file)
    assert rows(output(capsys, "summary", file)) == rows(str(drophot.summary(network())))


def test_a_tracker_without_scores_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.pt"
    torch.save(DynamicsTracker(5).state_dict(), file)
    assert "`tracker`" in error(capsys, "suspects", file)
    few = DynamicsTracker(4, statistics=[DUAL(window=3)])
    few.update(torch.arange(4), torch.randn(4, 3), torch.zeros(4).long())
    torch.save(few.state_dict(), file)
    found = error(capsys, "suspects", file, "--score", "dual")
    assert "'dual'" in found
    assert "1 times" in found


@pytest.mark.parametrize(
    "score",
    [
        DUAL(window=2, until=None),
        WindowSpread(score="loss", window=2, hard_end="low", name="spread_of_loss"),
        TDDS(num_classes=4, window=3, decay=0.5),
        FirstLearned(for_good=True),
        Last(score="aum"),
        MovingAverage(decay=1 / 3),
        Spread(score=named_score("loss"), name="wandering"),
    ],
    ids=lambda score: score.name,
)
def test_all_statistics_of_drophot_are_read(
    score: Score, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = DynamicsTracker(6, statistics=["aum", score])
    for _ in range(4):
        found.update(torch.arange(6), torch.randn(6, 4), torch.arange(6) % 4)
    torch.save(found.state_dict(), tmp_path / "c.pt")
    text = output(capsys, "suspects", tmp_path / "c.pt", "--score", score.name)
    lines = list(csv.DictReader(io.StringIO(text)))
    values = found.scores(score.name).tolist()
    ranked = sorted(range(6), key=values.__getitem__, reverse=score.hard_end == "high")
    assert [int(line["index"]) for line in lines] == ranked
    for line in lines:
        assert float(line[score.name]) == pytest.approx(values[int(line["index"])], rel=1e-6)
        assert float(line["aum"]) == pytest.approx(float(found.scores("aum")[int(line["index"])]))


def test_a_score_that_the_tracker_does_not_keep_is_an_error_with_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = DynamicsTracker(3, statistics=["loss"])
    losses.update(torch.arange(3), torch.randn(3, 4), torch.arange(3))
    file = tmp_path / "c.pt"
    torch.save(losses.state_dict(), file)
    found = error(capsys, "suspects", file)
    assert "'aum'" in found
    (command,) = re.findall(r"`drophot (.*?)`", found)
    assert len(output(capsys, *command.split()).splitlines()) == 4


def touch(path: str) -> None:
    Path(path).touch()


class Unpickled:
    """An object that would write a file as it is read, by a function of this file or of `os`."""

    def __init__(self, path: Path, function: Callable[[str], None] = touch) -> None:
        self.path, self.function = str(path), function

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, (self.path,)


def test_a_checkpoint_is_read_without_its_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, touched = tmp_path / "c.pt", tmp_path / "touched"
    other = {"path": touched, "kind": nn.Linear, "counts": Counter("a"), "own": Unpickled(touched)}
    states = {"tracker": tracker().state_dict(), "model": network().state_dict()}
    torch.save({"hyper_parameters": other, **states}, file)
    assert output(capsys, "suspects", file).splitlines()[1].startswith("7,")
    assert rows(output(capsys, "summary", file)) == rows(str(drophot.summary(network())))
    torch.save({"hyper_parameters": other, "model": [network()]}, file)
    for command in ("suspects", "summary"):
        found = error(capsys, command, file)
        assert "torch.nn.modules.container.Sequential" in found
        assert "torch.save" in found
    for unsafe, name in (
        (Unpickled(touched, os.mkdir), "mkdir"),
        (defaultdict(int, a=1), "collections.defaultdict"),
    ):
        torch.save({"hyper_parameters": unsafe, **states}, file)
        found = error(capsys, "suspects", file)
        assert "not safe" in found
        assert name in found
        assert "weights_only=False" in found
    assert not touched.exists()


def test_the_status_and_the_report_of_a_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "results"
    store.mkdir()
    file = store / "records.jsonl"
    file.touch()
    (store / "grid.json").write_text('{"plan": {"cells": 6}}')  # of an older version
    assert "0 of 6 " in output(capsys, "grid", "status", store)
    (store / "grid.json").write_text('{"plan": {"runs": 6}}')
    assert "0 of 6 " in output(capsys, "grid", "status", store)
    runs = [one(seed=0), one(seed=1), one(mode="baseline", keep_ratio=1.0)]
    records.write([*runs, runs[0]], file)  # two processes computed one of them
    with file.open("a") as unfinished:
        unfinished.write('{"model": ')
    before = sorted(store.iterdir())
    found = output(capsys, "grid", "status", store)
    assert re.search("^runs +3 of 6 done, 2 cells$", found, re.M)
    assert "high (2), baseline (1)" in found
    assert sorted(store.iterdir()) == before  # it only looks
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    page = store / "report.html"
    assert output(capsys, "grid", "report", store) == f"{page}\n"
    assert "Table 1" in page.read_text()
    other = tmp_path / "pages" / "page.html"
    assert output(capsys, "grid", "report", store, "--output", other) == f"{other}\n"
    assert other.is_file()
    assert table(runs)
    in_a_file = file / "page.html"
    assert str(file) in error(capsys, "grid", "report", store, "--output", in_a_file)


def test_a_folder_that_is_no_grid_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for command in ("status", "report"):
        for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
            found = error(capsys, "grid", command, folder)
            assert f"but {folder} " in found
            assert "`STORE`" in found


@pytest.mark.parametrize("text", ["[1]", '{"plan": null}', '{"plan": {"runs": "6"}}', "no json"])
def test_a_damaged_file_of_a_grid_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write([one()], tmp_path / "records.jsonl")
    (tmp_path / "grid.json").write_text(text)
    for command in ("status", "report"):
        assert "grid.json" in error(capsys, "grid", command, tmp_path)
    (tmp_path / "records.jsonl").write_bytes(b"\xff\n")
    assert "line 1" in error(capsys, "grid", "status", tmp_path)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in ([["--version"], 0], [["--help"], 0], [[], 2], [["grid"], 2], [["no"], 2]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == code
    assert drophot.__version__ in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no sh")
def test_a_reader_may_stop_before_the_end(tmp_path: Path) -> None:
    num_samples = 3000  # more than a pipe holds
    torch.save(tracker(num_samples).state_dict(), tmp_path / "c.pt")
    words = [sys.executable, "-m", "drophot", "suspects", str(tmp_path / "c.pt")]
    command = shlex.join([*words, "--number", str(num_samples)])
    done = subprocess.run(
        ["sh", "-c", f"{command} | head -n 1"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("index,")
    assert done.stderr == ""
