"""Seconds and extra memory of global magnitude pruning, beside torch.nn.utils.prune.

Each measurement is a process of its own on a fresh model: seconds for the one call, and extra
memory as the peak of the resident set during the call less what it was before. Two processes take
turns, drophot and the peer, and the medians over rounds are compared. CPU, Linux.
"""

import gc
import json
import statistics
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from time import perf_counter

import torch
from common import save
from torch import nn
from torch.nn.utils import prune as peer
from torchvision import models

from drophot import magnitude_prune
from drophot.prune import Masks

MODELS = {
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "vit_b_16": models.vit_b_16,
    "linear500m": lambda: nn.Sequential(*(nn.Linear(10_000, 10_000) for _ in range(5))),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "vit_b_16"])
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["drophot", "torch"], help="the other one cannot do it")
    parser.add_argument("--measure", nargs=2, help="MODEL drophot|torch: one measurement, as JSON")
    options = parser.parse_args()
    if options.measure:
        name, side = options.measure
        print(json.dumps(measure(name, side, options.ratio)))
        return

    sides = [options.only] if options.only else ["drophot", "torch"]
    figures = []
    for model in options.models:
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side in sides:
                command = [sys.executable, __file__, "--measure", model, side]
                command += ["--ratio", str(options.ratio)]
                output = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds[side].append(json.loads(output.stdout))
        row: dict[str, object] = {"model": model, "ratio": options.ratio, "rounds": options.rounds}
        row["weights_mib"] = rounds[sides[0]][0]["weights_mib"]
        for side in sides:
            seconds = statistics.median(r["seconds"] for r in rounds[side])
            extra = statistics.median(r["extra_mib"] for r in rounds[side])
            row[side] = {
                "seconds": round(seconds, 4),
                "extra_mib": round(extra, 1),
                "extra_over_weights": round(extra / float(rounds[side][0]["weights_mib"]), 3),
                "sparsity": rounds[side][0]["sparsity"],
            }
        if len(sides) == 2:
            row["times_faster"] = round(
                statistics.median(
                    theirs["seconds"] / ours["seconds"]
                    for ours, theirs in zip(rounds["drophot"], rounds["torch"], strict=True)
                ),
                1,
            )
        figures.append(row)
        print(json.dumps(row))
    save(f"prune{'_' + options.only if options.only else ''}", torch.device("cpu"), figures)


def measure(name: str, side: str, ratio: float) -> dict[str, float]:
    torch.manual_seed(0)
    model = MODELS[name]()
    weights = list(Masks.from_zeros(model))
    pairs = [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in weights
    ]
    size = sum(p.nbytes for p in model.parameters())
    # The first call of each loads code and starts threads; that is not what is measured.
    small = nn.Linear(100, 100)
    magnitude_prune(small, 0.5)
    peer.global_unstructured([(small, "weight")], peer.L1Unstructured, amount=0.5)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    start = perf_counter()
    if side == "drophot":
        held: object = magnitude_prune(model, ratio)
    else:
        held = peer.global_unstructured(pairs, peer.L1Unstructured, amount=ratio)
    seconds = perf_counter() - start
    extra = resident("VmHWM") - before
    zeros = sum(int((getattr(module, attribute) == 0).sum()) for module, attribute in pairs)
    total = sum(getattr(module, attribute).numel() for module, attribute in pairs)
    del held
    return {
        "seconds": seconds,
        "extra_mib": extra,
        "weights_mib": round(size / 2**20, 1),
        "sparsity": zeros / total,
    }


def resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(field)


if __name__ == "__main__":
    main()
