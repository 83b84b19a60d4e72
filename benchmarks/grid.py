"""The paper's grid, with drophot and with the method of the released code (`benchmarks/naive.py`).

Both sides compute the same cells of the released protocol on one machine in one run, with all of
its cores. drophot uses one process per core and one thread per process. The released code runs
twice: with the numbers of threads and loader workers that are fastest in a trial here, and with
torch's default number of threads and one worker per core.

The whole grid (five data ratios, low and high, five prune ratios, 10 epochs) takes 590 epochs with
drophot, and 910 with the released code, which trains a coreset again for each prune ratio. Times
for the whole grid are extrapolated from these cells by the number of epochs. With --whole, drophot
runs all of it.
"""

import json
import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from common import save
from naive import Naive
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.datasets import MNIST, ImageFolder

from drophot import DropHot, Grid, Record
from drophot.models import fcnet, lenet, resnet18

MODELS = {"fcnet": fcnet, "lenet": lenet, "resnet18": resnet18}
RELEASED, SHARED = 910, 590  # epochs of the whole grid


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-root", default="data", help="contains MNIST/raw, or train and test")
    parser.add_argument("--model", default="fcnet", choices=list(MODELS))
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="number of processes of drophot"
    )
    parser.add_argument("--whole", action="store_true", help="run the whole grid with drophot")
    options = parser.parse_args()
    device = torch.device(options.device)
    train_set, test_set = data(options.data_root, options.model)
    make = MODELS[options.model]
    settings = fastest(make, train_set, device, options.jobs)

    started = perf_counter()
    pipeline = released(make, train_set, test_set, options.epochs, device)
    decoding = perf_counter() - started
    records, epochs, ours = run(pipeline, [0.3], [0.2, 0.4, 0.6, 0.8], options.jobs)
    cells = [(r.mode, r.keep_ratio, r.prune_ratio) for r in records]
    whole_s = SHARED * ours / epochs
    if options.whole:
        ten = released(make, train_set, test_set, 10, device)
        *_, whole_s = run(ten, [0.1, 0.2, 0.3, 0.4, 0.5], [0, 0.2, 0.4, 0.6, 0.8], options.jobs)

    found: dict[str, Any] = {
        "model": options.model,
        "cells": len(cells),
        "drophot": {
            "processes": options.jobs,
            "decoding_s": round(decoding, 2),
            "epochs": round(epochs, 2),
            "grid_s": round(ours, 1),
            "epoch_s": round(ours / epochs, 3),
            "whole_grid_s": round(whole_s, 1),
            "whole_grid": "run" if options.whole else "extrapolated",
            "accuracies": {
                str(cell): accuracies(r) for cell, r in zip(cells, records, strict=True)
            },
        },
        "trial_epoch_s": {str(setting): round(s, 2) for setting, s in settings.items()},
    }
    best = min(settings, key=lambda setting: settings[setting])
    own = (torch.get_num_threads(), options.jobs)
    for name, (threads, workers) in {"fastest": best, "own": own}.items():
        if name == "own" and own == best:
            continue
        torch.set_num_threads(threads)
        naive = Naive(
            make, train_set, test_set, epochs=options.epochs, workers=workers, device=device
        )
        started = perf_counter()
        results = naive.run(cells)
        seconds = perf_counter() - started
        torch.set_num_threads(own[0])
        passes = naive.trained_on / len(train_set)  # type: ignore[arg-type]
        found[f"released_{name}"] = {
            "threads": threads,
            "workers": workers,
            "epochs": round(passes, 2),
            "grid_s": round(seconds, 1),
            "epoch_s": round(seconds / passes, 3),
            "these_cells": round(seconds / (ours + decoding), 1),
            "an_epoch": round(seconds / passes / (ours / epochs), 1),
            "whole_grid": round(RELEASED * seconds / passes / (whole_s + decoding), 1),
            "accuracies": {str(cell): [round(a, 4) for a in r] for cell, r in results.items()},
        }
    print(json.dumps(found, indent=2))
    save(f"grid_{options.model}_{device.type}", device, found)


def released(
    make: Any, train_set: Dataset[Any], test_set: Dataset[Any], epochs: int, device: torch.device
) -> DropHot:
    return DropHot(
        make,
        train_set,
        test_set,
        data_ratio=0.5,
        mode="high",
        prune_ratio=0.5,
        protocol="released",
        score_epochs=epochs,
        train_epochs=epochs,
        finetune_epochs=epochs,
        device=device,
    )


def run(
    pipeline: DropHot, data_ratios: list[float], prune_ratios: list[float], jobs: int
) -> tuple[list[Record], float, float]:
    """The records of a grid, its epochs and its seconds, with new processes and a new store."""
    grid = Grid(
        pipeline,
        data_ratios=data_ratios,
        modes=["low", "high"],
        prune_ratios=prune_ratios,
        seeds=[0],
    )
    with (
        TemporaryDirectory() as store,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        list(
            pool.map(warm_up, [pipeline.device.type] * 2 * jobs)
        )  # the time of imports is not measured on either side
        epochs = grid.plan(executor=pool).epochs
        started = perf_counter()
        records = grid.run(store, pool)
        return records, epochs, perf_counter() - started


def data(root: str, model: str) -> tuple[Dataset[Any], Dataset[Any]]:
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    if model == "resnet18":
        folder = Path(root)
        return ImageFolder(folder / "train", transform), ImageFolder(folder / "test", transform)
    return MNIST(root, True, transform), MNIST(root, False, transform)


def fastest(
    make: Any, train_set: Dataset[Any], device: torch.device, cores: int
) -> dict[tuple[int, int], float]:
    """Estimated seconds per epoch of the released code, by threads and workers."""
    few = Subset(train_set, range(12_800))
    before, found = torch.get_num_threads(), {}
    for threads in sorted({1, before}):
        for workers in sorted({0, 1, cores}):
            torch.set_num_threads(threads)
            naive = Naive(make, few, few, epochs=1, workers=workers, device=device)
            model = make().to(device)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            naive.train(model, optimizer, Subset(few, range(640)))
            started = perf_counter()
            naive.train(model, optimizer, few)
            found[threads, workers] = (perf_counter() - started) * len(train_set) / len(few)  # type: ignore[arg-type]
    torch.set_num_threads(before)
    return found


def warm_up(kind: str) -> None:
    torch.zeros(1, device=kind)


def accuracies(record: Any) -> list[float]:
    return [record.trained_accuracy, record.pruned_accuracy, record.finetuned_accuracy]


if __name__ == "__main__":
    main()
