"""The five steps on scikit-learn's digits: 1,797 real images of 8x8 pixels, no download.

For each seed, one model is trained on all samples while its forgetting events are counted. It is
the baseline. Then a new model is trained on each of three coresets of the same size: the most
forgotten samples (high), the least forgotten ones (low) and a random subset, which is the control.
Each of the four models is pruned layer by layer and fine-tuned on the full training set with the
removed weights held at zero.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Literal

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from drophot import DropHot
from drophot.models import fcnet
from drophot.report import plot_steps, table


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-ratio", type=float, default=0.2, help="share of samples kept")
    parser.add_argument("--prune-ratio", type=float, default=0.8, help="share of weights removed")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs for each cell")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; cpu is faster here")
    parser.add_argument("--figure", type=Path, default=Path("quickstart.png"), help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)  # for so small a network, several threads are slower

    images, targets = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32) / 8 - 1  # 0 … 16 to [-1, 1]
    targets = torch.tensor(targets)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    train_set = TensorDataset(images[train], targets[train])
    test_set = TensorDataset(images[test], targets[test])

    cells: list[tuple[Literal["high", "low", "random"], float]] = [
        ("high", options.data_ratio),
        ("low", options.data_ratio),
    ]
    cells += [("random", options.data_ratio), ("high", 1.0)]
    print(
        f"{len(train_set)} training and {len(test_set)} test samples, {options.seeds} seeds, "
        f"{len(cells)} runs per seed, {options.epochs} epochs per training: about "
        f"{5 + 0.14 * options.epochs * options.seeds:.0f} seconds on one core."
    )
    start = perf_counter()
    records, forgotten = [], []
    with tqdm(total=options.seeds * len(cells), unit="run") as bar:
        for seed in range(options.seeds):
            scores = None
            for mode, data_ratio in cells:
                run = DropHot(
                    partial(fcnet, in_features=64),
                    train_set,
                    test_set,
                    data_ratio=data_ratio,
                    mode=mode,
                    prune_ratio=options.prune_ratio,
                    score_epochs=options.epochs,
                    train_epochs=options.epochs,
                    finetune_epochs=options.epochs,
                    seed=seed,
                    device=options.device,
                )
                if scores is None:
                    scores = run.score()
                    forgotten.append(float((scores > 0).float().mean()))
                run.scores = scores  # the other runs of this seed use the same scores
                records.append(run.run())
                bar.update()

    print(f"\n{mean(forgotten):.1%} of the training samples were forgotten at least once.")
    print("Test accuracy in %, mean ± standard deviation over seeds, last epoch:\n")
    print(table(records))
    figure = Figure(figsize=(8, 4), layout="constrained")
    plot_steps(records, ax=figure.subplots())
    figure.savefig(options.figure, dpi=150)
    print(f"\n{perf_counter() - start:.0f} seconds. Figure: {options.figure}")


if __name__ == "__main__":
    main()
