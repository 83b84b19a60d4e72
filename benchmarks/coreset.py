"""Time and memory of selection methods.

    select    `select`, compared with `torch.topk` alone on the same scores, alternately
    parts     `select` on 10⁹ scores: time, and extra memory
    greedy    k_center and facility_location, compared with apricot (pip install apricot-select)
              and NumPy
    growth    the same two methods with a growing number of samples, up to 10⁶
    crest     the overhead of CrestLoader on a training step

Parts that measure memory run in a separate process.
"""

import json
import resource
import statistics
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from multiprocessing import get_context
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from common import busy_core, save
from torch import Tensor

from drophot import CrestLoader, facility_location, fit, k_center, select
from drophot.data import batching
from drophot.models import fcnet, lenet


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", nargs="?", default="select", choices=list(WHAT))
    parser.add_argument(
        "--samples", type=int, nargs="+", help="N; the default is that of the README"
    )
    parser.add_argument("--features", type=int, default=512, help="D, for greedy and growth")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument(
        "--peers", nargs="+", default=["drophot", "apricot", "numpy"], help="for greedy"
    )
    parser.add_argument("--classes", type=int, default=100, help="for growth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="another process takes core 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    figures = []
    with busy_core() if options.busy else nullcontext():
        for row in WHAT[options.what](options):
            figures.append(row)
            print(json.dumps(row), flush=True)
    name = "coreset" if options.what == "select" else f"coreset_{options.what}"
    name = "_".join([name, *map(str, options.samples or [])])
    name += f"_busy_{torch.get_num_threads()}" * options.busy
    save(name, torch.device(options.device), figures)


def scores_of(kind: str, size: int, device: str) -> Tensor:
    scores = torch.randn(size, device=device)
    if kind == "forgetting counts":  # most samples 0, as on MNIST
        scores = scores.mul_(1.5).clamp_(0).round_().to(torch.uint8 if size > 2e8 else torch.int64)
    elif kind == "rounded scores":  # the same counts in float32
        scores = scores.mul_(1.5).clamp_(0).round_()
    return scores


def selecting(options: Namespace) -> Any:
    torch.manual_seed(0)
    (samples,) = options.samples or [100_000_000]
    size = int(options.ratio * samples)
    for kind in ("forgetting counts", "rounded scores", "distinct scores"):
        scores = scores_of(kind, samples, options.device)
        times: dict[str, list[float]] = {"select": [], "topk": []}
        for _ in range(options.rounds):
            for name in times:
                start = perf_counter()
                if name == "select":
                    select(scores, options.ratio)
                else:
                    scores.topk(size).indices.cpu()
                times[name].append(perf_counter() - start)
        row: dict[str, Any] = {"scores": kind, "samples": samples, "ratio": options.ratio}
        row["threads"] = torch.get_num_threads()
        row |= {name: round(statistics.median(values), 3) for name, values in times.items()}
        row |= {f"{name}_least": round(min(values), 3) for name, values in times.items()}
        row["select_over_topk"] = round(
            statistics.median(a / b for a, b in zip(times["select"], times["topk"], strict=True)), 3
        )
        yield row


def parts(options: Namespace) -> Any:
    (samples,) = options.samples or [1_000_000_000]
    for kind, mode in (
        ("distinct scores", "high"),
        ("forgetting counts", "high"),
        ("forgetting counts", "random"),
    ):
        yield alone(_parts, kind, mode, samples, options.ratio, options.device)


def _parts(kind: str, mode: Any, samples: int, ratio: float, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    scores = scores_of(kind, samples, device)
    before, start = peak(), perf_counter()
    found = select(scores, ratio, mode)
    return {
        "scores": kind,
        "mode": mode,
        "samples": samples,
        "seconds": round(perf_counter() - start, 1),
        "scores_GB": round(scores.nbytes / 1e9, 2),
        "indices_GB": round(found.nbytes / 1e9, 2),
        "peak_above_GB": round((peak() - before) / 1e9, 2),
    }


def clusters(samples: int, features: int) -> Tensor:
    """Draw a hundred clusters whose variances decay over the dimensions, like those of features."""
    draws = torch.Generator().manual_seed(0)
    scale = torch.arange(1, features + 1).float().rsqrt()
    centres = 3 * torch.randn(100, features, generator=draws) * scale
    found = torch.randn(samples, features, generator=draws) * scale
    return found.add_(centres[torch.randint(0, 100, (samples,), generator=draws)])


def greedy(options: Namespace) -> Any:
    for samples in options.samples or [20_000, 50_000]:
        for name, peers in GREEDY.items():
            row: dict[str, Any] = {"selector": name, "samples": samples}
            row |= {"features": options.features, "kept": int(options.ratio * samples)}
            for peer in peers:
                if peer.split()[0] not in options.peers:
                    continue
                row[peer] = alone(_greedy, peer, samples, options.features, options.ratio)
            yield row


def _greedy(peer: str, samples: int, features: int, ratio: float) -> dict[str, Any]:
    values = clusters(samples, features)
    size = int(ratio * samples)
    try:
        PEERS[peer](values[:200], 20)  # compiles code before it is measured
    except ImportError as error:
        return {"error": str(error)}
    before, start, processor = peak(), perf_counter(), process_time()
    try:
        ranking, chosen_in = PEERS[peer](values, size)
    except MemoryError as error:
        return {
            "error": f"{type(error).__name__}: {error}",
            "seconds": round(perf_counter() - start),
        }
    seconds, processor = perf_counter() - start, process_time() - processor
    row = {"seconds": round(seconds, 2), "processor_seconds": round(processor, 2)}
    row["peak_above_GB"] = round((peak() - before) / 1e9, 2)
    if len(ranking) < size:
        row["choices_taken"] = len(ranking)
        row["seconds_of_all_at_this_rate"] = round(chosen_in * size, 1)
        return row
    distances = nearest(values, torch.as_tensor(ranking))
    return row | {"radius": float(distances.max()), "mean_distance": float(distances.mean())}


def nearest(values: Tensor, kept: Tensor) -> Tensor:
    """The distance of each sample to the nearest kept one."""
    return torch.cat([torch.cdist(part, values[kept]).amin(1) for part in values.split(4096)])


Ranked = tuple[Any, float]


def ours(selector: Any) -> Callable[[Tensor, int], Ranked]:
    def run(values: Tensor, size: int) -> Ranked:
        return selector(values, size / len(values)).ranking, 0.0

    return run


def numpy_k_center(values: Tensor, size: int) -> Ranked:
    """Direct implementation: distances to the newest center, their minimum, its argmax."""
    x = values.numpy()
    away = np.full(len(x), np.inf, dtype=np.float32)
    ranking, start = [0], perf_counter()
    while len(ranking) < size and perf_counter() - start < 60:  # each selection takes equally long
        away = np.minimum(away, np.linalg.norm(x - x[ranking[-1]], axis=1))
        ranking.append(int(away.argmax()))
    return ranking, (perf_counter() - start) / len(ranking)


def numpy_facility(values: Tensor, size: int) -> Ranked:
    """Direct implementation: all distances once, then the gain of each candidate at each step."""
    x = values.numpy()
    if 4 * len(x) ** 2 > 11e9:
        raise MemoryError(f"all distances take {4 * len(x) ** 2 / 1e9:.0f} GB, and as much again")
    squares = (x**2).sum(1)
    away = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0))
    close, ranking, start = np.full(len(x), away.max()), [], perf_counter()
    while len(ranking) < size and (perf_counter() - start < 120 or len(ranking) < 3):
        gains = np.array([np.maximum(close - row, 0).sum() for row in away])
        ranking.append(int(gains.argmax()))
        close = np.minimum(close, away[ranking[-1]])
    return ranking, (perf_counter() - start) / len(ranking)


def apricot(values: Tensor, size: int) -> Ranked:
    """Lazy greedy of apricot on the same similarities: the largest distance minus the distance."""
    from sklearn.metrics import pairwise_distances

    if 12 * len(values) ** 2 > 20e9:
        raise MemoryError(f"{12 * len(values) ** 2 / 1e9:.0f} GB for three arrays of all pairs")
    close = pairwise_distances(values.numpy())
    np.subtract(close.max(), close, out=close)
    chooser = import_module("apricot").FacilityLocationSelection(
        size, metric="precomputed", optimizer="two-stage"
    )
    return chooser.fit(close).ranking, 0.0


PEERS: dict[str, Callable[[Tensor, int], Ranked]] = {
    "drophot k_center": ours(k_center),
    "numpy k_center": numpy_k_center,
    "drophot facility_location": ours(facility_location),
    "numpy facility_location": numpy_facility,
    "apricot facility_location": apricot,
}
GREEDY = {
    "k_center": ["drophot k_center", "numpy k_center"],
    "facility_location": [
        "drophot facility_location",
        "apricot facility_location",
        "numpy facility_location",
    ],
}


def growth(options: Namespace) -> Any:
    """Keep a tenth, at most 50 per class. The time of facility location grows quadratically.

    So a million is done class by class: a hundred classes, and as many features, softmax − one-hot.
    """
    for samples in options.samples or [1_000, 10_000, 100_000, 1_000_000]:
        size = min(samples // 10, 50 * options.classes)
        yield alone(_growth, "k_center", samples, options.features, size)
        if samples <= 10_000:
            yield alone(_growth, "facility_location", samples, options.features, size)
        yield alone(_growth, "facility_location by class", samples, 100, size, options.classes)


def _growth(
    name: str, samples: int, features: int, size: int, classes: int | None = None
) -> dict[str, Any]:
    values = clusters(samples, features)
    targets = None if classes is None else torch.arange(samples) % classes
    selector = k_center if name == "k_center" else facility_location
    before, start, processor = peak(), perf_counter(), process_time()
    selector(values, size / samples, targets=targets)
    seconds, processor = perf_counter() - start, process_time() - processor
    return {
        "selector": name,
        "samples": samples,
        "features": features,
        "classes": classes,
        "kept": size,
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "features_GB": round(values.nbytes / 1e9, 3),
        "peak_above_GB": round((peak() - before) / 1e9, 2),
    }


def crest(options: Namespace) -> Any:
    """Milliseconds of a step with random batches and with CREST, alternately, on one core."""
    torch.set_num_threads(1)
    device = torch.device(options.device)
    makers = {"fcnet": fcnet, "lenet": lenet}
    total, steps = 50_000, 40
    for name in makers:
        draws = torch.Generator().manual_seed(0)
        inputs = torch.randn(total, 1, 28, 28, generator=draws)
        data = torch.utils.data.TensorDataset(inputs, torch.randint(0, 10, (total,)))
        row: dict[str, Any] = {"model": name, "samples": total, "batch_size": 128}
        sides: dict[str, Any] = {}
        for threshold in (0.0, 0.1, float("inf")):
            model = makers[name]().to(device)
            loader = CrestLoader(data, model, batch_size=128, threshold=threshold)
            loader._steps = steps
            sides[f"threshold {threshold}"] = (model, loader, [])
        model = makers[name]().to(device)
        sides["random batches"] = (model, Batches(data, steps, device), [])
        optimizers = {
            side: torch.optim.SGD(m.parameters(), 1e-3) for side, (m, _, _) in sides.items()
        }
        for _ in range(options.rounds + 1):
            for side, (model, loader, times) in sides.items():
                start = perf_counter()
                fit(model, loader, 1, optimizer=optimizers[side])
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(1000 * (perf_counter() - start) / steps)
        for side, (_, loader, times) in sides.items():
            row[side] = {"ms": round(statistics.median(times[1:]), 2)}
            if isinstance(loader, CrestLoader):
                row[side] |= {"selections": loader.selections, "checks": loader.checks}
                row[side] |= {"steps": steps * len(times), "check_every": loader.check_every}
        plain = row["random batches"]["ms"]
        for side in sides:
            row[side]["over_random"] = round(row[side]["ms"] / plain, 2)
        yield row


class Batches:
    """Random batches, read in the same way as those of CREST."""

    def __init__(self, data: Any, steps: int, device: torch.device) -> None:
        self.data, self.steps, self.device = batching.in_memory(data, device), steps, device
        self.total = len(data)

    def __iter__(self) -> Any:
        for _ in range(self.steps):
            yield batching.at(self.data, torch.randint(0, self.total, (128,)), self.device)


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a separate process, to measure its memory."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


WHAT = {
    "select": selecting,
    "parts": parts,
    "greedy": greedy,
    "growth": growth,
    "crest": crest,
}

if __name__ == "__main__":
    main()
