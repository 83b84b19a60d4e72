"""Prune to half of the parameters with drophot, Torch-Pruning and torch-kirigami.

`pip install --no-deps torch-pruning==1.6.1 torch-kirigami==0.2.1` installs the other libraries. All
sides rank by L2 magnitude over all layers; the networks are torchvision's, with random weights.
torch-kirigami is used as in its README. Torch-Pruning has no budget: as in its benchmarks, its
global ranking removes channels in steps, here 100, until the network is small enough, widths of ViT
are multiples of the number of heads, and ViT's attribute `hidden_dim` is repaired.

Seconds are processor time of one thread. Latency is the median processor time of calls of one
sample, with the dense and the pruned network in turns. A side that raises an error, or needs more
than `--seconds`, gets a row that says so. Rows of earlier runs for other networks and sides stay in
`results/budget_peers.json`.
"""

from __future__ import annotations

import json
import signal
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from importlib.metadata import version
from statistics import median
from time import process_time
from typing import Any

import torch
from common import RESULTS, save
from torch import Tensor, nn
from torchvision import models

from drophot import summary
from drophot.structured import Budget, prune_channels

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": models.resnet50,
    "convnext_tiny": models.convnext_tiny,
    "vit_b_16": models.vit_b_16,
    "mobilenet_v3_large": models.mobilenet_v3_large,
}
STEPS = 100  # of Torch-Pruning


class TimeLimitError(BaseException):
    """The limit of processor time is reached; not an Exception, which a library may catch."""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--share", type=float, default=0.5, help="of the parameters that is kept")
    parser.add_argument("--seconds", type=int, default=300, help="limit of processor time")
    parser.add_argument("--calls", type=int, default=10, help="of each network, for the latency")
    options = parser.parse_args()
    signal.signal(signal.SIGPROF, stop)
    path = RESULTS / "budget_peers.json"
    rows = json.loads(path.read_text())["figures"]["rows"] if path.exists() else []
    for name in options.networks:
        for side in options.sides:
            row = measure(name, side, options.share, options.seconds, options.calls)
            rows = [old for old in rows if (old["network"], old["side"]) != (name, side)]
            rows.append(row)
            print(json.dumps(row), flush=True)
            used = {lib: found(lib) for lib in ("torch-pruning", "torch-kirigami")}
            save("budget_peers", torch.device("cpu"), {"peers": used, "rows": rows})


def measure(name: str, side: str, share: float, seconds: int, calls: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]().eval(), torch.randn(1, 3, 224, 224)
    dense = deepcopy(model)
    before = summary(model, inputs, batch_sizes=())
    limit = int(share * before.parameters)
    row: dict[str, Any] = {"network": name, "side": side, "limit": limit}
    row |= {
        "parameters": before.parameters,
        "macs": (before.flops or 0) // 2,
        "seconds_limit": seconds,
    }
    start = process_time()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        model = SIDES[side](model, inputs, limit)
        signal.setitimer(signal.ITIMER_PROF, 0)
        row["seconds"] = round(process_time() - start, 1)
        row["parameters_after"] = sum(p.numel() for p in model.parameters())
        after = summary(model, inputs, batch_sizes=())
        row["macs_after"] = (after.flops or 0) // 2
        row["latency"], row["latency_after"] = latencies(dense, model, inputs, calls)
    except (Exception, TimeLimitError) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        row.setdefault("seconds", round(process_time() - start, 1))
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def latencies(dense: nn.Module, pruned: nn.Module, inputs: Tensor, calls: int) -> list[float]:
    """Milliseconds of processor time of a call of each network, called in turns."""
    took: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(calls + 1):
            for model, times in zip((dense.eval(), pruned.eval()), took, strict=True):
                start = process_time()
                model(inputs)
                times.append(1e3 * (process_time() - start))
    return [round(median(times[1:]), 1) for times in took]


def stop(*_: Any) -> None:
    raise TimeLimitError("not done within the limit of processor time")


def found(library: str) -> str | None:
    try:
        return version(library)
    except ModuleNotFoundError:
        return None


def by_drophot(model: nn.Module, inputs: Tensor, limit: int) -> nn.Module:
    prune_channels(model, example_inputs=inputs, to=Budget(parameters=limit))
    return model


def by_torch_pruning(model: nn.Module, inputs: Tensor, limit: int) -> nn.Module:
    tp: Any = import_module("torch_pruning")  # needed nowhere else
    vit = isinstance(model, models.VisionTransformer)
    last = [layer for layer in model.modules() if getattr(layer, "out_features", None) == 1000]
    pruner = tp.pruner.MagnitudePruner(
        model,
        inputs,
        tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=1.0,
        global_pruning=True,
        iterative_steps=STEPS,
        ignored_layers=last,
        round_to=12 if vit else None,
    )
    for _ in range(STEPS):
        if sum(p.numel() for p in model.parameters()) <= limit:
            break
        pruner.step()
        if isinstance(model, models.VisionTransformer):
            model.hidden_dim = len(model.get_parameter("conv_proj.weight"))
    return model


def by_kirigami(model: nn.Module, inputs: Tensor, limit: int) -> nn.Module:
    kirigami: Any = import_module("torch_kirigami")
    pruning: Any = import_module("torch_kirigami.pruning")
    graph = kirigami.DependencyGraph.build(model, args=(inputs,))
    pruner = pruning.Pruner(model, graph=graph)
    pruned, _ = pruner.prune(
        pruner.discover_candidates(),
        budget=pruning.ParameterBudget(max_params=limit),
        strategy=pruning.Greedy(pruning.GroupMagnitude(p=2)),
    )
    return pruned


SIDES: dict[str, Callable[[nn.Module, Tensor, int], nn.Module]] = {
    "drophot": by_drophot,
    "torch_pruning": by_torch_pruning,
    "torch_kirigami": by_kirigami,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
