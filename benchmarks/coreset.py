"""Seconds of `select` beside `torch.topk` alone, on the same scores, in turn."""

import json
import statistics
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from time import perf_counter

import torch
from common import save

from drophot import select


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    size = int(options.ratio * options.samples)
    figures = []
    for kind in ("forgetting counts", "distinct scores"):
        scores = torch.randn(options.samples, device=options.device)
        if kind == "forgetting counts":  # most samples 0, as on MNIST
            scores = scores.mul_(1.5).clamp_(0).round_().to(torch.int64)
        times: dict[str, list[float]] = {"select": [], "topk": []}
        for _ in range(options.rounds):
            for name in times:
                start = perf_counter()
                if name == "select":
                    select(scores, options.ratio)
                else:
                    scores.topk(size).indices.cpu()
                times[name].append(perf_counter() - start)
        row = {"scores": kind, "samples": options.samples, "ratio": options.ratio}
        row |= {name: round(statistics.median(values), 3) for name, values in times.items()}
        row["select_over_topk"] = round(
            statistics.median(a / b for a, b in zip(times["select"], times["topk"], strict=True)), 3
        )
        figures.append(row)
        print(json.dumps(row))
    save("coreset", torch.device(options.device), figures)


if __name__ == "__main__":
    main()
