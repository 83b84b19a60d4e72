"""What drophot costs and gains on one GPU, as ratios within one run, in at most four minutes.

    PYTHONPATH=src python benchmarks/gpu.py

prints a line for each figure and its target, and ends with what failed and what missed its target.
It writes `results/gpu.json`. `--only select prune` runs the parts with these names, `--quick` a
small version of all, which runs on a CPU too and writes nothing. A part that needs torchvision is
skipped without it. Times are medians, with the device synchronised around each.
"""

from __future__ import annotations

import sys
import time
import traceback
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from common import save
from naive import Naive
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.optim import Adam, AdamW
from torch.utils.data import TensorDataset

from drophot import (
    DropHot,
    DynamicsTracker,
    Grid,
    IndexedDataset,
    evaluate,
    fit,
    magnitude_prune,
    select,
)
from drophot.coreset import facility_location, k_center
from drophot.grid import GpuPool
from drophot.models import fcnet, lenet, resnet18
from drophot.prune import summary, to_semi_structured
from drophot.structured import prune_channels

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BATCH = 64
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (partial(resnet18, 10), (3, 32, 32)),
    "lenet": (lenet, (1, 28, 28)),
    "fcnet": (fcnet, (1, 28, 28)),
}
SECONDS = 225  # no part starts on a GPU after it


class Report:
    """Collects figures, prints each, and knows which missed its target."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []

    def add(
        self,
        name: str,
        ratio: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        **also: float,
    ) -> None:
        """A ratio with its target, and the figures that it comes from."""
        met = None
        if at_most is not None:
            met = ratio <= at_most
        if at_least is not None:
            met = ratio >= at_least
        target = f"<= {at_most}" if at_most is not None else f">= {at_least}" if at_least else "-"
        row = {"ratio": round(ratio, 4), "target": target, "met": met}
        self.figures[name] = row | {key: float(f"{value:.4g}") for key, value in also.items()}
        print(f"{name:44} {ratio:10.3f}  {target:9} {self.figures[name]}", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small, and also on a CPU")
    options = parser.parse_args()
    if not CUDA and not options.quick:
        parser.error("there is no GPU; --quick runs a small version on a CPU")
    report, began = Report(), time.perf_counter()
    for name in options.only:
        if CUDA and time.perf_counter() - began > SECONDS:
            report.failed.append(f"{name}: not started, after {SECONDS} s")
            continue
        started = time.perf_counter()
        try:
            PARTS[name](report, options.quick)
        except Exception as error:
            traceback.print_exc(limit=6, file=sys.stdout)
            report.failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        if CUDA:
            torch.cuda.empty_cache()
        print(f"[{name}: {time.perf_counter() - started:.1f} s]", flush=True)
    missed = [name for name, row in report.figures.items() if row["met"] is False]
    print("\nFailed:", *(report.failed or ["nothing"]), sep="\n  ")
    print("Missed its target:", *(missed or ["nothing"]), sep="\n  ")
    if not options.quick:
        save("gpu", DEVICE, report.figures | {"failed": report.failed})
    sys.exit(bool(report.failed))


# --- a training step -----------------------------------------------------------------------------


def step(report: Report, quick: bool) -> None:
    """`fit` compared with the bare captured graph, with and without a tracker."""
    for name, (make, shape) in NETS.items():
        data = images(256 if quick else 20_000, shape)
        batches = -(-len(data) // BATCH)
        eager, bare = eager_and_graph(make, data)
        plain = epoch(make, data) / batches
        tracker = DynamicsTracker(len(data), device=DEVICE)
        tracked = epoch(make, IndexedDataset(data), on_batch=tracker.update) / batches
        ms = {"fit_ms": 1e3 * plain, "eager_ms": 1e3 * eager, "graph_ms": 1e3 * bare}
        report.add(f"step {name}: fit / the bare graph", plain / bare, at_most=1.05, **ms)
        report.add(
            f"step {name}: tracking, share of the step",
            tracked / plain - 1,
            at_most=0.02,
            tracked_ms=1e3 * tracked,
        )


def epoch(
    make: Callable[[], nn.Module], data: Any, *, sparse: bool = False, **options: Any
) -> float:
    """Seconds of an epoch of `fit`, the least of two after the first."""
    torch.manual_seed(0)
    model, ends = make().to(DEVICE), list[float]()

    def on_epoch(_: int) -> None:
        synchronize()
        ends.append(time.perf_counter())

    adam = Adam(model.parameters(), 1e-3)
    with magnitude_prune(model, 0.8).hold(adam) if sparse else nullcontext():
        fit(model, data, 3, optimizer=adam, batch_size=BATCH, on_epoch=on_epoch, **options)
    return min(after - before for before, after in pairwise(ends))


def eager_and_graph(make: Callable[[], nn.Module], data: TensorDataset) -> tuple[float, float]:
    """Seconds of a plain PyTorch step on resident data, and of its captured graph."""
    model = make().to(DEVICE).to(memory_format=torch.channels_last)
    adam = Adam(model.parameters(), 1e-3, capturable=CUDA, fused=True)
    inputs, targets = (tensor[:BATCH].to(DEVICE) for tensor in data.tensors)
    inputs = inputs.contiguous(memory_format=torch.channels_last)

    def plain() -> None:
        adam.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        adam.step()

    if not CUDA:
        eager = seconds(plain, 2)
        return eager, eager
    eager = seconds(plain, 30)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            plain()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain()

    def many() -> None:
        for _ in range(50):
            graph.replay()

    return eager, seconds(many, 5) / 50


def evaluation(report: Report, quick: bool) -> None:
    """`evaluate` compared with the bare forward passes on the same batches."""
    for name, (make, shape) in NETS.items():
        data, model = images(64 if quick else 10_240, shape), make().to(DEVICE).eval()
        batches = data.tensors[0].split(512)

        def bare(model: nn.Module = model, batches: Any = batches) -> None:
            with torch.inference_mode():
                for inputs in batches:
                    model(inputs)

        ours, theirs = seconds(partial(evaluate, model, data), 3), seconds(bare, 3)
        also = {"ms": 1e3 * ours, "bare_ms": 1e3 * theirs}
        report.add(f"evaluate {name} / bare forward passes", ours / theirs, at_most=1.1, **also)


# --- selecting and pruning -----------------------------------------------------------------------


def selecting(report: Report, quick: bool) -> None:
    """`select` compared with `torch.topk`."""
    for size in (10**5,) if quick else (10**7, 10**8):
        for name, scores in {
            "distinct": torch.rand(size, device=DEVICE),
            "ties": torch.randint(0, 9, (size,), device=DEVICE),
        }.items():
            ours = seconds(partial(select, scores, 0.1), 3)
            topk = seconds(partial(torch.topk, scores, size // 10, sorted=False), 3)
            also = {"ms": 1e3 * ours, "topk_ms": 1e3 * topk}
            report.add(f"select {size:.0e}, {name} / topk", ours / topk, at_most=1.5, **also)


def pruning(report: Report, quick: bool) -> None:
    """`magnitude_prune` compared with `torch.nn.utils.prune`, its memory, and 10⁹ weights."""
    for name, base in networks(quick, "resnet50", "vit_b_16"):
        weights = [
            (module, "weight")
            for module in base.modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]

        def globally(weights: list[Any] = weights) -> None:
            torch_prune.global_unstructured(weights, torch_prune.L1Unstructured, amount=0.8)

        def by_layer(weights: list[Any] = weights) -> None:
            for module, parameter in weights:
                torch_prune.l1_unstructured(module, parameter, amount=0.8)

        def restored(weights: list[Any] = weights) -> None:
            for module, parameter in weights:
                with suppress(ValueError):
                    torch_prune.remove(module, parameter)

        load = partial(base.load_state_dict, deepcopy(base.state_dict()))

        def dense(restored: Any = restored, load: Any = load) -> None:
            restored()
            load()

        size = sum(parameter.nbytes for parameter in base.parameters())
        scopes: dict[Literal["global", "layer"], Callable[[], None]] = {
            "global": globally,
            "layer": by_layer,
        }
        for scope, theirs in scopes.items():
            ours_s = seconds(partial(magnitude_prune, base, 0.8, scope=scope), 5, before=load)
            extra = peak(partial(magnitude_prune, base, 0.8, scope=scope)) / size
            theirs_s = seconds(theirs, 3, before=dense)
            dense()
            also = {"ms": 1e3 * ours_s, "torch_ms": 1e3 * theirs_s}
            report.add(
                f"prune {name}, {scope}: torch / drophot", theirs_s / ours_s, at_least=4, **also
            )
            report.add(f"prune {name}, {scope}: memory / weights", extra, at_most=0.6)
        lamp = partial(magnitude_prune, base, 0.8, scope="lamp")
        lamp_ms = 1e3 * seconds(lamp, 3, before=load)
        report.add(f"prune {name}, lamp, ms", lamp_ms, memory=peak(lamp) / size)
        load()
    if not quick:
        large = nn.Sequential(
            *(nn.Linear(10_000, 10_000, bias=False, device=DEVICE) for _ in range(10))
        )
        report.add(
            "prune 1e9 weights, ms",
            1e3 * seconds(partial(magnitude_prune, large, 0.8), 3),
            at_most=50,
        )


def holding(report: Report, quick: bool) -> None:
    """A training step with masks held, compared with the same step without."""
    for name, model in networks(quick, "resnet50", "vit_b_16"):
        adam = AdamW(model.parameters(), 1e-3)
        inputs = torch.randn(2 if quick else 8, 3, 224, 224, device=DEVICE)

        def train(model: nn.Module = model, adam: AdamW = adam, inputs: Tensor = inputs) -> None:
            adam.zero_grad()
            model(inputs).square().mean().backward()
            adam.step()

        times = 1 if quick else 20
        masks = magnitude_prune(model, 0.8)
        plain = seconds(train, times)
        with masks.hold(adam):
            held = seconds(train, times)
        also = {"plain_ms": 1e3 * plain, "held_ms": 1e3 * held}
        report.add(f"hold {name}, share of the step", held / plain - 1, at_most=0.02, **also)
    make, shape = NETS["resnet18"]
    data = images(256 if quick else 20_000, shape)
    plain = epoch(make, data)
    held = epoch(make, data, sparse=True)
    report.add("hold resnet18 in fit, share of the step", held / plain - 1, at_most=0.02)


def greedy(report: Report, quick: bool) -> None:
    """Greedy selection on features."""
    size, width = (500, 16) if quick else (50_000, 512)
    features = torch.randn(size, width, device=DEVICE)
    targets = torch.arange(size, device=DEVICE) % 10
    report.add("k_center, s", seconds(partial(k_center, features, 0.1), 1), at_most=0.25)
    report.add(
        "facility_location, s", seconds(partial(facility_location, features, 0.1), 1), at_most=1
    )
    by_class = partial(facility_location, features, 0.1, targets=targets)
    report.add("facility_location by class, s", seconds(by_class, 1))


def semi_structured(report: Report, quick: bool) -> None:
    """A feed-forward block with 2:4 sparsity, compared with the dense block."""
    if not CUDA:
        print("2:4 kernels need a GPU")
        return
    for rows in (512, 8192):
        for dtype in (torch.float16, torch.bfloat16):
            block = nn.Sequential(
                nn.Linear(4096, 16384, bias=False), nn.GELU(), nn.Linear(16384, 4096, bias=False)
            )
            block.to(DEVICE, dtype).eval()
            inputs = torch.randn(rows, 4096, device=DEVICE, dtype=dtype)
            magnitude_prune(block, 0.5, pattern="2:4")
            with torch.inference_mode():
                dense = seconds(partial(block, inputs), 10)
                converted = to_semi_structured(block, rows=rows)
                sparse = seconds(partial(block, inputs), 10)
            print(converted)
            also = {"dense_ms": 1e3 * dense, "sparse_ms": 1e3 * sparse}
            name = f"2:4 {str(dtype).removeprefix('torch.')}, {rows} rows: dense / converted"
            report.add(name, dense / sparse, at_least=0.98, **also)


def channels(report: Report, quick: bool) -> None:
    """Latency after half of the channels are gone, by the summary."""
    for name, model in networks(quick, "resnet18", "resnet50", "vit_b_16"):
        model.eval()
        inputs = torch.randn(1, 3, 224, 224, device=DEVICE)
        sizes = (1, 2) if quick else (1, 64)
        before = summary(model, inputs, batch_sizes=sizes)
        prune_channels(model, 0.5, inputs)
        after = summary(model, inputs, batch_sizes=sizes)
        assert before.latency is not None
        assert after.latency is not None
        for size in sizes:
            dense, pruned = before.latency[size], after.latency[size]
            also = {"dense_ms": 1e3 * dense, "pruned_ms": 1e3 * pruned}
            report.add(f"channels {name}, batch {size}: dense / pruned", dense / pruned, **also)


# --- a grid --------------------------------------------------------------------------------------


def side_by_side(report: Report, quick: bool) -> None:
    """Samples a second of processes that share the GPU, compared with one process."""
    if not CUDA:
        print("GpuPool needs a GPU")
        return
    for name, workers, target in (("resnet18", 8, 3), ("lenet", 14, 5)):
        rates = []
        for each in (1, workers):
            with TemporaryDirectory() as folder, GpuPool(workers_per_gpu=each) as pool:
                calls = [
                    pool.submit(train_in_worker, name, Path(folder), each, 16_000)
                    for _ in range(each)
                ]
                rates.append(sum(16_000 / call.result() for call in calls))
        also = {"one_per_s": rates[0], "all_per_s": rates[1]}
        report.add(f"{workers} workers {name} / one", rates[1] / rates[0], at_least=target, **also)


def train_in_worker(name: str, folder: Path, workers: int, size: int) -> float:
    """Seconds of an epoch, once all workers train."""
    torch.set_num_threads(1)
    make, shape = NETS[name]
    model = make().to(DEVICE)
    ends = list[float]()

    def on_epoch(number: int) -> None:
        synchronize()
        if number == 0:
            (folder / str(time.time_ns())).touch()
            while len(list(folder.iterdir())) < workers:
                time.sleep(0.005)
        ends.append(time.perf_counter())

    adam = Adam(model.parameters(), 1e-3)
    fit(model, images(size, shape), 4, optimizer=adam, on_epoch=on_epoch)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def paper_grid(report: Report, quick: bool) -> None:
    """A part of the paper's ResNet-18 grid, compared with the released code's way by epochs.

    The released code trains each coreset again for each prune ratio: 910 epochs for the whole grid,
    where drophot takes 590. Its seconds for an epoch are those of `naive.py`, with two processes
    that load resident tensors, which is faster than decoding images.
    """
    size, epochs = (256, 1) if quick else (10_000, 4)
    make, shape = NETS["lenet" if quick else "resnet18"]
    train_set, test_set = images(size, shape, "cpu"), images(size // 5, shape, "cpu")
    naive = Naive(make, train_set, test_set, epochs=1, workers=0 if quick else 2, device=DEVICE)
    model = make().to(DEVICE)
    adam = Adam(model.parameters(), 1e-3)
    released = seconds(lambda: naive.train(model, adam, train_set), 1)
    run = DropHot(
        make,
        train_set,
        test_set,
        data_ratio=0.5,
        mode="high",
        prune_ratio=0.5,
        score_epochs=epochs,
        train_epochs=epochs,
        finetune_epochs=epochs,
        device=DEVICE,
    )
    ratios = [0.5] if quick else [0.1, 0.2, 0.3, 0.4, 0.5]
    grid = Grid(run, data_ratios=ratios, modes=["low", "high"], prune_ratios=ratios, seeds=[0])
    with TemporaryDirectory() as folder:
        if CUDA:
            with GpuPool(workers_per_gpu=10) as pool:
                list(pool.map(warm_up, range(40)))  # the time of imports is not measured
                plan = grid.plan(executor=pool)
                ours = seconds(lambda: grid.run(folder, pool), 1, warm=0)
        else:
            plan = grid.plan()
            ours = seconds(lambda: grid.run(folder), 1, warm=0)
    ratio = (910 * released) / (590 * ours / plan.epochs)
    also = {"epoch_s": ours / plan.epochs, "released_epoch_s": released, "epochs": plan.epochs}
    report.add("paper's grid, resnet18: released / drophot", ratio, at_least=40, **also)
    whole = 590 * ours / plan.epochs * 50_000 / size
    report.add("paper's grid, resnet18, 50,000 images, s", whole, at_most=200)


def warm_up(_: int) -> None:
    torch.zeros(1, device=DEVICE)


# --- helpers -------------------------------------------------------------------------------------


def images(size: int, shape: tuple[int, ...], device: torch.device | str = DEVICE) -> TensorDataset:
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(size, *shape, device=device, generator=generator)
    return TensorDataset(inputs, torch.randint(10, (size,), device=device, generator=generator))


def networks(quick: bool, *names: str) -> Iterator[tuple[str, nn.Module]]:
    """Networks of torchvision on the device; only the first one for a dry run."""
    import torchvision

    for name in names[:1] if quick else names:
        torch.manual_seed(0)
        yield name, getattr(torchvision.models, name)(weights=None).to(DEVICE)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(
    call: Callable[[], object],
    times: int,
    *,
    warm: int = 1,
    before: Callable[[], object] = lambda: None,
) -> float:
    """The median time of a call, each after `before`, which is not measured."""
    found = []
    for number in range(-warm, times):
        before()
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        if number >= 0:
            found.append(time.perf_counter() - started)
    return median(found)


def peak(call: Callable[[], object]) -> float:
    """The bytes of the GPU that a call needs beyond what is there before; NaN on a CPU."""
    if not CUDA:
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


PARTS: dict[str, Callable[[Report, bool], None]] = {
    "step": step,
    "evaluate": evaluation,
    "select": selecting,
    "prune": pruning,
    "hold": holding,
    "greedy": greedy,
    "side_by_side": side_by_side,
    "paper_grid": paper_grid,
    "semi_structured": semi_structured,
    "channels": channels,
}

if __name__ == "__main__":
    main()
