"""A training step compared with its lower bound, and the effect of each optimization and of size.

- The bound: the operations of the step over the rate of a matrix product on this machine, and the
  bytes that its operators read and write over the bandwidth of a copy. Then the time per operator.
- The parts: batches of 64 through the step of drophot with all of its parts, including
  `onednn_linear`, which is off by default; without one of them; and without any (plain eager
  PyTorch), alternately in one run, each in a separate process. "without oneDNN for large layers" is
  the default.
- The sizes: seconds per sample and peak memory of a process that trains for an epoch, for N samples
  in memory and models from FCNet to ResNet-50.
"""

import json
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from common import save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from drophot import fit
from drophot.models import fcnet, lenet, resnet18, resnet50
from drophot.training import onednn_linear
from drophot.training.memory_format import takes_channels_last
from drophot.training.step import fast_step

BATCH = 64
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fcnet": (fcnet, (1, 28, 28)),
    "lenet": (lenet, (1, 28, 28)),
    "resnet18": (resnet18, (3, 32, 32)),
    "resnet50": (resnet50, (3, 32, 32)),
}
PARTS = ("fused optimiser", "channels last", "oneDNN for large layers")
# Prefixes of operator names, and the category of the operator.
KINDS = {
    "aten::mkldnn_convolution": "convolutions, forward",
    "aten::convolution_backward": "convolutions, backward",
    "aten::cudnn_convolution": "convolutions, forward",
    "aten::mm": "linear layers",
    "aten::addmm": "linear layers",
    "mkldnn::_linear": "linear layers",
    "aten::max_pool": "pooling",
    "aten::avg_pool": "pooling",
    "aten::fill_": "pooling",
    "aten::threshold": "activations",
    "aten::clamp_min": "activations",
    "aten::native_batch_norm": "normalisation",
    "aten::_fused": "optimiser",
    "aten::_log_softmax": "loss",
    "aten::nll_loss": "loss",
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "N"), help="used by this script itself")
    parser.add_argument(
        "--part", nargs=2, metavar=("MODEL", "KIND"), help="used by this script itself"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one_epoch(options.one[0], int(options.one[1]), device)))
        return
    if options.part:
        print(json.dumps(part(*options.part, device=device)))
        return
    rates = {"gflops": matrix_rate(device), "gb_s": bandwidth(device)}
    figures: dict[str, Any] = {"rates": rates, "models": {}, "sizes": {}}
    for name in ("fcnet", "lenet", "resnet18"):
        figures["models"][name] = floor(name, device, rates) | parts(name, device, options.rounds)
        print(name, json.dumps(figures["models"][name], indent=2))
    most = {"fcnet": 6, "lenet": 6, "resnet18": 4, "resnet50": 3}
    for name, exponent in most.items():
        for size in [10**e for e in range(3, exponent + 1)]:
            found = process("--one", name, str(size), device=device)
            figures["sizes"][f"{name} {size}"] = found
            print(name, size, found)
    save(f"step_{device.type}", device, figures)


def matrix_rate(device: torch.device) -> float:
    """10⁹ operations per second of PyTorch's fastest product of two 1024² matrices."""
    a = torch.randn(1024, 1024, device=device)
    products = [lambda: a @ a]
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], ""))
    return round(2 * 1024**3 / min(seconds(p, 10, device) for p in products) / 1e9, 1)


def bandwidth(device: torch.device) -> float:
    """10⁹ bytes per second, read and written, of a copy larger than the caches."""
    a = torch.randn(2**26, device=device)
    b = torch.empty_like(a)
    return round(2 * a.nbytes / seconds(lambda: b.copy_(a), 5, device) / 1e9, 1)


class Bytes(TorchDispatchMode):
    """Sums the bytes that operators read and write, without views."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            given = [args, list((kwargs or {}).values()), found]
            tensors = {t.data_ptr(): t.nbytes for t in flat(given)}
            self.total += sum(tensors.values())
        return found


def flat(things: Any) -> Iterator[Tensor]:
    if isinstance(things, Tensor):
        yield things
    elif isinstance(things, list | tuple):
        for thing in things:
            yield from flat(thing)


def floor(name: str, device: torch.device, rates: dict[str, float]) -> dict[str, Any]:
    with ready(name, device) as step:
        for _ in range(10):
            step()
        with FlopCounterMode(display=False) as operations:
            plain_step(name, device)()
        with Bytes() as moved:
            step()
        alone = seconds(step, 4 if name.startswith("resnet") else 50, device)
        with torch.profiler.profile() as profiled:
            started = perf_counter()
            for _ in range(20):
                step()
            profiled_ms = 1e3 * (perf_counter() - started) / 20
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        kinds = [kind for start, kind in KINDS.items() if event.key.startswith(start)]
        if event.key.startswith(("aten::", "mkldnn::")):
            spent[kinds[0] if kinds else "other operators"] += event.self_cpu_time_total / 20 / 1e3
    spent["Python and dispatch"] = profiled_ms - sum(spent.values())
    share = 1e3 * alone / profiled_ms  # a step takes longer under the profiler
    where = {kind: round(share * value, 3) for kind, value in sorted(spent.items())}
    flops = operations.get_total_flops()
    return {
        "step_ms": round(1e3 * alone, 3),
        "mflop": round(flops / 1e6, 1),
        "floor_operations_ms": round(flops / rates["gflops"] / 1e6, 3),
        "mb": round(moved.total / 1e6, 2),
        "floor_bytes_ms": round(moved.total / rates["gb_s"] / 1e6, 3),
        "where_ms": where,
    }


def parts(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step with and without each part, in separate processes, alternately."""
    kinds = ["all", *(f"without {part}" for part in PARTS), "plain"]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            times[kind].append(1e3 * process("--part", name, kind, device=device))
    return {
        "parts_ms": {kind: round(median(values), 3) for kind, values in times.items()},
        "parts_over_all": {
            kind: round(median(a / b for a, b in zip(values, times["all"], strict=True)), 2)
            for kind, values in times.items()
        },
    }


def part(name: str, kind: str, *, device: torch.device) -> float:
    """Seconds of a step, in a process that ran no other kind of step."""
    without = PARTS if kind == "plain" else (kind.removeprefix("without "),)
    with ready(name, device, without) as step:
        for _ in range(3):
            step()
        return seconds(step, 2 if name.startswith("resnet") else 100, device)


def process(*arguments: str, device: torch.device) -> Any:
    command = [sys.executable, __file__, "--device", device.type, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@contextmanager
def ready(
    name: str, device: torch.device, without: tuple[str, ...] = ()
) -> Iterator[Callable[[], Any]]:
    """The step of drophot without some of its parts."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = torch.randn(BATCH, *shape, device=device)
    targets = torch.randint(10, (BATCH,), device=device)
    if "channels last" not in without and takes_channels_last(model, inputs[:2]):
        inputs = inputs.to(memory_format=torch.channels_last)
    replaced = {
        "fused optimiser": ("drophot.training.step._fused", lambda *_: nullcontext()),
    }
    with ExitStack() as stack:
        for part in without:
            if part in replaced:
                stack.enter_context(patch(*replaced[part]))
        if "oneDNN for large layers" not in without:
            stack.enter_context(onednn_linear())
        step = stack.enter_context(fast_step(model, optimizer, device))
        yield lambda: step(inputs, targets)


def plain_step(name: str, device: torch.device) -> Callable[[], Any]:
    make, shape = MODELS[name]
    model, inputs = make().to(device), torch.randn(BATCH, *shape, device=device)
    targets = torch.zeros(BATCH, dtype=torch.int64, device=device)
    return lambda: nn.functional.cross_entropy(model(inputs), targets).backward()


def one_epoch(name: str, size: int, device: torch.device) -> dict[str, float]:
    make, shape = MODELS[name]
    model = make().to(device)
    data = TensorDataset(
        torch.rand(size, *shape, device=device), torch.randint(10, (size,), device=device)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(model, TensorDataset(*(t[:BATCH] for t in data.tensors)), 1, optimizer=optimizer)
    started = perf_counter()
    fit(model, data, 1, optimizer=optimizer)
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return {
        "us_a_sample": round(1e6 * (perf_counter() - started) / size, 2),
        "data_mb": round(sum(t.nbytes for t in data.tensors) / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
    }


def seconds(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of one call: the median of five rounds."""
    found = []
    for _ in range(5):
        started = perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append((perf_counter() - started) / times)
    return median(found)


if __name__ == "__main__":
    main()
