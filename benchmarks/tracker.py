"""The cost of tracking: in a training step, compared with other trackers, and by dataset size.

Everything is measured alternately in one run, with medians of many rounds and batches of 128 of
50,000 samples in 10 classes:

- the training step of ResNet-18 at 32x32, plain and tracked;
- `update` of both trackers, compared with aum 1.0.2 (`pip install aum==1.0.2`) and with two Python
  loops over the samples. The first does what Toneva et al. do: it appends the loss, correctness and
  margin of each sample to lists. The second is minimal, with two numbers per sample. Each runs
  twenty times in a row, as in most benchmarks, and once after other work, with cold caches, as in
  training;
- `update` for datasets of 5e4 to 1e8 samples, and the memory of the state, calculated up to 1e9;
- the memory per sample of the Python objects of the other trackers, after ten presentations.

With `--busy`, only the second of these, while another process takes one of the cores.
"""

import json
import statistics
import tracemalloc
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from common import busy_core, save
from torch import Tensor, nn

from drophot import DynamicsTracker, ForgettingTracker
from drophot.models import resnet18

SAMPLES, BATCH, CLASSES = 50_000, 128, 10
TRACKERS = {"forgetting": ForgettingTracker, "dynamics": DynamicsTracker}
Work = Callable[[], Any]
Lists = dict[int, tuple[list[float], ...]]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--steps", type=int, default=120, help="number of training steps of each kind"
    )
    parser.add_argument("--rounds", type=int, default=600, help="number of updates of each kind")
    parser.add_argument("--most", type=float, default=1e8, help="samples of the largest dataset")
    parser.add_argument(
        "--peers-memory", action="store_true", help="measure only the last of these"
    )
    parser.add_argument(
        "--busy", action="store_true", help="measure only `update`; another process takes core 1"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    if options.busy:
        with busy_core():
            update = {"batch": BATCH, "update": updates(device, options.rounds)}
        print(json.dumps(update, indent=2))
        save(f"tracker_busy_{torch.get_num_threads()}", device, update)
        return
    memory = {"bytes_a_sample": peers_memory()}
    if options.peers_memory:
        figures: dict[str, Any] = memory
    else:
        figures = {
            "batch": BATCH,
            "training_step": training_steps(device, options.steps),
            "update": updates(device, options.rounds),
            "samples": sizes(device, options.rounds, int(options.most)),
            "peers": memory,
        }
    print(json.dumps(figures, indent=2))
    save(f"tracker_{'peers_memory' if options.peers_memory else device.type}", device, figures)


def training_steps(device: torch.device, rounds: int) -> dict[str, Any]:
    model = resnet18().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs = torch.randn(BATCH, 3, 32, 32, device=device)
    trackers = {name: kind(SAMPLES) for name, kind in TRACKERS.items()}
    classes = torch.randint(CLASSES, (SAMPLES,))

    def step(tracker: ForgettingTracker | None) -> Callable[[], Work]:
        def make() -> Work:
            index = torch.randperm(SAMPLES)[:BATCH]
            targets = classes[index].to(device)

            def run() -> None:
                outputs = model(inputs)
                optimizer.zero_grad()
                nn.functional.cross_entropy(outputs, targets).backward()
                optimizer.step()
                if tracker is not None:
                    tracker.update(index, outputs, targets)

            return run

        return make

    makes = {"plain": step(None)} | {name: step(tracker) for name, tracker in trackers.items()}
    times = measured(makes, rounds, device)
    found: dict[str, Any] = {
        f"{name}_ms": round(1e3 * statistics.median(t), 2) for name, t in times.items()
    }
    for name in TRACKERS:  # ratios of neighbouring steps, since the speed of the machine may drift
        ratios = [t / plain for t, plain in zip(times[name], times["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[f"{name}_over_plain"] = round(middle, 4)
        found[f"{name}_over_plain_quartiles"] = [round(low, 4), round(high, 4)]
    return found


def updates(device: torch.device, rounds: int) -> dict[str, Any]:
    classes = torch.randint(CLASSES, (SAMPLES,))
    logits = torch.randn(BATCH, CLASSES, device=device)
    lean: dict[int, list[tuple[float, float]]] = defaultdict(list)
    toneva: Lists = {}

    def batch() -> tuple[Tensor, Tensor]:
        index = torch.randperm(SAMPLES)[:BATCH]
        return index, classes[index].to(device)

    def lean_loop(index: Tensor, targets: Tensor) -> None:
        losses = nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        right = (logits.argmax(1) == targets).tolist()
        for sample, loss, correct in zip(index.tolist(), losses, right, strict=True):
            lean[sample].append((loss, correct))

    def of(work: Callable[[Tensor, Tensor], Any]) -> Callable[[], Work]:
        def make() -> Work:
            index, targets = batch()
            return lambda: work(index, targets)

        return make

    trackers = {name: kind(SAMPLES, device=device) for name, kind in TRACKERS.items()}
    makes = {
        name: of(lambda index, targets, t=tracker: t.update(index, logits, targets))
        for name, tracker in trackers.items()
    }
    makes["lean_loop"] = of(lean_loop)
    makes["toneva_loop"] = of(lambda index, targets: toneva_loop(toneva, index, logits, targets))
    try:
        aum = import_module("aum")
    except ImportError:
        print("aum is not installed, and left out: pip install aum==1.0.2")
    else:
        peer = aum.AUMCalculator("aum")
        makes["aum"] = of(lambda index, targets: peer.update(logits, targets, index.tolist()))
    found = {}
    for kind, row in (("in_a_row", 20), ("after_other_work", 1)):
        times = medians(makes, rounds // row, device, row)
        found[kind] = {
            "us": {name: round(1e6 * seconds, 1) for name, seconds in times.items()},
            "times_faster": {
                name: {
                    peer: round(times[peer] / times[name], 1)
                    for peer in times
                    if peer not in TRACKERS
                }
                for name in TRACKERS
            },
        }
    return found


def toneva_loop(found: Lists, index: Tensor, logits: Tensor, targets: Tensor) -> None:
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    right = logits.argmax(1) == targets
    for row in range(len(index)):
        ordered = logits[row].sort().values
        other = ordered[-2] if right[row] else ordered[-1]
        margin = logits[row, int(targets[row])].item() - other.item()
        lists = found.setdefault(int(index[row]), ([], [], []))
        lists[0].append(losses[row].item())
        lists[1].append(right[row].sum().item())
        lists[2].append(margin)


def peers_memory(samples: int = SAMPLES, presentations: int = 10) -> dict[str, int]:
    """Memory that Python allocates for the other trackers; `sizes` has that of drophot."""
    updates: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {}
    lists: Lists = {}
    updates["toneva_loop"] = lambda *batch: toneva_loop(lists, *batch)
    try:
        peer = import_module("aum").AUMCalculator("aum")
    except ImportError:
        print("aum is not installed, and left out: pip install aum==1.0.2")
    else:
        updates["aum"] = lambda index, logits, targets: peer.update(logits, targets, index.tolist())
    found = {}
    for name, update in updates.items():
        tracemalloc.start()
        for _ in range(presentations):
            for index in torch.arange(samples).split(BATCH):
                update(index, torch.randn(len(index), CLASSES), index % CLASSES)
        found[name] = round(tracemalloc.get_traced_memory()[0] / samples)
        tracemalloc.stop()
    return found


def sizes(device: torch.device, rounds: int, most: int) -> dict[str, Any]:
    """Bytes of the state for a number of samples, from the shapes and dtypes of its columns."""
    logits = torch.randn(BATCH, CLASSES, device=device)
    found: dict[str, Any] = {}
    for name, kind in TRACKERS.items():
        row = [v for v in kind(1).state_dict().values() if isinstance(v, Tensor)]
        rows: dict[str, Any] = {}
        for samples in (50_000, 10**6, 10**7, 10**8, 10**9):
            size = sum(
                torch.empty(samples, *v.shape[1:], dtype=v.dtype, device="meta").nbytes for v in row
            )
            rows[f"{samples:.0e}"] = {"bytes_a_sample": size / samples, "GB": round(size / 1e9, 4)}
            if samples > most:
                continue
            tracker = kind(samples, device=device)

            def make(tracker: ForgettingTracker = tracker, samples: int = samples) -> Work:
                index = torch.randint(samples, (BATCH,))
                targets = (index % CLASSES).to(device)
                return lambda: tracker.update(index, logits, targets)

            seconds = medians({"update": make}, rounds, device)["update"]
            kept = [v for v in tracker.state_dict().values() if isinstance(v, Tensor)]
            assert sum(v.nbytes for v in kept) == size, "arithmetic agrees with what is there"
            rows[f"{samples:.0e}"]["update_us"] = round(1e6 * seconds, 1)
            del tracker, kept, make
        found[name] = rows
    return found


def medians(*args: Any) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in measured(*args).items()}


def measured(
    makes: dict[str, Callable[[], Work]], rounds: int, device: torch.device, row: int = 1
) -> dict[str, list[float]]:
    """Seconds of each, alternately, so that a slowdown of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(rounds):
        for name, make in makes.items():
            works = [make() for _ in range(row)]
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = perf_counter()
            for work in works:
                work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((perf_counter() - start) / row)
    return {name: values[rounds // 5 :] for name, values in times.items()}


if __name__ == "__main__":
    main()
