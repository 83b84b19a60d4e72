"""Optimizations of a training step on a CPU that were tried and rejected.

Milliseconds of a step of 64 samples on one core, compared with the step of drophot in one run:
`torch.compile`, bfloat16 by autocast, several models stacked into one step by `torch.func.vmap`
(time per model), two threads.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from statistics import median
from typing import Any

import torch
from common import save
from step import BATCH, MODELS, ready, seconds
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

CPU = torch.device("cpu")
STACKED = 4  # models


def main() -> None:
    figures: dict[str, Any] = {}
    for name in ("fcnet", "lenet"):
        times: dict[str, list[float]] = {}
        for _ in range(5):
            for kind, measured in KINDS.items():
                times.setdefault(kind, []).append(1e3 * measured(name))
        figures[name] = {kind: round(median(values), 2) for kind, values in times.items()}
        print(name, json.dumps(figures[name], indent=2))
    torch.set_num_threads(1)
    save("tried_cpu", CPU, figures)


def ours(name: str, threads: int = 1) -> float:
    torch.set_num_threads(threads)
    with ready(name, CPU) as step:
        step()
        return seconds(step, 50, CPU)


def mixed(name: str) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return ours(name)


@cache
def compiled_once(name: str) -> tuple[Callable[[Tensor], Tensor], torch.optim.Optimizer]:
    model = MODELS[name][0]()
    return torch.compile(model), torch.optim.Adam(model.parameters(), fused=True)


def compiled(name: str) -> float:
    model, optimizer = compiled_once(name)
    inputs, targets = batch(MODELS[name][1])
    return timed(lambda: nn.functional.cross_entropy(model(inputs), targets), optimizer)


def stacked(name: str) -> float:
    make, shape = MODELS[name]
    models = [make() for _ in range(STACKED)]
    base = deepcopy(models[0]).to("meta")
    weights, buffers = stack_module_state(models)
    optimizer = torch.optim.Adam(weights.values(), fused=True)
    inputs, targets = (torch.stack([part] * STACKED) for part in batch(shape))

    def loss(weights: Any, buffers: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = functional_call(base, (weights, buffers), (inputs,))
        return nn.functional.cross_entropy(logits, targets)

    forward = vmap(loss)
    return timed(lambda: forward(weights, buffers, inputs, targets).sum(), optimizer) / STACKED


def timed(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> float:
    torch.set_num_threads(1)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    step()
    return seconds(step, 50, CPU)


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, *shape), torch.randint(10, (BATCH,))


KINDS: dict[str, Callable[[str], float]] = {
    "drophot": ours,
    "drophot, two threads": lambda name: ours(name, 2),
    "bfloat16": mixed,
    "torch.compile": compiled,
    f"{STACKED} models by vmap, each": stacked,
}

if __name__ == "__main__":
    main()
