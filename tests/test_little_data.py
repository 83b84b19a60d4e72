"""The recipe of `benchmarks/little_data.py`: its augmentation by definition, and its seed."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from drophot import Adaptive, DropHot


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    path = ROOT / "benchmarks" / "little_data.py"
    sys.path.insert(0, str(Path(path).parent))
    try:
        return runpy.run_path(str(path))
    finally:
        sys.path.pop(0)


def test_images_are_cropped_and_flipped_one_by_one(script: dict[str, Any]) -> None:
    images = torch.rand(60, 3, 5, 6)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    torch.manual_seed(0)
    found = script["augment"](images, 2)
    seen = set()
    for number, image in enumerate(found):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for crop in [padded[number, :, top : top + 5, left : left + 6]]
            if torch.equal(crop.flip(2) if flip else crop, image)
        ]
        assert len(matches) == 1, "an image of random values shows where it was cut"
        seen |= set(matches)
    assert len(seen) > 20, "each with separate numbers"
    assert {one[0] for one in seen} == {one[1] for one in seen} == set(range(5))
    torch.manual_seed(0)
    assert torch.equal(script["augment"](images, 2), found)


def test_images_are_augmented_in_training_alone(script: dict[str, Any]) -> None:
    images = torch.rand(8, 3, 6, 6)
    model = script["Augmented"](nn.Identity(), 2)
    assert torch.equal(model.eval()(images), images)
    assert not torch.equal(model.train()(images), images)


@pytest.mark.parametrize("mode", ["random", "fresh_subset", Adaptive("high", every=1)], ids=str)
def test_one_seed_gives_one_record(script: dict[str, Any], mode: Any) -> None:
    data = TensorDataset(torch.rand(60, 3, 8, 8), torch.arange(60) % 3)
    settings: dict[str, Any] = {"data_ratio": 0.3, "mode": mode, "prune_ratio": 0, "batch_size": 8}
    lengths = {"score_epochs": 1, "train_epochs": 2, "finetune_epochs": 0, "equal_steps": True}
    network = script["network"]

    def model() -> nn.Module:
        return network(3, width=4)

    def run(lr: float) -> Any:
        recipe = script["Recipe"](lr)
        optimizer = torch.optim.SGD
        return DropHot(
            model, data, data, optimizer=optimizer, fit=recipe, device="cpu", **settings, **lengths
        )

    trained = [run(lr) for lr in (0.1, 0.1, 0.3)]
    for one in trained:
        one.select()
        one.train()
    weights = [nn.utils.parameters_to_vector(one.model.parameters()) for one in trained]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_part_has_both_controls(script: dict[str, Any]) -> None:
    """A table of one part compares with them, also with `--quick`, paired by seed."""
    for quick in (False, True):
        found = script["parts"](10, 3 if quick else 10, every=2 if quick else 10)
        assert set(found) == {"once", "dynamic", "joint"}
        for modes, _ in found.values():
            assert {"random", "fresh_subset"} <= {one for one in modes if isinstance(one, str)}
