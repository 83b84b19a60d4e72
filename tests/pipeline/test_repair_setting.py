"""`repair` in a run and in a grid, against the function called by hand."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drophot import DropHot, Grid, magnitude_prune
from drophot.prune import repair
from drophot.stats import compare

torch.manual_seed(0)
DATA = TensorDataset(torch.randn(48, 6), torch.randint(3, (48,)))
SMALL = {"score_epochs": 1, "train_epochs": 1, "finetune_epochs": 0, "batch_size": 48}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def run(**settings) -> DropHot:
    settings = {"mode": "random", "data_ratio": 0.5, "prune_ratio": 0.5, **SMALL, **settings}
    return DropHot(network, DATA, DATA, **settings)


def test_a_run_repairs_what_it_prunes() -> None:
    plain, repaired = run(prune_ratio=0.0), run(repair=True)
    plain.run()
    repaired.run()
    by_hand = deepcopy(plain.model)
    magnitude_prune(by_hand, 0.5, scope="layer")
    repair(by_hand, plain.model, [DATA.tensors[0]])  # one batch has all samples
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(repaired.model.state_dict()[name], tensor)


def test_channels_too() -> None:
    one, other = run(structured=True), run(structured=True, repair=True)
    one.run()
    other.run()
    assert one.model[0].weight.shape == other.model[0].weight.shape == (8, 6)
    assert not torch.equal(one.model[2].weight, other.model[2].weight)


def test_it_is_a_control_of_a_grid(tmp_path: Path) -> None:
    grid = {"data_ratios": [0.5], "modes": ["random"], "prune_ratios": [0.5], "seeds": [0, 1]}
    records = Grid(run(), **grid, controls=["repair"]).run(tmp_path)
    repaired = [record for record in records if record.settings.get("repair")]
    assert len(repaired) == 4
    assert len(records) == 10
    again = Grid(run(), **grid, controls=["repair"]).run(tmp_path)
    assert again == records
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    assert all(row.n == 2 for row in compare(records))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recalibrate_bn": True}, "`repair=True` .*`recalibrate_bn=True`"),
        ({"schedule": "joint"}, "`repair=True` .*`schedule=.joint.`"),
        ({"batch_size": 1}, "`repair=True` .*`batch_size`.*1"),
    ],
)
def test_combinations_that_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(repair=True, **settings)
