"""The effect of recalibrating BatchNorm right after pruning: ResNet-18 on CIFAR-10.

The setting is that of the paper's released code, whose pruned networks collapse: ten epochs of
Adam, then the smallest weights of each layer are removed. One network is trained on everything, and
one on each coreset of half of the data. Each is pruned to each ratio and tested before and after
`recalibrate_bn` on a part of the training set. There is no fine-tuning. Networks are kept in a
folder, so the same command resumes after being stopped.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from common import save
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from drophot import DropHot, magnitude_prune, training
from drophot.models import resnet18
from drophot.prune import recalibrate_bn


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="cifar10", choices=["cifar10", "folder"])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--prune-ratios", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8])
    parser.add_argument(
        "--samples", type=int, default=10_000, help="number of samples to recalibrate on"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--store", type=Path, default=Path("recalibrate"), help="folder for the networks"
    )
    options = parser.parse_args()
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    root = Path(options.data_root)
    if options.data == "folder":
        sets = [ImageFolder(root / part, scale) for part in ("train", "test")]
    else:
        sets = [CIFAR10(root, t, scale, download=options.download) for t in (True, False)]
    run = DropHot(
        partial(resnet18, 10),
        *sets,
        data_ratio=0.5,
        mode="high",
        prune_ratio=0.5,
        protocol="released",
        score_epochs=options.epochs,
        train_epochs=options.epochs,
        seed=options.seed,
        device=options.device,
    )
    options.store.mkdir(exist_ok=True)
    networks = trained(run, options.store)
    order = torch.randperm(run.config.num_samples, generator=torch.Generator().manual_seed(0))
    samples = Subset(run.train_set, order[: options.samples].tolist())
    loader = DataLoader(samples, batch_size=64)
    figures = []
    for name, network in networks.items():
        for ratio in options.prune_ratios:
            model = deepcopy(network)
            magnitude_prune(model, ratio, scope="layer")
            row = {"trained on": name, "prune_ratio": ratio}
            row["pruned"] = round(training.evaluate(model, run.test_set), 4)
            recalibrate_bn(model, loader)
            row["recalibrated"] = round(training.evaluate(model, run.test_set), 4)
            figures.append(row)
            print(json.dumps(row), flush=True)
    save("recalibrate", run.device, figures)


def trained(run: DropHot, store: Path) -> dict[str, torch.nn.Module]:
    """The networks of everything and of the coresets, loaded from the store or trained."""
    found = {}
    for name in ("everything", "low", "high", "random"):
        path = store / f"{name}.pt"
        if not path.exists():
            if name == "everything":
                scores = run.score()
                assert run.scorer is not None
                torch.save({"state": run.scorer.state_dict(), "scores": scores}, path)
            else:
                one = run.replace(mode=name)
                one.scores = torch.load(store / "everything.pt")["scores"]
                one.select()
                torch.save({"state": one.train().state_dict()}, path)
        model = run.factory().to(run.device)
        model.load_state_dict(torch.load(path, map_location=run.device)["state"])
        found[name] = model
        print(name, training.evaluate(model, run.test_set), flush=True)
    return found


if __name__ == "__main__":
    main()
