"""Importances compared with magnitude and with random numbers, on MNIST.

    global      single weights of FCNet, ranked over all layers
    lamp        the same by scope="lamp", which is a ranking of magnitudes
    channels    channels of LeNet with BatchNorm

Each part is a grid: the networks of each seed, trained on everything and on the half that was
forgotten most often, are trained once and pruned by each importance. Then all fine-tune for the
same number of steps. A ratio of 0 is the dense network with the same fine-tuning. L1 and L2 rank
single weights as magnitude does, and channels by the sums of both, of which L2 is called magnitude.
Taylor and Wanda see the training set once, and Fisher sees 1,024 samples one by one. Nothing was
tuned. After being stopped or killed, the same command resumes. The records are in
benchmarks/results/grid_importances_PART.jsonl, and `python benchmarks/paper.py` generates the
tables. `--quick` tries all parts on a few samples, and writes nothing there.
"""

import shutil
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import RESULTS
from selection import read
from torch import Tensor, nn

from drophot import DropHot, Grid
from drophot.models import fcnet
from drophot.prune.importances import (
    BatchNormScale,
    Fisher,
    FromBatches,
    Random,
    Taylor,
    Wanda,
    l1,
    layer_normalized,
)

FISHER_SAMPLES = 1024


def fisher(model: nn.Module, batches: Iterator[tuple[Tensor, ...]]) -> Fisher:
    """Batches of one sample, whose squared gradients are the Fisher information."""
    samples = (
        (x[None], y[None])
        for inputs, targets, *_ in batches
        for x, y in zip(inputs, targets, strict=True)
    )
    return Fisher(model, islice(samples, FISHER_SAMPLES))


def taylor_of_channels(model: nn.Module, batches: Iterator[tuple[Tensor, ...]]) -> Taylor:
    return Taylor(model, batches, channels=True)


def bn_scale(model: nn.Module, batches: Iterator[tuple[Tensor, ...]]) -> BatchNormScale:
    return BatchNormScale(model, next(batches)[0])


def random(model: nn.Module, batches: Iterator[tuple[Tensor, ...]]) -> Random:
    """Other random numbers in each run, drawn from its generator, so that masks vary over seeds."""
    return Random(int(torch.randint(2**31, ())))


def lenet_bn() -> nn.Module:
    """LeNet, as in drophot.models, with BatchNorm after each layer but the last."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 120), nn.BatchNorm1d(120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.ReLU(), nn.Linear(84, 10)),
    )


SENSITIVE = [FromBatches(Taylor), FromBatches(fisher)]
OF_CHANNELS = [FromBatches(taylor_of_channels), FromBatches(fisher), FromBatches(bn_scale)]
WEIGHTS, CHANNELS = [0.9, 0.95, 0.98], [0.5, 0.75]
# The network, the settings, the shares removed, and the importances; `None` is magnitude.
PARTS: dict[str, tuple[Any, dict[str, Any], list[float], list[Any]]] = {
    "global": (
        fcnet,
        {"scope": "global"},
        WEIGHTS,
        [None, layer_normalized, *SENSITIVE, FromBatches(Wanda), FromBatches(random)],
    ),
    "lamp": (fcnet, {"scope": "lamp"}, WEIGHTS, [None]),
    "channels": (
        lenet_bn,
        {"structured": True},
        CHANNELS,
        [None, l1, *OF_CHANNELS, FromBatches(random)],
    ),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parser.add_argument("--data-root", default="data", help="folder that contains MNIST/raw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-samples", type=int, help="the first of the training set")
    parser.add_argument("--epochs", type=int, default=10, help="of scoring and of training")
    parser.add_argument("--finetune-epochs", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--store", type=Path, default=Path("importances"), help="folder of results")
    parser.add_argument("--quick", action="store_true", help="try it on 1000 samples, one seed")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {unknown.pop()!r}; there are {', '.join(PARTS)}")
    tested = None
    if options.quick:
        options.seeds, options.epochs, options.finetune_epochs = [0], 1, 1
        options.train_samples = tested = 1000
    train_set = read(options.data_root, 0.0, options.train_samples, train=True)
    test_set = read(options.data_root, 0.0, tested, train=False)
    for part in options.parts:
        network, settings, ratios, importances = PARTS[part]
        pipeline = DropHot(
            network,
            train_set,
            test_set,
            data_ratio=0.5,
            mode="high",
            prune_ratio=ratios[0],  # the grid sets this, the importance and the seed
            score_epochs=options.epochs,
            train_epochs=options.epochs,
            finetune_epochs=options.finetune_epochs,
            device=options.device,
            **settings,
        )
        grid = Grid(
            pipeline,
            data_ratios=[0.5],
            modes=["high"],
            prune_ratios=[0.0, *ratios],
            importances=importances,
            seeds=options.seeds,
        )
        store, start = options.store / ("quick" * options.quick) / part, perf_counter()
        records = grid.run(store, progress=True)
        path = store / "records.jsonl"
        if not options.quick:
            path = Path(shutil.copy(path, RESULTS / f"grid_importances_{part}.jsonl"))
        print(f"{len(records)} records in {perf_counter() - start:.0f} s: {path}")


if __name__ == "__main__":
    main()
