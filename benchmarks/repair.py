"""The accuracy right after pruning, without fine-tuning: ResNet-18 on real CIFAR-10 images.

One network is trained on a part of the training set. It is pruned to each ratio, by single weights
and by channels, and tested as it is, after `recalibrate_bn` and after `repair`, which both use the
same samples of the training set. The network and each row are kept in a folder, so the same command
resumes after being stopped.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from copy import deepcopy
from pathlib import Path

import torch
from common import save
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from drophot import magnitude_prune, training
from drophot.models import resnet18
from drophot.prune import recalibrate_bn, repair
from drophot.structured import prune_channels


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
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9])
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.store.mkdir(exist_ok=True)
    train_set = images(options, "train", options.train_samples)
    test_set = images(options, "test", options.test_samples)
    dense = trained(options, train_set)
    loader = DataLoader(TensorDataset(train_set.tensors[0][: options.samples]), batch_size=125)
    path = options.store / "rows.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    if not rows:
        rows.append({"removed": "nothing", "dense": training.evaluate(dense, test_set)})
    for removed in ("weights", "channels"):
        for ratio in options.ratios:
            if not any(row["removed"] == removed and row["ratio"] == ratio for row in rows[1:]):
                rows.append(measured(dense, removed, ratio, loader, test_set))
            path.write_text(json.dumps(rows))
            print(json.dumps(rows[-1]), flush=True)
    save("repair", torch.device(options.device), rows)


def measured(
    dense: nn.Module, removed: str, ratio: float, loader: DataLoader, test_set: TensorDataset
) -> dict[str, str | float]:
    """The accuracies of the pruned network, as it is and after each correction."""
    pruned, model = None, deepcopy(dense)
    if removed == "weights":
        magnitude_prune(model, ratio, scope="layer")
    else:
        pruned = prune_channels(model, ratio, loader.dataset[:2][0])
    recalibrated, repaired = deepcopy(model), deepcopy(model)
    recalibrate_bn(recalibrated, loader)
    repair(repaired, dense, loader, pruned=pruned)
    return {
        "removed": removed,
        "ratio": ratio,
        "pruned": training.evaluate(model, test_set),
        "recalibrated": training.evaluate(recalibrated, test_set),
        "repaired": training.evaluate(repaired, test_set),
    }


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
