"""Selection with little data kept, on CIFAR-10 or 100 classes of 32x32 images, with ResNet-18.

    once        methods that select once, from scores and features of a training on everything
    dynamic     methods that reselect during training: CREST, a fresh subset, adaptive coresets
    joint       the adaptive ones, with 90 % of the weights removed during training

Each coreset is trained for the same epochs, and for as many steps as the full set takes. Controls
are `random` and `fresh_subset` (RS2). The recipe is that of `examples/resnet_cifar.py --recipe`:
random crops, flips and holes, computed for whole batches on the device; SGD with Nesterov momentum
and weight decay; a learning rate that rises and falls in each step; label smoothing; bfloat16 on a
GPU. `--plain` leaves out all but SGD, needs another `--store`, and leaves the records in it.
After being stopped or killed, the same command resumes. `--data` names a folder of images,
train/CLASS/*.jpg and test/CLASS/*.jpg, all of 32x32. It has not been run on a GPU: the accuracies
and the times are not known.

The records are in benchmarks/results/grid_NAME_PART.jsonl, with the name of the folder, and
`python benchmarks/paper.py` generates the tables of cifar10 and tiny100.

    python benchmarks/little_data.py --data cifar10 --device cuda
    python benchmarks/little_data.py --data cifar10 --quick
"""

import shutil
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.functional import pil_to_tensor

from drophot import Adaptive, DropHot, Grid, Scored, Stratified, fit, report
from drophot.coreset import Beta
from drophot.tracking import DUAL, TDDS, WindowSpread
from drophot.training import BatchLoader

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from resnet_cifar import MEAN, SMOOTHING, STD, augment


class Augmented(nn.Module):
    """A network that augments its inputs while it trains, and computes in bfloat16 on a GPU.

    Random numbers are those of torch's generator of the device, which a run seeds.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        images = augment(images) if self.training else images
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            return self.network(images).float()


@dataclass(frozen=True)
class Recipe:
    """The training loop of a run: drophot's, with a learning rate for each step."""

    lr: float
    smoothing: float = SMOOTHING

    def __call__(self, model: nn.Module, dataset: Any, epochs: int, **options: Any) -> None:
        size, optimizer = options["batch_size"], options["optimizer"]
        is_loader = isinstance(dataset, BatchLoader)
        steps = epochs * (len(dataset) if is_loader else ceil(len(dataset) / size))
        reduction = "none" if is_loader else "mean"  # batches may have weights
        fit(
            model,
            dataset,
            epochs,
            loss=nn.CrossEntropyLoss(label_smoothing=self.smoothing, reduction=reduction),
            scheduler=OneCycleLR(optimizer, self.lr, total_steps=max(steps, 1)),
            scheduler_interval="step",
            **options,
        )


def network(num_classes: int, *, augmented: bool = True, width: int = 64) -> nn.Module:
    """ResNet-18 for images of 32x32; with another width than 64, a ResNet of three blocks."""
    if width == 64:
        net: Any = models.resnet18(num_classes=num_classes)
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    else:
        net = nn.Sequential(
            *(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(BasicBlock(width, width), wider(width), wider(2 * width)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes)),
        )
    return Augmented(net) if augmented else net


def wider(width: int) -> BasicBlock:
    """A residual block that halves the resolution and doubles the number of channels."""
    shortcut = nn.Sequential(
        nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width)
    )
    return BasicBlock(width, 2 * width, 2, shortcut)


RATIOS = {"joint": [0.01, 0.05, 0.1]}  # as in SWaST, arXiv 2511.09901; the others below
OTHER_RATIOS = [0.05, 0.1, 0.2, 0.3]


def parts(num_classes: int, window: int, every: int) -> dict[str, tuple[list[Any], float]]:
    """The modes of each part, and the share of weights that it removes."""
    strata = Scored("aum", Stratified(hard="low"))
    spread, changes = WindowSpread(window=window), TDDS(num_classes=num_classes, window=window)
    dual = Scored(DUAL(window=window), Beta(), balanced=True)
    controls = ["random", "fresh_subset", Adaptive("random", every=every)]
    adaptive = [*controls, *(Adaptive(m, every=every) for m in ("high", Scored("el2n"), strata))]
    once = ["random", "fresh_subset", "high", Scored("el2n"), strata, dual, Scored(spread)]
    return {
        "once": ([*once, Scored(changes), "facility_location"], 0.0),
        "dynamic": ([*adaptive, "crest"], 0.0),
        "joint": (adaptive, 0.9),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["once", "dynamic", "joint"], metavar="PART")
    parser.add_argument("--data", type=Path, required=True, help="folder of train/ and test/")
    parser.add_argument("--data-ratios", type=float, nargs="+", help="kept, in place of the part's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=30, help="of scoring and of training")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate")
    parser.add_argument("--plain", action="store_true", help="leave out the recipe")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--store", type=Path, default=Path("little_data"), help="results")
    parser.add_argument("--quick", action="store_true", help="try it on 40 images a class")
    options = parser.parse_args()
    window, width, each = 10, 64, None
    if options.quick:
        options.data_ratios, options.seeds, options.epochs = [0.3], [0], 3
        options.batch_size, window, width, each = 32, 3, 8, 40
    train_set, num_classes = read(options.data / "train", each)
    test_set, _ = read(options.data / "test", each)
    known = parts(num_classes, window, every=10 if not options.quick else 2)
    if unknown := set(options.parts) - set(known):
        parser.error(f"no part {unknown.pop()!r}; there are {', '.join(known)}")
    for part in options.parts:
        modes, prune_ratio = known[part]
        pipeline = DropHot(
            partial(network, num_classes, augmented=not options.plain, width=width),
            train_set,
            test_set,
            data_ratio=0.5,  # the grid sets this, the mode and the seed
            mode="random",
            prune_ratio=0,
            optimizer=partial(SGD, lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
            fit=fit if options.plain else Recipe(options.lr),
            score_epochs=options.epochs,
            train_epochs=options.epochs,
            finetune_epochs=0,
            batch_size=options.batch_size,
            device=options.device,
        )
        controls = ["equal_steps", *(["joint"] if prune_ratio else [])]
        grid = Grid(
            pipeline,
            data_ratios=options.data_ratios or RATIOS.get(part, OTHER_RATIOS),
            modes=modes,
            prune_ratios=[prune_ratio],
            seeds=options.seeds,
            controls=controls,
        )
        store = options.store / f"{options.data.name}_{part}{'_quick' * options.quick}"
        print(report.table(grid.run(store, progress=True)))
        if not (options.quick or options.plain):
            name = f"grid_{options.data.name}_{part}.jsonl"
            shutil.copy(store / "records.jsonl", RESULTS / name)


def read(folder: Path, each: int | None) -> tuple[TensorDataset, int]:
    """All images of a folder as one tensor, or the first ones of each class; and the classes."""
    images = ImageFolder(str(folder))
    found: dict[int, int] = {}
    inputs, targets = [], []
    for path, target in images.samples:
        found[target] = found.get(target, 0) + 1
        if each is None or found[target] <= each:
            inputs.append(pil_to_tensor(images.loader(path)))
            targets.append(target)
    scaled = torch.stack(inputs).float().div_(255)
    shape = (1, 3, 1, 1)
    scaled.sub_(torch.tensor(MEAN).view(shape)).div_(torch.tensor(STD).view(shape))
    return TensorDataset(scaled, torch.tensor(targets)), len(images.classes)


if __name__ == "__main__":
    main()
