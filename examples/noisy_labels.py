"""Train with wrong labels: does it help to drop the samples with the lowest AUM first?

A share of MNIST's training labels is flipped. The samples are ranked by AUM over one training on
all of them. Then five networks are trained, pruned and fine-tuned with different samples:

    everything                   all samples, including those with wrong labels
    lowest AUM dropped           without the share of samples with the lowest AUM
    dropped in training only     without that share in the first training, but with it in
                                 fine-tuning, as in step 5 of the paper: a mode of DropHot
    random share dropped         the control: without a random share of the same size
    right labels only            the upper bound: without all flipped samples

The share dropped is --drop, which is the share flipped by default. In practice, choose it on a
validation set. Test labels are correct, and test accuracies are those of the last epoch.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import MNIST

from drophot import DropHot, DynamicsTracker, IndexedDataset, Record, Scored, fit, select
from drophot.models import fcnet, lenet

MODELS = {"fcnet": fcnet, "lenet": lenet}
SECONDS = {"fcnet": 0.9, "lenet": 3.5}  # an epoch of 60,000 images on one core

parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("--data-root", default="data", help="folder that contains MNIST/raw")
parser.add_argument("--download", action="store_true", help="download MNIST if it is missing")
parser.add_argument("--model", default="fcnet", choices=list(MODELS))
parser.add_argument("--epochs", type=int, default=5, help="epochs of each training")
parser.add_argument("--noise", type=float, default=0.2, help="share of labels flipped")
parser.add_argument("--drop", type=float, help="share dropped; the share flipped by default")
parser.add_argument("--prune-ratio", type=float, default=0.8)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--device", default="cpu", help="cpu or cuda")


def images(mnist: MNIST, targets: Tensor) -> TensorDataset:
    return TensorDataset(mnist.data[:, None].float() / 127.5 - 1, targets)


def flip(targets: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Give a share of the samples a random wrong class."""
    draws = torch.Generator().manual_seed(seed)
    flipped = torch.rand(len(targets), generator=draws) < share
    others = torch.randint(1, 10, targets.shape, generator=draws)
    return torch.where(flipped, (targets + others) % 10, targets), flipped


def main() -> None:
    options = parser.parse_args()
    try:
        train, test = (
            MNIST(options.data_root, train=part, download=options.download)
            for part in (True, False)
        )
    except RuntimeError as error:
        parser.error(
            f"found no MNIST in {options.data_root} ({error}). To download it, add --download."
        )
    drop = options.noise if options.drop is None else options.drop
    trainings = len(options.seeds) * 12 * options.epochs
    minutes = trainings * SECONDS[options.model] / 60
    print(f"{trainings} epochs: about {minutes:.0f} minutes on one core of a CPU.\n")
    start = perf_counter()
    torch.set_num_threads(1)
    test_set = images(test, test.targets)
    found: dict[str, list[Record]] = {}
    for seed in options.seeds:
        targets, flipped = flip(train.targets, options.noise, seed)
        noisy = images(train, targets)
        aum = follow(noisy, options, seed)
        clean = select(aum, 1 - drop, "high", seed=seed)  # the samples with the highest AUM
        caught = 1 - float(flipped[clean].sum() / flipped.sum())
        print(f"seed {seed}: {caught:.1%} of the flipped samples are among those dropped")
        every = {"data_ratio": 1.0, "mode": "random"}
        pipelines: dict[str, tuple[Dataset[Any], dict[str, Any]]] = {
            "everything": (noisy, every),
            "lowest AUM dropped": (Subset(noisy, clean.tolist()), every),
            "dropped in training only": (
                noisy,
                {"data_ratio": 1 - drop, "mode": Scored("aum", "high"), "forgetting": "toneva"},
            ),
            "random share dropped": (
                Subset(noisy, select(aum, 1 - drop, "random", seed=seed).tolist()),
                every,
            ),
            "right labels only": (Subset(noisy, (~flipped).nonzero()[:, 0].tolist()), every),
        }
        for name, (samples, settings) in pipelines.items():
            run = DropHot(
                MODELS[options.model],
                samples,
                test_set,
                prune_ratio=options.prune_ratio,
                score_epochs=options.epochs,
                train_epochs=options.epochs,
                finetune_epochs=options.epochs,
                seed=seed,
                device=options.device,
                **settings,
            )
            run.scores = aum.cpu() if "forgetting" in settings else None
            found.setdefault(name, []).append(run.run())
    print("\n" + table(found, options.prune_ratio))
    print(f"\n{perf_counter() - start:.0f} seconds.")


def follow(noisy: TensorDataset, options: Any, seed: int) -> Tensor:
    """Compute the AUM of every sample in one training on all of them."""
    samples = IndexedDataset(noisy)
    tracker = DynamicsTracker(len(samples))
    torch.manual_seed(seed)
    model = MODELS[options.model]().to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(
        model,
        samples,
        options.epochs,
        optimizer=optimizer,
        seed=seed,
        on_batch=tracker.update,
    )
    return tracker.scores("aum")


def table(found: dict[str, list[Record]], prune_ratio: float) -> str:
    """Mean and standard deviation over seeds, in %."""
    steps = ("trained_accuracy", "pruned_accuracy", "finetuned_accuracy")
    lines = [
        f"| samples | n | before pruning | {prune_ratio:.0%} removed | after fine-tuning |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, records in found.items():
        cells = []
        for step in steps:
            values = [100 * getattr(record, step) for record in records]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        lines.append(f"| {name} | {len(records)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
