"""Prune 217 real networks to half of their parameters with `prune_channels(to=Budget(...))`.

The networks, processes and limits are those of `networks.py`. A finished run appends a row to
`results/budgets.csv`, so a command that was killed resumes. Besides the outcomes of `networks.py`,
which say whether a pruned network is right, a row has:

- `limit` and `parameters_after`: what was asked, and what was reached.
- `with_one_more`: the fewest parameters with one more channel in a layer, of three layers whose
  channels have the fewest: above the limit if it was reached within one channel.
- `trains`: whether a step of SGD has finite gradients, if it has them in the dense network.
"""

from __future__ import annotations

import csv
import logging
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter
from copy import deepcopy
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import networks
import torch
import zoo
from networks import call, checked, double, in_a_process, large, said
from oracle import tensors_of
from torch import nn

from drophot.structured import Budget, ChannelPlan, plan_channels

FIELDS = (
    *("network", "outcome", "seconds", "parameters", "limit", "parameters_after"),
    *("with_one_more", "trains", "flops", "flops_after", "most_frequent_reason", "off"),
    *("checked_on", "dtype"),
)
TABLE = Path(__file__).parent / "results" / "budgets.csv"
SHARE = 0.5


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--only", nargs="+", default=[""], help="text in the names of the networks")
    parser.add_argument("--seconds", type=int, default=120, help="limit of processor time")
    parser.add_argument("--wall", type=int, default=900, help="limit of wall-clock seconds")
    parser.add_argument("--gib", type=float, default=10, help="of memory")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--table", action="store_true", help="count the rows and exit")
    options = parser.parse_args()
    if not options.table:
        logging.disable(logging.WARNING)
        print(networks.imported())
        part, parts = map(int, options.part.split("/"))
        done = {row["network"] for row in read(options.out)}
        names = [name for only in options.only for name in zoo.NAMES if only in name]
        for name in list(dict.fromkeys(names))[part - 1 :: parts]:
            if name not in done:
                row = in_a_process(name, "drophot", options, measure)
                networks.write(options.out, {field: row.get(field, "") for field in FIELDS}, FIELDS)
                print(name, row["outcome"], row.get("trains"), flush=True)
    print(counted(read(options.out)))


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def counted(rows: list[dict[str, str]]) -> str:
    """The number of each outcome, and how close to the limits the networks came."""
    lines = [f"{number:>4} {name}" for name, number in counts(rows, "outcome")]
    lines += [
        f"{number:>4} trains: {name or 'not tried'}" for name, number in counts(rows, "trains")
    ]
    reached = [row for row in rows if row["parameters_after"]]
    if reached:
        within = [int(row["parameters_after"]) <= int(row["limit"]) for row in reached]
        more = [row for row in reached if row["with_one_more"]]
        above = [int(row["with_one_more"]) > int(row["limit"]) for row in more]
        left = [1 - int(row["parameters_after"]) / int(row["limit"]) for row in reached]
        lines += [
            f"{sum(within)} of {len(reached)} within the limit",
            f"{sum(above)} of {len(more)} above it with one more channel",
            f"below the limit by {median(left):.3%} (median), {max(left):.2%} (most)",
        ]
    return "\n".join(lines)


def counts(rows: list[dict[str, str]], field: str) -> list[tuple[str, int]]:
    return Counter(row[field] for row in rows).most_common()


def measure(name: str, _: str, pipe: Connection) -> None:
    model, inputs, others = double(name)
    example = inputs(1 if large(inputs) else 2, 0)
    dense = deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {
        "parameters": before,
        "limit": int(SHARE * before),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    pipe.send(row)
    start = process_time()
    try:
        plan = plan_channels(model, example_inputs=example, to=Budget(parameters=row["limit"]))
        pruned = plan.apply(model, example)
    except ValueError as error:
        if "`" not in str(error):
            raise
        same = all(map(torch.equal, dense.parameters(), model.parameters()))
        row |= {"outcome": "refused" if same else "crashed", "most_frequent_reason": said(error)}
        pipe.send(row)
        return
    finally:
        pipe.send({"seconds": round(process_time() - start, 2)})
    after = sum(p.numel() for p in model.parameters())
    reasons = Counter(pruned.unpruned_layers.values()).most_common(1)
    row |= {
        "outcome": "not checked",
        "parameters_after": after,
        "flops": pruned.flops.before,
        "flops_after": pruned.flops.after,
        "most_frequent_reason": reasons[0][0][:400] if reasons else "",
    }
    pipe.send(row)
    model.eval()
    try:
        call(model, example)
    except Exception as error:
        pipe.send({"outcome": "broken", "most_frequent_reason": said(error)})
        return
    pipe.send(checked(dense, model, inputs, others, row))
    pipe.send({"with_one_more": with_one_more(plan, dense, example)})
    batch = inputs(2, 3)
    finite = trains(deepcopy(dense), batch)
    pipe.send({"trains": trains(model, batch) if finite else "not even the dense network"})


def with_one_more(plan: ChannelPlan, dense: nn.Module, example: Any) -> int | str:
    """The fewest parameters with one of the planned channels kept, in three of the layers."""
    sizes: dict[tuple[str, ...], tuple[int, str, int]] = {}
    for layer, gone in plan.removed.items():
        if not gone:
            continue
        number = plan.channels[layer][gone[0]]
        coupled = tuple(name for name, channels in plan.channels.items() if number in channels)
        size = sum(dense.get_parameter(name)[0].numel() for name in coupled)
        sizes.setdefault(coupled, (size, layer, gone[0]))
    found = []
    for _, layer, channel in sorted(sizes.values())[:3]:
        model = deepcopy(dense)
        try:
            plan.keep(layer, [channel]).apply(model, example)
        except ValueError:  # another channel has to be kept with it, such as one of each head
            continue
        found.append(sum(p.numel() for p in model.parameters()))
    return min(found, default="")


def trains(model: nn.Module, batch: Any) -> bool:
    """Whether a step in training mode has finite gradients and changes the weights."""
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    try:
        if isinstance(batch, dict):
            out = model(**batch)
        else:
            out = model(*batch) if isinstance(batch, tuple) else model(batch)
        outputs = [t for t in tensors_of(out) if t.is_floating_point() and t.requires_grad]
        torch.stack([t.square().mean() for t in outputs]).sum().backward()
        torch.optim.SGD(weights, lr=1e-3).step()
    except Exception:
        return False
    finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in weights)
    return finite and any(not torch.equal(a, b) for a, b in zip(weights, before, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
