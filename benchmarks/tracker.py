"""What tracking costs: `update` beside the training step of ResNet-18 at 32x32, batch 128.

Training steps with and without `update` take turns, and the medians are compared; `update` alone
is timed beside Toneva et al.'s way, a Python loop over the samples with a list for each.
"""

import json
import statistics
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter

import torch
from common import save
from torch import Tensor, nn

from drophot import ForgettingTracker
from drophot.models import resnet18


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = resnet18().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs = torch.randn(options.batch_size, 3, 32, 32, device=device)
    classes = torch.randint(10, (options.samples,))
    tracker = ForgettingTracker(options.samples)
    logits = torch.randn(options.batch_size, 10, device=device)

    def batch() -> tuple[Tensor, Tensor]:
        index = torch.randperm(options.samples)[: options.batch_size]
        return index, classes[index].to(device)

    def step(track: bool) -> Callable[[], None]:
        index, targets = batch()

        def run() -> None:
            outputs = model(inputs)
            optimizer.zero_grad()
            nn.functional.cross_entropy(outputs, targets).backward()
            optimizer.step()
            if track:
                tracker.update(index, outputs, targets)

        return run

    def update() -> Callable[[], None]:
        index, targets = batch()
        return lambda: tracker.update(index, logits, targets)

    history: dict[int, list[tuple[float, float]]] = defaultdict(list)

    def loop() -> Callable[[], None]:
        """The same by a Python loop: loss and correctness of each sample, appended to its list."""
        index, targets = batch()

        def run() -> None:
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")
            right = logits.argmax(1) == targets
            for position in range(len(index)):
                history[int(index[position])].append((
                    losses[position].item(),
                    right[position].item(),
                ))

        return run

    def seconds(work: Callable[[], None]) -> float:
        start = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    def medians(
        makes: dict[str, Callable[[], Callable[[], None]]], rounds: int
    ) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in makes}
        for _ in range(rounds):
            for name, make in makes.items():  # in turn, so that a slower machine slows all
                times[name].append(seconds(make()))
        return {name: statistics.median(values[rounds // 5 :]) for name, values in times.items()}

    steps = medians({"plain": lambda: step(False), "tracked": lambda: step(True)}, options.steps)
    alone = medians({"update": update, "loop": loop}, 300)
    tensors = [value for value in tracker.state_dict().values() if isinstance(value, Tensor)]
    figures = {
        "batch_size": options.batch_size,
        "step_ms": round(1e3 * steps["plain"], 2),
        "tracked_step_ms": round(1e3 * steps["tracked"], 2),
        "update_us": round(1e6 * alone["update"], 1),
        "update_over_step": round(alone["update"] / steps["plain"], 5),
        "python_loop_us": round(1e6 * alone["loop"], 1),
        "times_faster_than_python_loop": round(alone["loop"] / alone["update"], 1),
        "bytes_a_sample": sum(tensor.nbytes for tensor in tensors) / options.samples,
    }
    print(json.dumps(figures, indent=2))
    save(f"tracker_{device.type}", device, figures)


if __name__ == "__main__":
    main()
