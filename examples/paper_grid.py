"""The paper's grid on MNIST with FCNet or LeNet: data ratios, modes, prune ratios and seeds.

For each seed one network is trained on all 60,000 images, which gives the forgetting scores and is
the baseline; then one on the least forgotten samples, on the most forgotten and on a random subset,
for each data ratio; each of these is pruned layer by layer to each prune ratio and fine-tuned on
all images with the removed weights held at zero. Adam, learning rate 1e-3, batches of 64, inputs in
[-1, 1], test accuracy of the last epoch. Stopped or killed, the same command goes on where it was.
"""

import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from torchvision import transforms
from torchvision.datasets import MNIST

from drophot import DropHot, Grid, report
from drophot.models import fcnet, lenet

MODELS = {"fcnet": fcnet, "lenet": lenet}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-root", default="data", help="where MNIST/raw is")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is not there")
    parser.add_argument("--model", default="fcnet", choices=list(MODELS))
    parser.add_argument("--protocol", default="paper", choices=["paper", "released"])
    parser.add_argument("--data-ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--modes", nargs="+", default=["low", "high", "random"])
    parser.add_argument("--prune-ratios", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--controls", nargs="*", default=[], help="equal_steps, reinitialize")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    parser.add_argument("--finetune-epochs", type=int, help="where they differ from --epochs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, a thread each")
    parser.add_argument("--store", type=Path, default=Path("paper_grid"), help="folder of results")
    parser.add_argument("--plan", action="store_true", help="say what it would take, and stop")
    options = parser.parse_args()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    try:
        train_set = MNIST(options.data_root, True, transform, download=options.download)
        test_set = MNIST(options.data_root, False, transform)
    except RuntimeError as error:
        parser.error(f"no MNIST in {options.data_root} ({error}); give --download")

    finetune = options.finetune_epochs
    pipeline = DropHot(
        MODELS[options.model],
        train_set,
        test_set,
        data_ratio=0.5,  # this, the mode, the prune ratio and the seed are the grid's to set
        mode="high",
        prune_ratio=0.5,
        protocol=options.protocol,
        score_epochs=options.epochs,
        train_epochs=options.epochs,
        finetune_epochs=options.epochs if finetune is None else finetune,
        device=options.device,
    )
    grid = Grid(
        pipeline,
        data_ratios=options.data_ratios,
        modes=options.modes,
        prune_ratios=options.prune_ratios,
        seeds=options.seeds,
        controls=options.controls,
    )
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        if options.plan:
            print(grid.plan(options.store, pool))
            return
        records = grid.run(options.store, pool, progress=True)
    print("\nTest accuracy in %, last epoch:\n")
    print(report.table(records))
    page = report.html(options.store, options.store / "report.html")
    print(f"\nRecords: {options.store / 'records.jsonl'}. Report: {page}")


if __name__ == "__main__":
    main()
