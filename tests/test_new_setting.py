"""A new setting that a grid can vary takes its declaration and the step that uses it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers.processes import run_script

from drophot.records import fingerprint

pytestmark = pytest.mark.slow

# The whole change, in two files: what is added before which line.
CHANGE = {
    "settings/declarations.py": {
        "    score_epochs: int = field(\n": """\
    finetune_lr_scale: float = field(
        default=1.0,
        metadata=_declare(
            check=scalars.real,
            stage="finetune",
            varies=True,
            heading="learning rate",
            words={1.0: "as it was", 0.1: "a tenth"},
            controls={"low_lr": 0.1},
            optional=True,
        ),
    )
""",
        "        score_epochs: Epochs of step 1": """\
        finetune_lr_scale: Multiplies the learning rate in step 5.
""",
    },
    "pipeline/pruning_steps.py": {
        "        pruner = pruned.schedule\n": """\
        for group in optimizer.param_groups:
            group["lr"] *= config.settings.finetune_lr_scale
""",
    },
}

SCRIPT = """
import json, sys
from functools import partial
import torch
from torch.utils.data import TensorDataset
from drophot import DropHot, Grid
from drophot.models import fcnet
from drophot.records import to_line
from drophot.report import table

store, controls = sys.argv[1], sys.argv[2:]
inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
epochs = dict(score_epochs=1, train_epochs=1, finetune_epochs=1)
adam = partial(torch.optim.Adam, lr=0.05)
run = DropHot(
    partial(fcnet, in_features=4, hidden=8, num_classes=2),
    data,
    data,
    **dict(data_ratio=0.5, mode="high", prune_ratio=0.5, device="cpu", batch_size=8),
    **epochs,
    optimizer=adam,
)
lists = dict(data_ratios=[0.5], modes=["high", "random"], prune_ratios=[0.5], seeds=[0])
found = Grid(run, **lists, controls=controls).run(store)
assert Grid(run, **lists, controls=controls).run(store) == found, "resumed"
alone = []
if controls:
    cell = dict(mode="random", finetune_lr_scale=0.1)
    alone = [run.replace(**cell).run()]
    assert run.finetune_lr_scale == 1.0
    from drophot.stats import compare
    rows = compare(found, against="random")
    assert sorted(r.settings["finetune_lr_scale"] for r in rows) == [0.1, 1.0], rows
    assert "finetune_lr_scale" in table(found, "csv").splitlines()[0]
print(json.dumps({
    "records": [to_line(r) for r in found],
    "alone": [to_line(r) for r in alone],
    "table": table(found, "text"),
}))
"""


def computed_here(store: Path) -> dict[str, Any]:
    """What a grid finds with the library as it is, in a process that has imported it."""
    script = store.with_suffix(".py")
    script.write_text(SCRIPT, encoding="utf-8")
    return json.loads(run_script(script, str(store), folder=store.parent, filters=[]))


def computed(library: Path, store: Path, *controls: str) -> dict[str, Any]:
    """What a grid finds with another version of the library."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(store), *controls],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def changed(folder: Path) -> Path:
    """A copy of the library with the change."""
    shutil.copytree(ROOT / "src", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, parts in CHANGE.items():
        path = folder / "drophot" / name
        text = path.read_text(encoding="utf-8")
        for line, added in parts.items():
            assert text.count(line) == 1, line
            text = text.replace(line, added + line)
        path.write_text(text, encoding="utf-8")
    return folder


def test_a_new_setting_touches_its_declaration_and_its_step(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    library, store = changed(tmp_path / "src"), tmp_path / "store"
    old = computed_here(store)
    before = {path: path.stat().st_mtime_ns for path in (store / "stages").iterdir()}
    found = computed(library, store, "low_lr")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing twice"
    assert [line for line in found["records"] if line in old["records"]] == old["records"]
    fresh = [json.loads(line) for line in found["records"] if line not in old["records"]]
    names = sorted(path.name for path in (store / "stages").iterdir() if path not in before)
    assert names == [
        f"finetune-seed0-{cell}-prune0.5-finetune_lr_scale0.1.json"
        for cell in ("baseline-keep1.0", "high-keep0.5", "random-keep0.5")
    ]
    assert [record["settings"]["finetune_lr_scale"] for record in fresh] == [0.1] * 3
    cells = {json.loads(line)["cell"] for line in found["records"]}
    assert len(cells) == len(found["records"])
    (alone,) = map(json.loads, found["alone"])
    (mine,) = (record for record in fresh if record["mode"] == "random")
    same = {"seconds": {}}
    assert alone | same == mine | same
    assert fingerprint(mine["settings"]) == mine["cell"]
    twin = next(r for r in map(json.loads, old["records"]) if r["mode"] == "random")
    assert twin["pruned_accuracy"] == mine["pruned_accuracy"]
    head, _, *rows = found["table"].splitlines()
    assert "learning rate" in head
    assert sum("a tenth" in row for row in rows) == 3
    assert sum("as it was" in row for row in rows) == len(rows) - 3
