"""The accuracy right after pruning, without fine-tuning: ResNet-18 on real CIFAR-10 images.

One network is trained on a part of the training set. It is pruned to each ratio, by single weights
and by channels, and tested as it is, after `recalibrate_bn` and after `repair`, which both use the
same samples of the training set. The network and each row are kept in a folder, so the same command
resumes after being stopped.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from common import save
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from drophot import training
from drophot.models import resnet18


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="folder", choices=["cifar10", "folder"])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--train-samples", type=int, default=16_000)
    parser.add_argument("--test-samples", type=int, default=2_000)
    parser.add_argument("--samples", type=int, default=1_000, help="to repair with")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, default=Path("repair"), help="folder for the results")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.store.mkdir(exist_ok=True)
    train_set = images(options, "train", options.train_samples)
    test_set = images(options, "test", options.test_samples)
    model = trained(options, train_set)


def images(options: Namespace, part: str, number: int) -> TensorDataset:
    """A random part of a split, decoded."""
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    root = Path(options.data_root)
    if options.data == "folder":
        split = ImageFolder(root / part, scale)
    else:
        split = CIFAR10(root, part == "train", scale)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:number]
    samples = [split[index] for index in order.tolist()]
    inputs, targets = zip(*samples, strict=True)
    return TensorDataset(torch.stack(inputs), torch.tensor(targets))


def trained(options: Namespace, train_set: TensorDataset) -> nn.Module:
    """The dense network, loaded from the store or trained."""
    model = resnet18(10).to(options.device)
    path = options.store / "dense.pt"
    if not path.exists():
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        steps = options.epochs * -(-len(train_set) // 64)
        training.fit(
            model,
            train_set,
            options.epochs,
            optimizer=optimizer,
            seed=options.seed,
            scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
            scheduler_interval="step",
            on_epoch=lambda epoch: print("epoch", epoch, flush=True),
        )
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, map_location=options.device))
    return model.eval()


if __name__ == "__main__":
    main()
