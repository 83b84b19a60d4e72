"""The paper's protocol on MNIST with LeNet and FCNet, for one cell of its grid.

Each network is trained for 10 epochs on all 60,000 images and its forgetting events are counted;
then new ones are trained on the most forgotten samples, on the least forgotten, on a random subset
of the same size and on everything, pruned layer by layer, and fine-tuned for 10 epochs on the full
training set with the removed weights held at zero. Adam, learning rate 1e-3, batches of 64, inputs
in [-1, 1], test accuracy of the last epoch.
"""

import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import MNIST
from tqdm.auto import tqdm

from drophot import DropHot, Record, records
from drophot.coreset import Mode
from drophot.models import fcnet, lenet
from drophot.report import plot_steps, table
from drophot.training import in_memory

MODELS = {"fcnet": fcnet, "lenet": lenet}
# Seconds that an epoch of 60,000 images takes on one core.
SECONDS = {"fcnet": 2.0, "lenet": 10.0}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-root", default="data", help="where MNIST/raw is")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is not there")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--data-ratio", type=float, default=0.3, help="share of samples kept")
    parser.add_argument("--prune-ratio", type=float, default=0.8, help="share of weights removed")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs side by side, one thread each"
    )
    parser.add_argument("--out", type=Path, default=Path("lenet_mnist"), help="of .jsonl and .png")
    options = parser.parse_args()
    try:
        MNIST(options.data_root, download=options.download)
    except RuntimeError as error:
        parser.error(f"no MNIST in {options.data_root} ({error}); give --download")

    cells: list[tuple[Mode, float]] = [("high", options.data_ratio), ("low", options.data_ratio)]
    cells += [("random", options.data_ratio), ("high", 1.0)]
    share = 1 + sum(1 + ratio for _, ratio in cells)  # of the full set, in each of the epochs
    work = sum(SECONDS[name] * share * options.epochs for name in options.models) / options.jobs
    print(
        f"{len(options.models) * len(cells)} runs, {share * options.epochs:.0f} epochs of 60,000 "
        f"images for each network: about {work / 60:.0f} minutes on {options.jobs} cores of a CPU."
    )
    start = perf_counter()
    found: list[Record] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        # The slowest first, so that the cores are busy to the end.
        names = sorted(options.models, key=lambda name: -SECONDS[name])
        scored = {pool.submit(score, name, options): name for name in names}
        runs = []
        with tqdm(total=len(names) * (1 + len(cells)), unit="run") as bar:
            for future in as_completed(scored):
                name, scores = scored[future], future.result()
                bar.update()
                bar.write(
                    f"{name}: {float((scores > 0).float().mean()):.1%} forgotten at least once"
                )
                runs += [pool.submit(cell, name, m, r, scores, options) for m, r in cells]
            for future in as_completed(runs):
                found.append(future.result())
                bar.update()

    order = [(name, mode, ratio) for name in options.models for mode, ratio in cells]
    found.sort(key=lambda record: order.index((record.model, record.mode, record.keep_ratio)))
    print("\nTest accuracy in %, last epoch:\n")
    print(table(found))
    lines, figure = options.out.with_suffix(".jsonl"), options.out.with_suffix(".png")
    records.write(found, lines)
    drawing = Figure(figsize=(8, 4), layout="constrained")
    plot_steps(found, ax=drawing.subplots())
    drawing.savefig(figure, dpi=150)
    print(f"\n{perf_counter() - start:.0f} seconds. Records: {lines}. Figure: {figure}")


def score(name: str, options: Namespace) -> Tensor:
    return pipeline(name, "high", options.data_ratio, options).score()


def cell(name: str, mode: Mode, ratio: float, scores: Tensor, options: Namespace) -> Record:
    run = pipeline(name, mode, ratio, options)
    run.scores = scores
    return run.run()


def pipeline(name: str, mode: Mode, ratio: float, options: Namespace) -> DropHot:
    torch.set_num_threads(1)
    train_set, test_set = data(options.data_root, options.device)
    return DropHot(
        MODELS[name],
        train_set,
        test_set,
        data_ratio=ratio,
        mode=mode,
        prune_ratio=options.prune_ratio,
        score_epochs=options.epochs,
        train_epochs=options.epochs,
        finetune_epochs=options.epochs,
        seed=options.seed,
        device=options.device,
    )


@cache
def data(root: str, device: str) -> tuple[Dataset, Dataset]:
    """MNIST as tensors, decoded once in each process."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    train_set, test_set = (MNIST(root, train, transform) for train in (True, False))
    return in_memory(train_set, device), in_memory(test_set, device)


if __name__ == "__main__":
    main()
