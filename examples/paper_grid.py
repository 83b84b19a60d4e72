"""The paper's grid: data ratios, modes, prune ratios and seeds, for any of the paper's networks.

FCNet and LeNet learn MNIST; ResNet-18 and ResNet-50 learn CIFAR-10, CIFAR-100 or a folder of images
of one size, train/CLASS/*.jpg and test/CLASS/*.jpg (or .png).

For each seed, one network is trained on all images. It gives the forgetting scores and is the
baseline. For each data ratio, a network is trained on the least forgotten samples, on the most
forgotten samples and on a random subset. Each network is pruned layer by layer to each prune ratio
and fine-tuned on all images with the removed weights held at zero; --structured removes channels
instead. The optimizer is Adam with a learning rate of 1e-3 and batches of 64. There is no
augmentation, and inputs are in [-1, 1]. Test accuracies are those of the last epoch. After being
stopped or killed, the same command resumes.
"""

import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, ImageFolder

from drophot import DropHot, Grid, report
from drophot.models import fcnet, lenet, resnet18, resnet50

GRAY = {"fcnet": fcnet, "lenet": lenet}  # for images of 28x28, in gray
COLORED = {"resnet18": resnet18, "resnet50": resnet50}
DATA = {"mnist": MNIST, "cifar10": CIFAR10, "cifar100": CIFAR100}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="fcnet", choices=[*GRAY, *COLORED])
    parser.add_argument("--data", default="mnist", choices=[*DATA, "folder"])
    parser.add_argument("--data-root", default="data", help="where MNIST/raw or similar is")
    parser.add_argument("--download", action="store_true", help="download missing data")
    parser.add_argument("--protocol", default="paper", choices=["paper", "released"])
    parser.add_argument("--data-ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--modes", nargs="+", default=["low", "high", "random"])
    parser.add_argument("--prune-ratios", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--controls", nargs="*", default=[], help="see drophot.Grid")
    parser.add_argument("--scope", default="layer", choices=["layer", "global", "erk", "lamp"])
    parser.add_argument("--structured", action="store_true", help="remove channels, not weights")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    parser.add_argument("--finetune-epochs", type=int, help="if different from --epochs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes, one thread each"
    )
    parser.add_argument("--store", type=Path, default=Path("paper_grid"), help="folder of results")
    parser.add_argument("--plan", action="store_true", help="print an estimate and stop")
    options = parser.parse_args()
    if (options.model in GRAY) != (options.data == "mnist"):
        parser.error(f"--model {options.model} cannot be trained on --data {options.data}")
    try:
        train_set, test_set = read(options)
    except (FileNotFoundError, RuntimeError) as error:
        fix = "Choose another --data-root." if options.data == "folder" else "Add --download."
        parser.error(f"found no {options.data} in {options.data_root} ({error}). {fix}")

    model = GRAY.get(options.model)
    if model is None:
        model = partial(COLORED[options.model], len(train_set.classes))  # type: ignore[attr-defined]
    finetune = options.finetune_epochs
    pipeline = DropHot(
        model,
        train_set,
        test_set,
        data_ratio=0.5,  # the grid sets this, the mode, the prune ratio and the seed
        mode="high",
        prune_ratio=0.5,
        protocol=options.protocol,
        scope=options.scope,
        structured=options.structured,
        score_epochs=options.epochs,
        train_epochs=options.epochs,
        finetune_epochs=options.epochs if finetune is None else finetune,
        device=options.device,
    )
    grid = Grid(
        pipeline,
        data_ratios=options.data_ratios,
        modes=options.modes,
        prune_ratios=options.prune_ratios,
        seeds=options.seeds,
        controls=options.controls,
    )
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        if options.plan:
            print(grid.plan(options.store, pool))
            return
        records = grid.run(options.store, pool, progress=True)
    print("\nTest accuracy in %, last epoch:\n")
    print(report.table(records))
    page = report.html(options.store, options.store / "report.html")
    print(f"\nRecords: {options.store / 'records.jsonl'}. Report: {page}")


def read(options: Namespace) -> tuple[Dataset[Any], Dataset[Any]]:
    scale = transforms.Normalize(0.5, 0.5)  # [0, 1] to [-1, 1]
    transform = transforms.Compose([transforms.ToTensor(), scale])
    root = Path(options.data_root)
    if options.data == "folder":
        return ImageFolder(root / "train", transform), ImageFolder(root / "test", transform)
    kind, fetch = DATA[options.data], options.download
    train_set = kind(root, train=True, transform=transform, download=fetch)
    return train_set, kind(root, train=False, transform=transform, download=fetch)


if __name__ == "__main__":
    main()
