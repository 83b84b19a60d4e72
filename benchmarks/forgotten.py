"""Which training samples a pruned network forgets: FCNet on MNIST, 90 % of the weights removed.

For each seed, a dense network is trained for 10 epochs with Adam, learning rate 1e-3 and batches of
64. A tracker takes the scores of all samples from the batches of that training. The smallest
weights of each layer are removed. The network is compared with the dense one sample by sample right
after that, and after 2 epochs of fine-tuning with the removed weights held at zero. The control is
the dense network after 2 more epochs. The figures are in benchmarks/results/forgotten.json, and
`python benchmarks/paper.py` generates the table. `--quick` tries it on 2000 samples, and writes
nothing there.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from copy import deepcopy
from typing import Any

import torch
from common import save
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

from drophot import DynamicsTracker, IndexedDataset, evaluate, fit, magnitude_prune
from drophot.models import fcnet
from drophot.stats import forgotten_by_pruning

GROUPS = 5
PRUNE_RATIO, FINETUNE_EPOCHS = 0.9, 2


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-root", default="data", help="folder that contains MNIST/raw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10, help="of the dense training")
    parser.add_argument("--quick", action="store_true", help="try it on 2000 samples, one seed")
    options = parser.parse_args()
    samples = None
    if options.quick:
        options.seeds, options.epochs, samples = [0], 3, 2000
    train_set = read(options.data_root, samples, train=True)
    test_set = read(options.data_root, samples, train=False)
    figures = []
    for seed in options.seeds:
        figures += compared(train_set, test_set, seed, options.epochs)
    if not options.quick:
        save("forgotten", torch.device("cpu"), figures)


def compared(
    train_set: TensorDataset, test_set: TensorDataset, seed: int, epochs: int
) -> list[dict[str, Any]]:
    """The samples that each of three networks forgets, by their scores."""
    torch.manual_seed(seed)
    dense = fcnet()
    dynamics = DynamicsTracker(len(train_set), statistics=["el2n", "aum"])
    data = IndexedDataset(train_set)
    fit(dense, data, epochs, optimizer=adam(dense), seed=seed, on_batch=dynamics.update)
    scores = {  # of which high ones are hard
        "forgotten in training": (dynamics.scores() > 0).float(),
        "EL2N": dynamics.scores("el2n"),
        "AUM": -dynamics.scores("aum"),
    }
    longer, pruned = deepcopy(dense), deepcopy(dense)
    masks = magnitude_prune(pruned, PRUNE_RATIO, scope="layer")
    tuned = deepcopy(pruned)
    optimizer = adam(tuned)
    with masks.hold(optimizer, model=tuned):
        fit(tuned, data, FINETUNE_EPOCHS, optimizer=optimizer, seed=seed + 1)
    fit(longer, data, FINETUNE_EPOCHS, optimizer=adam(longer), seed=seed + 1)
    before, margins = evaluated(dense, data)
    networks = {
        "pruned": pruned,
        "pruned, fine-tuned": tuned,
        f"dense, trained for {FINETUNE_EPOCHS} more epochs": longer,
    }
    rows = []
    for name, network in networks.items():
        after, later = evaluated(network, data)
        row: dict[str, Any] = {"network": name, "seed": seed}
        row["test_accuracy"] = [evaluate(one, test_set) for one in (dense, network)]
        row["correct"] = [int(before.sum()), int(after.sum())]
        row["margin"] = [float(margins.mean()), float(later.mean())]
        for score, values in scores.items():
            found = forgotten_by_pruning(before, after, values, GROUPS)
            row["forgotten"], row["gained"] = len(found.indices), len(found.gained)
            row[score] = [found.num_forgotten.tolist(), found.num_correct.tolist()]
        print(row, flush=True)
        rows.append(row)
    return rows


def adam(model: nn.Module) -> Adam:
    return Adam(model.parameters(), lr=1e-3)


def evaluated(model: nn.Module, data: IndexedDataset) -> tuple[Tensor, Tensor]:
    """Whether each sample is correct, and its margin."""
    tracker = DynamicsTracker(len(data), statistics=["aum"])
    tracker.observe(model, DataLoader(data, batch_size=1000))
    return tracker.learned, tracker.scores("aum")


def read(root: str, samples: int | None, *, train: bool) -> TensorDataset:
    """The first samples of MNIST, all if `None`."""
    mnist = MNIST(root, train=train)
    return TensorDataset(mnist.data[:samples, None].float() / 127.5 - 1, mnist.targets[:samples])


if __name__ == "__main__":
    main()
