"""The paper's protocol with ResNet-18 or -50 on CIFAR-10, CIFAR-100 or any folder of images.

A network is trained for 10 epochs on all images and their forgetting events are counted; then new
ones are trained on the most forgotten samples, on the least forgotten, on a random subset of the
same size and on everything, pruned layer by layer, and fine-tuned for 10 epochs on the full
training set with the removed weights held at zero. Adam, learning rate 1e-3, batches of 64, no
augmentation, inputs in [-1, 1], test accuracy of the last epoch.

A folder holds train/CLASS/*.jpg and test/CLASS/*.jpg (or .png), all of one size.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from drophot import DropHot, records
from drophot.coreset import Mode
from drophot.models import resnet18, resnet50
from drophot.report import plot_steps, table
from drophot.training import in_memory

MODELS = {"resnet18": resnet18, "resnet50": resnet50}
# Seconds that training on 1,000 images of 32x32 takes on two cores of a CPU.
SECONDS = {"resnet18": 4.0, "resnet50": 8.0}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="cifar10", choices=["cifar10", "cifar100", "folder"])
    parser.add_argument("--data-root", default="data", help="where the data set or the folder is")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR if it is not there")
    parser.add_argument("--model", default="resnet18", choices=list(MODELS))
    parser.add_argument("--data-ratio", type=float, default=0.3, help="share of samples kept")
    parser.add_argument("--prune-ratio", type=float, default=0.8, help="share of weights removed")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("resnet_cifar"), help="of .jsonl and .png")
    options = parser.parse_args()
    try:
        raw_train, raw_test = data(options)
    except (FileNotFoundError, RuntimeError) as error:
        parser.error(f"no {options.data} in {options.data_root} ({error}); CIFAR: --download")

    cells: list[tuple[Mode, float]] = [("high", options.data_ratio), ("low", options.data_ratio)]
    cells += [("random", options.data_ratio), ("high", 1.0)]
    epochs = options.epochs * (1 + sum(1 + ratio for _, ratio in cells))
    images = len(raw_train)  # type: ignore[arg-type]
    minutes = epochs * images * SECONDS[options.model] / 1000 / 60
    print(
        f"{len(cells)} runs, {epochs:.0f} epochs of {images:,} images: about {minutes:.0f} minutes "
        f"on two cores of a CPU for images of 32x32, a small part of that on a GPU."
    )
    start = perf_counter()
    train_set, test_set = (in_memory(raw, options.device) for raw in (raw_train, raw_test))
    found, scores = [], None
    for mode, ratio in cells:
        run = DropHot(
            partial(MODELS[options.model], len(raw_train.classes)),  # type: ignore[attr-defined]
            train_set,
            test_set,
            data_ratio=ratio,
            mode=mode,
            prune_ratio=options.prune_ratio,
            score_epochs=options.epochs,
            train_epochs=options.epochs,
            finetune_epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            device=options.device,
            progress=True,
        )
        if scores is None:
            scores = run.score()
            print(f"{float((scores > 0).float().mean()):.1%} were forgotten at least once.")
        run.scores = scores  # the other runs need not count again
        found.append(run.run())

    print("\nTest accuracy in %, last epoch:\n")
    print(table(found))
    lines, figure = options.out.with_suffix(".jsonl"), options.out.with_suffix(".png")
    records.write(found, lines)
    drawing = Figure(figsize=(8, 4), layout="constrained")
    plot_steps(found, ax=drawing.subplots())
    drawing.savefig(figure, dpi=150)
    print(f"\n{perf_counter() - start:.0f} seconds. Records: {lines}. Figure: {figure}")


def data(options: Namespace) -> tuple[Dataset[Any], Dataset[Any]]:
    scale = transforms.Normalize([0.5] * 3, [0.5] * 3)  # [0, 1] to [-1, 1]
    transform = transforms.Compose([transforms.ToTensor(), scale])
    root = Path(options.data_root)
    if options.data == "folder":
        return ImageFolder(root / "train", transform), ImageFolder(root / "test", transform)
    cifar = CIFAR10 if options.data == "cifar10" else CIFAR100
    train_set, test_set = (
        cifar(root, train=train, transform=transform, download=options.download)
        for train in (True, False)
    )
    return train_set, test_set


if __name__ == "__main__":
    main()
