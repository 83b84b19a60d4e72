"""Selection methods with little data kept, on MNIST.

    once        methods that select once: random, forgetting, EL2N, AUM, k-center, facility location
    dynamic     methods that reselect during training: CREST, a fresh subset, loss sampling
    length3     forgetting scored over 3 epochs, with and without class balance
    length40    the same over 40 epochs

The first two also run with 20 % of the training labels flipped (`once_noisy`, `dynamic_noisy`).
Adam, learning rate 1e-3, batches of 64, 10 epochs, test accuracy of the last epoch. The coresets of
`once` and `length` are also trained for as many steps as the full set takes. Nothing was tuned;
`once_noisy` has a cutoff of 0.2 as well as 0, since 20 % were flipped. After being stopped or
killed, the same command resumes. The records are in benchmarks/results/grid_MODEL_PART.jsonl, and
`python benchmarks/paper.py` generates the tables.
"""

import shutil
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import RESULTS
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from drophot import DropHot, Grid, Scored, Stratified
from drophot.models import fcnet, lenet

MODELS = {"fcnet": fcnet, "lenet": lenet}
NOISE = 0.2
ONCE = [
    *("random", "high", "low"),
    Scored(balanced=True),
    Scored("el2n"),
    Scored("aum", Stratified(hard="low")),
    Scored("aum", Stratified(hard="low"), balanced=True),
    *("k_center", "facility_location"),
]
CUT = Scored("aum", Stratified(hard="low", cutoff=NOISE))
DYNAMIC = ["crest", "fresh_subset", "loss_sampling"]
LENGTH = ["high", Scored(balanced=True)]
EQUAL = ["equal_steps"]
# Modes, controls, epochs of scoring, share of labels flipped.
PARTS: dict[str, tuple[list[Any], list[Any], int, float]] = {
    "once": (ONCE, EQUAL, 10, 0.0),
    "dynamic": (DYNAMIC, [], 10, 0.0),
    "length3": (LENGTH, EQUAL, 3, 0.0),
    "length40": (LENGTH, EQUAL, 40, 0.0),
    "once_noisy": ([*ONCE, CUT], [], 10, NOISE),
    "dynamic_noisy": (DYNAMIC, [], 10, NOISE),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parser.add_argument("--model", default="fcnet", choices=list(MODELS))
    parser.add_argument("--data-root", default="data", help="folder that contains MNIST/raw")
    ratios = [0.01, 0.05, 0.1, 0.2, 0.3, 0.5]
    parser.add_argument("--data-ratios", type=float, nargs="+", default=ratios)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--store", type=Path, default=Path("selection"), help="folder of results")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {unknown.pop()!r}; there are {', '.join(PARTS)}")
    for part in options.parts:
        modes, controls, epochs, noise = PARTS[part]
        pipeline = DropHot(
            MODELS[options.model],
            read(options.data_root, noise, train=True),
            read(options.data_root, 0.0, train=False),
            data_ratio=0.5,  # the grid sets this, the mode and the seed
            mode="high",
            prune_ratio=0,
            score_epochs=epochs,
            finetune_epochs=0,
            device=options.device,
        )
        grid = Grid(
            pipeline,
            data_ratios=options.data_ratios,
            modes=modes,
            prune_ratios=[0],
            seeds=options.seeds,
            controls=controls,
        )
        store, start = options.store / f"{options.model}_{part}", perf_counter()
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            records = grid.run(store, pool, progress=True)
        name = f"grid_{options.model}_{part}.jsonl"
        shutil.copy(store / "records.jsonl", RESULTS / name)
        print(
            f"{len(records)} records in {perf_counter() - start:.0f} s: benchmarks/results/{name}"
        )


def read(root: str, noise: float, *, train: bool) -> TensorDataset:
    mnist = MNIST(root, train=train)
    targets, draws = mnist.targets.clone(), torch.Generator().manual_seed(0)
    flipped = torch.rand(len(targets), generator=draws) < noise
    others = torch.randint(1, 10, (int(flipped.sum()),), generator=draws)
    targets[flipped] = (targets[flipped] + others) % 10  # any class except the correct one
    return TensorDataset(mnist.data[:, None].float() / 127.5 - 1, targets)


if __name__ == "__main__":
    main()
