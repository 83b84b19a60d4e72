"""Selection methods with little data kept, on MNIST.

    once        methods that select once: random, forgetting, EL2N, AUM, k-center, facility location
    scores      scores of the whole course of training, DUAL's sampling, density facility location
    dynamic     methods that reselect during training: CREST, a fresh subset, loss sampling
    length3     forgetting scored over 3 epochs, with and without class balance
    length40    the same over 40 epochs
    adaptive    coresets selected again every 10 epochs, with two random controls
    joint       the same, with 90 % of the weights removed, after or during training

All but `length` also run with 20 % of the training labels flipped (`once_noisy` and so on).
Adam, learning rate 1e-3, batches of 64, 10 epochs, test accuracy of the last epoch. The coresets of
`once`, `length`, `adaptive` and `joint` are also trained for as many steps as the full set takes.
Coresets that are selected again every 10 epochs are trained for as many steps only, since 10 epochs
on the coreset have a single selection, which is random. Nothing was tuned;
`once_noisy` has a cutoff of 0.2 as well as 0, since 20 % were flipped. After being stopped or
killed, the same command resumes. The records are in benchmarks/results/grid_MODEL_PART.jsonl, and
`python benchmarks/paper.py` generates the tables. `--quick` tries all parts on a few samples, and
writes nothing there.
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

from drophot import Adaptive, DropHot, Grid, Scored, Stratified
from drophot.coreset import Beta
from drophot.models import fcnet, lenet
from drophot.tracking import DUAL, TDDS, FirstLearned, Last, MovingAverage, WindowSpread

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
WINDOW = 5  # of the 10 epochs of scoring
SCORES = [
    Scored(DUAL(window=WINDOW)),
    Scored(DUAL(window=WINDOW), Beta()),
    Scored(WindowSpread(window=WINDOW)),
    Scored(TDDS(num_classes=10, window=WINDOW)),
    *(Scored(score()) for score in (FirstLearned, Last, MovingAverage)),
    "density_facility_location",
]
CUT = Scored("aum", Stratified(hard="low", cutoff=NOISE))
DYNAMIC = ["crest", "fresh_subset", "loss_sampling"]
LENGTH = ["high", Scored(balanced=True)]
CONTROLS = ["random", "fresh_subset", Adaptive("random", every=10)]
ADAPTIVE = [
    *CONTROLS,
    Adaptive("high", every=10),
    Adaptive(Scored("el2n"), every=10),
    Adaptive(Scored("aum", Stratified(hard="low")), every=10),
]
EQUAL, JOINT = ["equal_steps"], ["equal_steps", "joint"]
# Modes, controls, epochs of scoring, share of labels flipped.
PARTS: dict[str, tuple[list[Any], list[Any], int, float]] = {
    "once": (ONCE, EQUAL, 10, 0.0),
    "scores": (SCORES, [], 10, 0.0),
    "dynamic": (DYNAMIC, [], 10, 0.0),
    "length3": (LENGTH, EQUAL, 3, 0.0),
    "length40": (LENGTH, EQUAL, 40, 0.0),
    "once_noisy": ([*ONCE, CUT], [], 10, NOISE),
    "scores_noisy": (SCORES, [], 10, NOISE),
    "dynamic_noisy": (DYNAMIC, [], 10, NOISE),
    "adaptive": (ADAPTIVE, EQUAL, 10, 0.0),
    "adaptive_noisy": (ADAPTIVE, EQUAL, 10, NOISE),
    "joint": (ADAPTIVE, JOINT, 10, 0.0),
    "joint_noisy": (ADAPTIVE, JOINT, 10, NOISE),
}
PRUNE_RATIO = 0.9  # of the parts that prune


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
    parser.add_argument("--quick", action="store_true", help="try it on 1000 samples, one seed")
    options = parser.parse_args()
    train_epochs, samples = 10, None
    if options.quick:
        options.data_ratios, options.seeds, train_epochs, samples = [0.1, 0.5], [0], 6, 1000
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {unknown.pop()!r}; there are {', '.join(PARTS)}")
    for part in options.parts:
        modes, controls, epochs, noise = PARTS[part]
        prune_ratio = PRUNE_RATIO if controls is JOINT else 0
        pipeline = DropHot(
            MODELS[options.model],
            read(options.data_root, noise, samples, train=True),
            read(options.data_root, 0.0, samples, train=False),
            data_ratio=0.5,  # the grid sets this, the mode and the seed
            mode="high",
            prune_ratio=0,
            score_epochs=min(epochs, train_epochs) if options.quick else epochs,
            train_epochs=train_epochs,
            finetune_epochs=0,
            device=options.device,
        )
        grid = Grid(
            pipeline,
            data_ratios=options.data_ratios,
            modes=modes,
            prune_ratios=[prune_ratio],
            seeds=options.seeds,
            controls=controls,
        )
        folder = options.store / ("quick" * options.quick)
        store, start = folder / f"{options.model}_{part}", perf_counter()
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            records = grid.run(store, pool, progress=True)
        path = store / "records.jsonl"
        if not options.quick:
            path = Path(shutil.copy(path, RESULTS / f"grid_{options.model}_{part}.jsonl"))
        print(f"{len(records)} records in {perf_counter() - start:.0f} s: {path}")


def read(root: str, noise: float, samples: int | None, *, train: bool) -> TensorDataset:
    """The first samples of MNIST, all if `None`, a share of them with a wrong label."""
    mnist = MNIST(root, train=train)
    targets, draws = mnist.targets.clone(), torch.Generator().manual_seed(0)
    flipped = torch.rand(len(targets), generator=draws) < noise
    others = torch.randint(1, 10, (int(flipped.sum()),), generator=draws)
    targets[flipped] = (targets[flipped] + others) % 10  # any class except the correct one
    inputs = mnist.data[:samples, None].float() / 127.5 - 1
    return TensorDataset(inputs, targets[:samples])


if __name__ == "__main__":
    main()
