"""Cost and benefit of pruning, compared with torch.nn.utils.prune and Torch-Pruning.

`unstructured`: seconds and extra memory of magnitude pruning. Each measurement runs in a separate
process on a new model. Seconds are those of one call. Extra memory is the peak resident set during
the call minus the resident set before it. Processes of drophot and torch alternate, and medians
over rounds are compared (`--scope erk` and `lamp` require `--only drophot`). CPU, Linux.

`masks`: an AdamW step of ResNet-18 with and without held masks, alternately.

`structured`: channels removed from the paper's networks: parameters, operations and latency,
compared with the high-level pruner of Torch-Pruning (`pip install torch-pruning==1.6.1`). The three
networks run alternately.

`families`: one network of each family of torchvision, at two ratios, with both libraries, for at
most two minutes each.

`depth`: half of the channels of stacks of 10 to 80 blocks with attention, a reshape to a width that
each block keeps, and a residual connection: processor time and the number of forward passes.

`compressed`: the file size of a pruned network with `save_compressed` and with `torch.save`.
"""

import gc
import json
import signal
import statistics
import subprocess
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any, cast

import torch
from common import busy_core, save
from torch import nn
from torch.nn.utils import prune as peer
from torchvision import models

from drophot import magnitude_prune
from drophot.models import fcnet, lenet
from drophot.prune import Masks, save_compressed, summary
from drophot.structured import prune_channels

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "vit_b_16": models.vit_b_16,
    "linear500m": lambda: nn.Sequential(*(nn.Linear(10_000, 10_000) for _ in range(5))),
}
FAMILIES: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "fcnet": (fcnet, (1, 1, 28, 28)),
    "lenet": (lenet, (1, 1, 28, 28)),
    **{
        name: (getattr(models, name), (1, 3, 224, 224))
        for name in (
            *("resnet18", "resnet50", "resnext50_32x4d", "vgg16_bn", "densenet121"),
            *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"),
            *("regnet_y_400mf", "shufflenet_v2_x1_0", "squeezenet1_0", "convnext_tiny"),
            *("vit_b_16", "swin_t"),
        )
    },
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("part", nargs="?", default="unstructured", choices=PARTS)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "vit_b_16"])
    parser.add_argument("--scope", default="global", choices=["global", "layer", "erk", "lamp"])
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["drophot", "torch"], help="measure one side only")
    parser.add_argument("--measure", nargs=2, help="MODEL drophot|torch: one measurement, as JSON")
    parser.add_argument("--busy", action="store_true", help="another process takes core 1")
    options = parser.parse_args()
    if options.measure:
        name, side = options.measure
        print(json.dumps(measure(name, side, options.ratio, options.scope)))
        return
    with busy_core() if options.busy else nullcontext():
        figures = PARTS[options.part](options)
    threads = f"busy_{torch.get_num_threads()}" if options.busy else None
    parts = ["prune", options.part, options.scope, options.only, threads]
    name = "_".join(p for p in parts if p not in (None, "unstructured", "global"))
    save(name, torch.device("cpu"), figures)


def unstructured(options: Namespace) -> list[dict[str, Any]]:
    sides = [options.only] if options.only else ["drophot", "torch"]
    figures = []
    for model in options.models:
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side in sides:
                command = [sys.executable, __file__, "--measure", model, side]
                command += ["--ratio", str(options.ratio), "--scope", options.scope]
                output = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds[side].append(json.loads(output.stdout))
        row: dict[str, Any] = {"model": model, "scope": options.scope, "ratio": options.ratio}
        row["rounds"] = options.rounds
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
    return figures


def measure(name: str, side: str, ratio: float, scope: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = MODELS[name]()
    weights = list(Masks.from_zeros(model))
    pairs = [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in weights
    ]
    size = sum(p.nbytes for p in model.parameters())
    # The first call of each side loads code and starts threads, which is not measured.
    small = nn.Linear(100, 100)
    magnitude_prune(small, 0.5, scope=cast("Any", scope))
    peer.global_unstructured([(small, "weight")], peer.L1Unstructured, amount=0.5)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    start = perf_counter()
    if side == "drophot":
        held: object = magnitude_prune(model, ratio, scope=cast("Any", scope))
    elif scope == "layer":
        held = [peer.l1_unstructured(*pair, amount=ratio) for pair in pairs]
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


def masks(options: Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = models.resnet18(num_classes=10)
    inputs, targets = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    optimizer = torch.optim.AdamW(model.parameters())
    held = magnitude_prune(model, options.ratio)

    def step() -> float:
        start = perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        return perf_counter() - start

    for _ in range(5):
        step()
    plain, masked, hook = [], [], []
    weights = [model.get_parameter(name) for name in held]
    for _ in range(12 * options.rounds):
        plain.append(step())
        with held.hold(optimizer):
            step()  # makes the copies of the masks
            masked.append(step())
            start = perf_counter()  # only the additional work of a held step
            for weight in weights:
                gradient: Any = weight.grad
                for mask in list((weight._backward_hooks or {}).values()):
                    gradient = mask(gradient)
            for kind in ("pre", "post"):
                for look in list(getattr(optimizer, f"_optimizer_step_{kind}_hooks").values()):
                    look(optimizer, (), {})
            hook.append(perf_counter() - start)
    ratios = [a / b for a, b in zip(masked, plain, strict=True)]
    found = {
        "step_ms": round(1e3 * statistics.median(plain), 2),
        "masked_over_plain": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        "holding_ms": round(1e3 * statistics.median(hook), 3),
        "holding_over_step": round(statistics.median(hook) / statistics.median(plain), 4),
    }
    print(json.dumps(found))
    return found


def theirs(model: nn.Module, ratio: float, inputs: torch.Tensor) -> None:
    tp: Any = import_module("torch_pruning")  # needed nowhere else

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    tp.pruner.MagnitudePruner(
        model,
        inputs,
        tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=last,
    ).step()
    with torch.no_grad():
        model(inputs)


def sizes(model: nn.Module, inputs: torch.Tensor) -> dict[str, float]:
    found = summary(model, inputs, batch_sizes=())
    return {
        "parameters": found.parameters,
        "macs": (found.flops or 0) // 2,
        "mib": round(found.bytes / 2**20, 2),
    }


def structured(options: Namespace) -> list[dict[str, Any]]:
    figures = []
    for name, ratio in (
        *(("fcnet", 0.5), ("fcnet", 0.75), ("lenet", 0.5), ("lenet", 0.75)),
        *(("resnet18", 0.5), ("resnet50", 0.5)),
    ):
        torch.manual_seed(0)
        factory, shape = FAMILIES[name]
        dense, example = factory().eval(), torch.randn(shape)
        networks: dict[str, nn.Module] = {"dense": dense}
        seconds: dict[str, list[float]] = {"drophot": [], "torch_pruning": []}
        for _ in range(options.rounds):
            for side, cut in (("drophot", prune_channels), ("torch_pruning", theirs)):
                networks[side] = deepcopy(dense)
                start = perf_counter()
                cut(networks[side], ratio, example)
                seconds[side].append(perf_counter() - start)
        row: dict[str, Any] = {"model": name, "ratio": ratio, "rounds": options.rounds}
        row |= {side: sizes(network, example) for side, network in networks.items()}
        for side, times in seconds.items():
            row[side]["seconds_to_prune"] = round(statistics.median(times), 3)
        row["latency_ms"] = {}
        for size in (28,) if shape[1] == 1 else (32, 224):
            for batch in (1, 32):
                inputs = torch.randn(batch, shape[1], size, size)
                times = in_turn(networks, inputs, options.rounds)
                row["latency_ms"][f"{size}x{size}, batch {batch}"] = times
                print(name, size, batch, times, flush=True)
        figures.append(row)
        print(json.dumps(row))
    return figures


@torch.no_grad()
def in_turn(networks: dict[str, nn.Module], inputs: torch.Tensor, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {side: [] for side in networks}
    for network in networks.values():
        network.eval()(inputs)
    begun = perf_counter()
    while len(times["dense"]) < rounds or perf_counter() - begun < 5:
        for side, network in networks.items():
            start = perf_counter()
            network(inputs)
            times[side].append(perf_counter() - start)
    return {side: round(1e3 * statistics.median(each), 2) for side, each in times.items()}


def families(options: Namespace) -> list[dict[str, Any]]:
    def stop(*_: Any) -> None:
        raise TimeoutError("not done after two minutes")

    signal.signal(signal.SIGALRM, stop)
    figures = []
    for name, (factory, shape) in FAMILIES.items():
        for ratio in (0.3, 0.5):
            row: dict[str, Any] = {"model": name, "ratio": ratio}
            for side, cut in (("drophot", prune_channels), ("torch_pruning", theirs)):
                torch.manual_seed(0)
                model, inputs = factory().eval(), torch.randn(shape)
                before = sizes(model, inputs)
                start = perf_counter()
                signal.alarm(120)
                try:
                    cut(model, ratio, inputs)
                except Exception as error:
                    row[side] = f"{type(error).__name__}: {error}"[:200]
                    continue
                finally:
                    signal.alarm(0)
                seconds = round(perf_counter() - start, 2)
                after = sizes(model, inputs)
                row[side] = {
                    "parameters_removed": round(1 - after["parameters"] / before["parameters"], 4),
                    "macs_removed": round(1 - after["macs"] / before["macs"], 4)
                    if before["macs"]
                    else None,
                    "seconds": seconds,
                }
            figures.append(row)
            print(json.dumps(row), flush=True)
    return figures


def compressed(options: Namespace) -> list[dict[str, Any]]:
    figures = []
    for name in ("resnet18", "resnet50", "vit_b_16"):
        for ratio in (0.5, 0.8, 0.9):
            torch.manual_seed(0)
            model = MODELS[name]()
            held = magnitude_prune(model, ratio)
            with TemporaryDirectory() as folder:
                dense, small = Path(folder, "dense.pt"), Path(folder, "small")
                torch.save(model.state_dict(), dense)
                start = perf_counter()
                save_compressed(model, small)
                seconds = perf_counter() - start
                row = {
                    "model": name,
                    "sparsity": round(held.sparsity, 4),
                    "dense_mib": round(dense.stat().st_size / 2**20, 2),
                    "compressed_mib": round(small.stat().st_size / 2**20, 2),
                    "over_dense": round(small.stat().st_size / dense.stat().st_size, 4),
                    "seconds": round(seconds, 2),
                }
            figures.append(row)
            print(json.dumps(row), flush=True)
    return figures


class Stored(nn.Module):
    """Attention and two layers, with widths that the code reads from attributes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.each, self.inner = heads, width // heads, 4 * width
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, self.inner), nn.Linear(self.inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.each))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(self.up(x).relu().view(*x.shape[:2], self.inner))


def depth(options: Namespace) -> list[dict[str, Any]]:
    figures = []
    for blocks in (10, 20, 40, 80):
        seconds, passes, row = [], 0, {}
        for _ in range(options.rounds):
            torch.manual_seed(0)
            stack = [Stored(32, 4) for _ in range(blocks)]
            model = nn.Sequential(nn.Linear(8, 32), *stack, nn.Linear(32, 4))
            calls: list[int] = []
            model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            start = process_time()
            pruned = prune_channels(model, 0.5, torch.randn(2, 16, 8))
            seconds.append(process_time() - start)
            passes = len(calls)
            row = {"channels_removed": round(pruned.channels.removed, 4)}
        row |= {"blocks": blocks, "passes": passes, "rounds": options.rounds}
        figures.append(row | {"cpu_seconds": round(statistics.median(seconds), 2)})
        print(json.dumps(figures[-1]), flush=True)
    return figures


PARTS: dict[str, Callable[[Namespace], Any]] = {
    "unstructured": unstructured,
    "masks": masks,
    "structured": structured,
    "families": families,
    "depth": depth,
    "compressed": compressed,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore", UserWarning)  # Torch-Pruning's own
    main()
