"""The definitions, written as plainly as they read; slow, and compared with the library."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from itertools import pairwise
from math import floor, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate


def forgetting(
    num_samples: int, presentations: Iterable[tuple[int, bool]]
) -> tuple[list[int], list[bool], list[int]]:
    """Toneva et al.'s definition, of (sample, right?) in turn: counts, learned, presented."""
    history: dict[int, list[bool]] = defaultdict(list)
    for sample, right in presentations:
        history[sample].append(right)
    counts = [
        sum(before and not now for before, now in pairwise(h))
        for h in (history[sample] for sample in range(num_samples))
    ]
    learned = [any(history[sample]) for sample in range(num_samples)]
    return counts, learned, [len(history[sample]) for sample in range(num_samples)]


def margin(logits: np.ndarray, target: int) -> float:
    """Pleiss et al.: the target's logit minus the largest other one."""
    return float(logits[target] - max(z for k, z in enumerate(logits) if k != target))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def el2n(logits: np.ndarray, target: int) -> float:
    """Paul et al.: the norm of the error vector, softmax minus one-hot."""
    return float(np.linalg.norm(softmax(logits) - np.eye(len(logits))[target]))


def dynamics(presentations: Iterable[tuple[np.ndarray, int]]) -> dict[str, float]:
    """Of one sample's (logits, target) in turn, in float64: the means over its presentations."""
    shown = [(logits.astype(np.float64), target) for logits, target in presentations]
    confidences = np.array([softmax(logits)[target] for logits, target in shown])
    return {
        "aum": float(np.mean([margin(logits, target) for logits, target in shown])),
        "el2n": float(np.mean([el2n(logits, target) for logits, target in shown])),
        # Swayamdipta et al.: mean and standard deviation over epochs, the latter divided by E.
        "confidence": float(np.mean(confidences)),
        "variability": float(np.sqrt(np.mean((confidences - np.mean(confidences)) ** 2))),
        "loss": float(np.mean([-np.log(c) for c in confidences])),
    }


def splitmix64(value: int, seed: int, stream: int = 0) -> int:
    """The tie-breaking hash, in Python's own integers."""
    word = 2**64

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % word
        return z ^ (z >> 31)

    start = mix((mix(seed % word) + stream) % word)
    return mix((start + (value + 1) * 0x9E3779B97F4A7C15) % word)


def select(
    scores: Sequence[float],
    size: int,
    mode: str,
    seed: int,
    positions: Sequence[int] | None = None,
) -> list[int]:
    """Sort everything by (score, hash), take one end."""
    everything = range(len(scores)) if positions is None else positions
    if mode == "random":
        return sorted(sorted(everything, key=lambda i: splitmix64(i, seed, 1))[:size])
    order = sorted(everything, key=lambda i: (scores[i], splitmix64(i, seed)))
    return sorted(order[:size] if mode == "low" else order[len(order) - size :])


def largest_remainders(counts: Sequence[int], size: int, seed: int) -> list[int]:
    """Hamilton's method in exact fractions; equal remainders by hash of the class's rank."""
    total = sum(counts)
    exact = [Fraction(count * size, total) for count in counts]
    shares = [floor(share) for share in exact]
    order = sorted(range(len(counts)), key=lambda c: (-(exact[c] - shares[c]), splitmix64(c, seed)))
    for c in order[: size - sum(shares)]:
        shares[c] += 1
    return shares


def pruned(weights: Sequence[np.ndarray], ratio: float) -> tuple[float, int, int]:
    """By sorting all magnitudes: the edge, how many lie below it, how many equal it."""
    magnitudes = np.sort(np.abs(np.concatenate([w.ravel() for w in weights]).astype(np.float64)))
    remove = floor(ratio * len(magnitudes) + 0.5)
    if remove == 0:
        return 0.0, 0, int((magnitudes == 0).sum())
    edge = magnitudes[remove - 1]
    return float(edge), int((magnitudes < edge).sum()), int((magnitudes == edge).sum())


def position_counts(walks: list[list[int]]) -> list[int]:
    """What the paper's released code counts: predictions that differ at a position of two walks."""
    counts = [0] * len(walks[0])
    for before, after in pairwise(walks):
        for position, (old, new) in enumerate(zip(before, after, strict=True)):
            counts[position] += old != new
    return counts


def plain_fit(
    model: nn.Module,
    dataset: Any,
    epochs: int,
    *,
    optimizer: torch.optim.Optimizer,
    batch_size: int = 64,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    scheduler: Any = None,
    scheduler_interval: str = "epoch",
    before_step: Callable[[nn.Module], object] | None = None,
    on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    on_epoch: Callable[[int], object] | None = None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Training as in PyTorch's own tutorials; stands in for `drophot.fit`."""
    device = next(model.parameters()).device
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for part in torch.randperm(len(dataset), generator=order).split(batch_size):
            samples = [dataset[i] for i in part.tolist()]
            inputs, targets, *index = (t.to(device) for t in default_collate(samples))
            with within():
                logits = model(inputs)
                mean = loss(logits, targets).mean()
            optimizer.zero_grad()
            mean.backward()
            if before_step:
                before_step(model)
            optimizer.step()
            if scheduler and scheduler_interval == "step":
                scheduler.step()
            if on_batch:
                on_batch(index[0], logits.detach(), targets)
        if scheduler and scheduler_interval == "epoch":
            scheduler.step()
        if on_epoch:
            on_epoch(epoch)


def erk_removed(shapes: dict[str, tuple[int, ...]], ratio: float) -> dict[str, float]:
    """RigL's appendix: densities in proportion to the sum of the dimensions over their product.

    Before rounding: how many weights of each layer go. A layer that would be more than dense is
    dense, and the others are scaled anew.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    keep = sum(sizes.values()) - floor(ratio * sum(sizes.values()) + 0.5)
    dense: list[str] = []
    while True:
        rest = {n: sum(shape) / prod(shape) for n, shape in shapes.items() if n not in dense}
        budget = keep - sum(sizes[name] for name in dense)
        epsilon = budget / sum(rest[name] * sizes[name] for name in rest) if rest else 0
        above = [name for name in rest if epsilon * rest[name] > 1]
        if not above:
            break
        dense.append(max(above, key=lambda name: rest[name]))
    return {
        name: 0.0 if name in dense else sizes[name] * (1 - epsilon * rest[name]) for name in shapes
    }


def lamp_scores(weights: list[float]) -> list[float]:
    """The square over the sum of the squares of all weights in the layer that are not smaller."""
    scores = []
    for one in weights:
        rest = sum(other**2 for other in weights if abs(other) >= abs(one))
        scores.append(one**2 / rest if rest else 0.0)
    return scores


def lamp_removed(layers: dict[str, list[float]], remove: int) -> dict[str, int]:
    """The least scores of all layers, for distinct ones."""
    ranked = sorted((score, name) for name, layer in layers.items() for score in lamp_scores(layer))
    gone = [name for _, name in ranked[:remove]]
    return {name: gone.count(name) for name in layers}


def kept_of_each(row: list[float], kept: int, of: int) -> list[bool]:
    """N:M along one row of inputs."""
    found = []
    for start in range(0, len(row), of):
        group = row[start : start + of]
        best = sorted(range(of), key=lambda place: (-abs(group[place]), place))[:kept]
        found += [place in best for place in range(of)]
    return found


def batchnorm_statistics(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of batches `(B, C)`, each batch by its number of samples."""
    counts = np.array([len(batch) for batch in batches], float)
    share = counts / counts.sum()
    means = np.stack([batch.mean(0) for batch in batches])
    variances = np.stack([batch.var(0, ddof=1) for batch in batches])
    return share @ means, share @ variances


def stratified(
    scores: Sequence[float],
    size: int,
    bins: int,
    cutoff: float,
    hard: str,
    seed: int,
    members: Sequence[int] | None = None,
) -> list[int]:
    """Zheng et al.'s algorithm 1 in exact fractions: drop the hardest, fill the smallest bins."""
    positions = list(range(len(scores))) if members is None else list(members)
    values = [Fraction(score) for score in scores]
    rest = max(size, len(positions) - floor(cutoff * len(positions) + 0.5))
    inside = select(values, rest, "low" if hard == "high" else "high", seed, positions)
    low, high = min(values[i] for i in inside), max(values[i] for i in inside)
    strata: list[list[int]] = [[] for _ in range(bins)]
    for i in inside:
        place = 0 if low == high else floor((values[i] - low) / (high - low) * bins)
        strata[min(place, bins - 1)].append(i)
    kept: list[int] = []
    for left, stratum in zip(range(bins, 0, -1), sorted(strata, key=len), strict=True):
        share = min(len(stratum), (size - len(kept)) // left)
        kept += sorted(stratum, key=lambda p: splitmix64(p, seed, 2))[:share]
    return sorted(kept)


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances of all pairs, in float64, by differences."""
    return np.sqrt(((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(-1))


def farthest(features: np.ndarray, chosen: Sequence[int]) -> tuple[int, float]:
    """Gonzalez' next centre: the first sample that is farthest from all centres."""
    nearest = apart(features, features[list(chosen)]).min(1)
    nearest[list(chosen)] = -1
    return int(nearest.argmax()), float(nearest.max())


def facility_gains(features: np.ndarray, chosen: Sequence[int], furthest: float) -> np.ndarray:
    """By how much each sample would lower the sum of the distances to the nearest medoid."""
    away = apart(features, features)
    nearest = np.full(len(features), furthest)
    if len(chosen):
        nearest = away[:, list(chosen)].min(1)
    gains = np.maximum(nearest[:, None] - away, 0).sum(0)
    gains[list(chosen)] = -1
    return gains


def weights_of_medoids(vectors: np.ndarray, chosen: Sequence[int]) -> list[int]:
    """How many vectors each medoid stands for, if each lowers the sum most, one after the other."""
    furthest = apart(vectors, vectors).max()
    for number, place in enumerate(chosen):
        gains = facility_gains(vectors, chosen[:number], furthest)
        assert gains[place] >= gains.max() - 1e-5, "each is the best that is left"
    owner = apart(vectors, vectors[list(chosen)]).argmin(1) if len(chosen) else np.empty(0)
    owner[list(chosen)] = np.arange(len(chosen))
    return [int((owner == number).sum()) for number in range(len(chosen))]


def window_spread(values: Sequence[float], window: int) -> float:
    """He et al.: the mean of the standard deviations (divided by J - 1) of sliding windows."""
    parts = [values[k : k + window] for k in range(len(values) - window + 1)]
    return float(np.mean([np.std(part, ddof=1) for part in parts])) if parts else np.nan


def dual(values: Sequence[float], window: int) -> float:
    """Cho et al.: the mean over sliding windows of 10 · std · (1 - mean)."""
    parts = [values[k : k + window] for k in range(len(values) - window + 1)]
    found = [10 * np.std(part, ddof=1) * (1 - np.mean(part)) for part in parts]
    return float(np.mean(found)) if found else np.nan


def tdds(outputs: Sequence[np.ndarray], window: int, decay: float) -> float:
    """Zhang et al.: changes of the outputs, their norm in each window, weighted by recency."""
    if len(outputs) < window:
        return np.nan
    total, last = 0.0, len(outputs) - window
    for k in range(last + 1):
        part = outputs[k : k + window]
        changes = [
            np.abs(new * (np.log(new + 1e-8) - np.log(old + 1e-8))).sum()
            for old, new in pairwise(part)
        ]
        norm = np.linalg.norm(np.array(changes) - np.mean(changes))
        total += float(norm * decay * (1 - decay) ** (last - k))
    return total


def first_learned(right: Sequence[bool]) -> float:
    """Toneva et al.: the first presentation at which a sample is right; NaN without any."""
    if not right:
        return np.nan
    return right.index(True) + 1 if True in right else np.inf


def learned_for_good(right: Sequence[bool]) -> float:
    """Baldock et al.: the first presentation from which on a sample is right each time."""
    if not right:
        return np.nan
    return next((t + 1 for t in range(len(right)) if all(right[t:])), np.inf)
