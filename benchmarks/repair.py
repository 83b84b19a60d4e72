"""The accuracy right after pruning, without fine-tuning: ResNet-18 on CIFAR-10, LeNet on MNIST.

For each seed, one network is trained on a random part of the training set. It is pruned to each
ratio, by single weights and by channels, and tested as it is, after `recalibrate_bn` and after
`repair`, which both use the same samples of the training set. LeNet has no BatchNorm, so
`recalibrate_bn` does not apply. The networks and each row are kept in a folder, so the same command
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
from torchvision.datasets import CIFAR10, MNIST, ImageFolder

from drophot import magnitude_prune, training
from drophot.models import lenet, resnet18
from drophot.prune import recalibrate_bn, repair
from drophot.structured import prune_channels


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="folder", choices=["cifar10", "folder", "mnist"])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--train-samples", type=int, default=16_000)
    parser.add_argument("--test-samples", type=int, default=2_000)
    parser.add_argument("--samples", type=int, default=1_000, help="to repair with")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, default=Path("repair"), help="folder for the results")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--channel-ratios", type=float, nargs="+", help="the same if not given")
    options = parser.parse_args()
    options.store.mkdir(parents=True, exist_ok=True)
    network = "lenet" if options.data == "mnist" else "resnet18"
    path = options.store / f"{network}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in options.seeds:
        options.seed = seed
        train_set = images(options, True, options.train_samples)
        test_set = images(options, False, options.test_samples)
        dense = trained(options, network, train_set)
        loader = DataLoader(TensorDataset(train_set.tensors[0][: options.samples]), batch_size=125)
        cells = [("nothing", 0.0)]
        cells += [("weights", ratio) for ratio in options.ratios]
        cells += [("channels", ratio) for ratio in options.channel_ratios or options.ratios]
        for removed, ratio in cells:
            cell = {"seed": seed, "removed": removed, "ratio": ratio}
            if any(cell.items() <= row.items() for row in rows):
                continue
            rows.append(cell | measured(dense, removed, ratio, loader, test_set))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
        save(f"repair_{network}", torch.device(options.device), rows)


def measured(
    dense: nn.Module, removed: str, ratio: float, loader: DataLoader, test_set: TensorDataset
) -> dict[str, float]:
    """The accuracies of the pruned network, as it is and after each correction."""
    if removed == "nothing":
        return {"dense": training.evaluate(dense, test_set)}
    pruned, model = None, deepcopy(dense)
    if removed == "weights":
        magnitude_prune(model, ratio, scope="layer")
    else:
        pruned = prune_channels(model, ratio, loader.dataset[:2][0])
    found = {"pruned": training.evaluate(model, test_set)}
    if any(isinstance(one, nn.BatchNorm2d) for one in model.modules()):
        recalibrated = deepcopy(model)
        recalibrate_bn(recalibrated, loader)
        found["recalibrated"] = training.evaluate(recalibrated, test_set)
    repair(model, dense, loader, pruned=pruned)
    return found | {"repaired": training.evaluate(model, test_set)}


def images(options: Namespace, train: bool, number: int) -> TensorDataset:
    """A random part of a split, decoded; another part of the training set for each seed."""
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    root = Path(options.data_root)
    if options.data == "folder":
        split = ImageFolder(root / ("train" if train else "test"), scale)
    else:
        split = {"cifar10": CIFAR10, "mnist": MNIST}[options.data](root, train, scale)
    generator = torch.Generator().manual_seed(options.seed if train else 0)
    order = torch.randperm(len(split), generator=generator)[:number]
    samples = [split[index] for index in order.tolist()]
    inputs, targets = zip(*samples, strict=True)
    return TensorDataset(torch.stack(inputs), torch.tensor(targets))


def trained(options: Namespace, network: str, train_set: TensorDataset) -> nn.Module:
    """The dense network, loaded from the store or trained."""
    torch.manual_seed(options.seed)
    model = {"lenet": lenet, "resnet18": resnet18}[network](10).to(options.device)
    path = options.store / f"{network}_{options.seed}.pt"
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
