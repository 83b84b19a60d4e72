"""The recipe of `examples/resnet_cifar.py` and `benchmarks/little_data.py`, by its definition."""

import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from drophot import Adaptive, DropHot, IndexedDataset


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    path = ROOT / "benchmarks" / "little_data.py"
    sys.path.insert(0, str(Path(path).parent))
    try:
        return runpy.run_path(str(path))
    finally:
        sys.path.pop(0)


def test_images_are_cropped_flipped_and_cut_one_by_one(script: dict[str, Any]) -> None:
    images = torch.rand(60, 3, 16, 12) + 1  # nothing is zero but the holes
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    torch.manual_seed(0)
    found = script["augment"](images)
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    seen, holes = set(), set()
    for number, image in enumerate(found):
        kept = image != 0
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for crop in [padded[number, :, top : top + 16, left : left + 12]]
            if torch.equal((crop.flip(2) if flip else crop) * kept, image)
        ]
        assert len(matches) == 1, "an image of random values shows where it was cut"
        seen |= set(matches)
        rows, columns = ((~kept).any(0).any(dim).nonzero()[:, 0].tolist() for dim in (1, 0))
        assert (~kept[:, rows][:, :, columns]).all(), "a rectangle, in all channels"
        for positions, size in ((rows, 16), (columns, 12)):
            assert positions == list(range(positions[0], positions[-1] + 1))
            assert len(positions) == 4 or (
                2 <= len(positions) < 4 and (positions[0] == 0 or positions[-1] == size - 1)
            )
        holes.add((rows[0], columns[0]))
    assert len(seen) > 20, "each with separate numbers"
    assert len(holes) > 20
    assert {one[0] for one in seen} == {one[1] for one in seen} == set(range(5))
    torch.manual_seed(0)
    assert torch.equal(script["augment"](images), found)


def test_images_are_augmented_in_training_alone(script: dict[str, Any]) -> None:
    images = torch.rand(8, 3, 8, 8)
    model = script["Augmented"](nn.Identity())
    assert torch.equal(model.eval()(images), images)
    assert not torch.equal(model.train()(images), images)


# --- the option of the example ------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    return runpy.run_path(str(ROOT / "examples" / "resnet_cifar.py"))


# Bright or dark images, which a crop and a flip leave so.
SHADES = TensorDataset(
    torch.arange(64).fmod(2).sub(0.5).view(-1, 1, 1, 1) + torch.rand(64, 3, 8, 8) / 4,
    torch.arange(64) % 2,
)


def options(example: dict[str, Any], *more: str, folder: Path) -> Namespace:
    given = ["--recipe", "--epochs", "4", "--batch-size", "8", "--out", str(folder), *more]
    return example["parser"].parse_args(given)


def weights_of(example: dict[str, Any], args: Namespace, seed: int) -> tuple[Tensor, float]:
    """A small network that the example's loop has trained, and its test accuracy."""
    args.out.mkdir(parents=True)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    found = example["train"]("score", model, IndexedDataset(SHADES), SHADES, args, 0.1)
    return nn.utils.parameters_to_vector(model.parameters()).detach(), found


def test_the_recipe_trains_and_one_seed_gives_one_network(
    example: dict[str, Any], tmp_path: Path
) -> None:
    first, again, other = (
        weights_of(example, options(example, folder=tmp_path / name), seed)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first[1] > 0.9, "it has learned"
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_only_batches_of_the_training_set_change(example: dict[str, Any], tmp_path: Path) -> None:
    args = options(example, folder=tmp_path)
    images, labels = SHADES.tensors
    orders = []
    torch.manual_seed(0)
    for _ in range(2):
        epoch = list(example["shuffled"](IndexedDataset(SHADES), args))
        changed, targets, index = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        assert changed.shape == images.shape
        assert torch.equal(targets, labels[index]), "labels follow their images"
        assert sorted(index.tolist()) == list(range(64))
        assert not any(torch.equal(one, images[i]) for one, i in zip(changed, index, strict=True))
        orders.append(index.tolist())
    assert orders[0] != orders[1]

    class Lookup(nn.Module):
        """The class of an image of the data set; class 0 for an image that is not in it."""

        def forward(self, inputs: Tensor) -> Tensor:
            is_known = (inputs[:, None] == images).flatten(2).all(2)
            return is_known.float() @ F.one_hot(labels).float()

    ones = TensorDataset(images[labels == 1], labels[labels == 1])
    assert example["accuracy"](Lookup(), ones, args) == 1, "test images do not change"


def test_the_recipe_is_an_option(example: dict[str, Any]) -> None:
    plain = example["parser"].parse_args([])
    assert not plain.recipe
    images = SHADES.tensors[0]
    plain.batch_size, plain.workers = 64, 0
    (batch,) = example["shuffled"](IndexedDataset(SHADES), plain)
    assert torch.equal(batch[0], images[batch[2]]), "augmented by the transform of the data set"


# --- runs ---------------------------------------------------------------------------------------


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
