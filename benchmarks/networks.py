"""Remove half of the channels of 217 real networks with drophot and with Torch-Pruning.

The networks are from timm, torchvision, Transformers and segmentation-models-pytorch (`zoo.py`),
with random weights in float64. Each network and tool runs in a separate process with one thread and
limits on time and memory. A finished run appends a row to `results/networks.csv`, so a command that
was killed resumes. `--part 2/8` runs the second of eight parts, `--only timm/vit` the networks
whose names contain this text, and `--again crashed wrong` repeats the rows with these outcomes.
`--table` counts the outcomes in the file.

Outcomes:

- `right`: the pruned network computes the same as the dense one with the removed entries at zero,
  for another batch, and for another input size if the network accepts one (`oracle.py`).
- `right but for attention's scale`: the same, if the dense network uses the pruned one's scale.
- `nothing removed`: right, because it is still the dense network.
- `refused`: a ValueError that names the argument; the network is unchanged.
- `not checked`: the pruned network runs, but could not be compared; the column `off` says why.
- `wrong`, `broken` (the forward pass fails after pruning), `crashed`, `timed out`, `out of memory`.

Torch-Pruning is used as in its examples: with MagnitudeImportance(p=2), the output layers of the
network ignored and the number of heads given. Attributes of attention are repaired afterwards.
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
import resource
import signal
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
import zoo
from oracle import NotChecked, Wrong, call, compare, distinct, tensors_of
from peer import by_torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

TOOLS = ("drophot", "torch_pruning")
FIELDS = (
    *("network", "tool", "asked", "outcome", "seconds", "channels_removed", "parameters_removed"),
    *("parameters", "parameters_after", "flops", "flops_after", "layers_left_whole"),
    *("most_frequent_reason", "off", "checked_on", "dtype"),
)
TABLE = Path(__file__).parent / "results" / "networks.csv"
RATIO = 0.5


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--only", nargs="+", default=[""], help="text in the names of the networks")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--again", nargs="*", default=[], help="outcomes to repeat")
    parser.add_argument(
        "--seconds", type=int, default=30, help="limit of processor time per network and tool"
    )
    parser.add_argument("--wall", type=int, default=600, help="limit of wall-clock seconds")
    parser.add_argument("--gib", type=float, default=10, help="of memory")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument(
        "--table", action="store_true", help="count the outcomes in the file and exit"
    )
    options = parser.parse_args()
    if options.table:
        print(counted(read(options.out)))
        return
    part, parts = map(int, options.part.split("/"))
    done = {(row["network"], row["tool"]): row["outcome"] for row in read(options.out)}
    names = [name for only in options.only for name in zoo.NAMES if only in name]
    for name in list(dict.fromkeys(names))[part - 1 :: parts]:
        for tool in options.tools:
            before = done.get((name, tool))
            if before is not None and before not in options.again:
                continue
            row = in_a_process(name, tool, options)
            write(options.out, row)
            print(*(row.get(field, "") for field in FIELDS[:2]), row["outcome"], row["seconds"])
            print("   ", row.get("parameters_removed"), row.get("most_frequent_reason"), flush=True)
    print(counted(read(options.out)))


def read(path: Path) -> list[dict[str, str]]:
    """The last row of each network and tool."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = {(row["network"], row["tool"]): row for row in csv.DictReader(file)}
    return list(rows.values())


def write(path: Path, row: dict[str, Any], fields: Sequence[str] = FIELDS) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def counted(rows: list[dict[str, str]]) -> str:
    """The outcomes of all rows, and of the networks that every tool was run on."""
    tools = Counter(row["network"] for row in rows)
    shared = [row for row in rows if tools[row["network"]] == len(TOOLS)]
    return f"{outcomes(rows)}\n\nby both:\n{outcomes(shared)}"


def outcomes(rows: list[dict[str, str]]) -> str:
    """The number of each outcome, and the median share removed where the result is right."""
    lines = []
    for tool in TOOLS:
        mine = [row for row in rows if row["tool"] == tool]
        lines.append(f"{tool}: {len(mine)} networks")
        for outcome, number in Counter(row["outcome"] for row in mine).most_common():
            lines.append(f"  {number:>4} {outcome}")
        removed = [float(row["parameters_removed"]) for row in mine if row["outcome"] == "right"]
        if removed:
            middle, few = median(removed), sum(share < 0.6 for share in removed)
            lines.append(f"  of parameters, median {middle:.1%}; {few} below 60 %")
    return "\n".join(lines)


Measure = Callable[[str, str, Connection], None]


def in_a_process(
    name: str, tool: str, options: Namespace, measure: Measure | None = None
) -> dict[str, Any]:
    """The row of a run, even if its process crashes or is killed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=work, args=(name, tool, theirs, options, measure or compare_tools), daemon=True
    )
    start = perf_counter()
    process.start()
    theirs.close()
    row: dict[str, Any] = {"network": name, "tool": tool, "asked": RATIO, "outcome": "crashed"}
    try:
        while ours.poll(max(0.0, start + options.wall - perf_counter())):
            row |= ours.recv()
    except EOFError:
        process.join(10)
    if process.is_alive() or process.exitcode == -signal.SIGKILL:
        if row["outcome"] == "crashed":
            row |= {"outcome": "timed out", "seconds": options.seconds}
    elif row["outcome"] == "crashed" and "most_frequent_reason" not in row:
        row["most_frequent_reason"] = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return row


def work(name: str, tool: str, pipe: Connection, options: Namespace, measure: Measure) -> None:
    memory = int(options.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (options.seconds, options.seconds))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        with torch.device("cpu"):
            measure(name, tool, pipe)
    except (MemoryError, torch.OutOfMemoryError) as error:
        pipe.send({"outcome": "out of memory", "most_frequent_reason": said(error)})
    except Exception as error:
        if "can't allocate memory" in str(error):
            pipe.send({"outcome": "out of memory", "most_frequent_reason": said(error)})
        else:
            pipe.send({"outcome": "crashed", "most_frequent_reason": said(error)})
    pipe.close()


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]


def compare_tools(name: str, tool: str, pipe: Connection) -> None:
    """Remove half of the channels, and check the result."""
    model, inputs, others = double(name)
    example = inputs(1 if large(inputs) else 2, 0)
    dense = deepcopy(model)
    flops = operations(model, example)
    before = widths(model)
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    pipe.send(row)
    start = process_time()
    try:
        whole = (by_drophot if tool == "drophot" else by_torch_pruning)(model, RATIO, example)
    except ValueError as error:
        if tool != "drophot" or "`" not in str(error):
            raise
        same = all(map(torch.equal, dense.parameters(), model.parameters()))
        row |= {"outcome": "refused" if same else "crashed", "most_frequent_reason": said(error)}
        pipe.send(row)
        return
    finally:
        pipe.send({"seconds": round(process_time() - start, 2)})
    after = widths(model)
    left = sum(p.numel() for p in model.parameters())
    reasons = Counter(whole.values()).most_common(1)
    row |= {
        "outcome": "not checked",
        "parameters_after": left,
        "parameters_removed": round(1 - left / row["parameters"], 4),
        "channels_removed": round(1 - sum(after.values()) / sum(before.values()), 4),
        "layers_left_whole": round(
            sum(after.get(path) == n for path, n in before.items()) / len(before), 3
        ),
        "most_frequent_reason": reasons[0][0][:400] if reasons else "",
    }
    pipe.send(row)
    model.eval()
    try:
        call(model, example)
    except Exception as error:
        pipe.send({"outcome": "broken", "most_frequent_reason": said(error)})
        return
    row["flops_after"] = operations(model, example)
    pipe.send(row)
    pipe.send(checked(dense, model, inputs, others, row))


def checked(
    dense: nn.Module, model: nn.Module, inputs: Any, others: Any, row: dict[str, Any]
) -> dict[str, Any]:
    """Whether a pruned network is right, for another batch and another size."""
    batches, names = [inputs(2 if large(inputs) else 3, 1)], "another batch"
    if others is not None:
        try:
            batches.append(others(2, 2))
            call(dense, batches[-1])
            names += ", another size"
        except Exception:  # no such size in the dense network
            del batches[-1]
    limit = 1e-6 if row["dtype"] == "float64" else 1e-3
    found: dict[str, Any] = {"checked_on": names}
    for scale in (True, False):
        try:
            off = compare(dense, model, batches, scale=scale)
            found["off"] = f"{off:.1e}"
            if off <= limit:
                found["outcome"] = "right" if scale else "right but for attention's scale"
                if row["parameters_after"] == row["parameters"]:
                    found["outcome"] = "nothing removed"
                return found
            found.setdefault("outcome", "wrong")
        except Wrong as error:
            found |= {"outcome": "wrong", "off": str(error)[:200]}
        except NotChecked as error:
            found["off"] = str(error)[:200]
        except Exception as error:
            found["off"] = said(error)
    return found


def double(name: str) -> tuple[nn.Module, Any, Any]:
    """A network created in or converted to float64, or in float32 if it does not run otherwise."""
    for made, runs in ((torch.float64,) * 2, (torch.float32, torch.float64), (torch.float32,) * 2):
        torch.set_default_dtype(made)
        model, inputs, others = zoo.make(name)
        torch.set_default_dtype(runs)
        model = distinct(model.to(runs))
        try:
            call(model, inputs(2, 0))
        except Exception:
            if made == runs == torch.float32:
                raise
        else:
            break
    return model, inputs, others


def large(inputs: Any) -> bool:
    """Whether one sample is enough work, so that no second one is needed."""
    tensors = tensors_of(inputs(1, 0))
    return sum(t.numel() for t in tensors) > 3 * 200 * 200


def operations(model: nn.Module, inputs: Any) -> int | str:
    """The operations as torch counts them, two for each multiply-add."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counter = FlopCounterMode(display=False)
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with counter:
            call(model, inputs)
    except Exception:
        return ""
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    return counter.get_total_flops()


def widths(model: nn.Module) -> dict[str, int]:
    """The outputs of each layer."""
    found = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        turned = isinstance(module, _ConvTransposeNd) or type(module).__name__ == "Conv1D"
        if isinstance(weight, Tensor) and (turned or isinstance(module, (nn.Linear, _ConvNd))):
            found[path] = weight.shape[int(turned)]
    return found


def by_drophot(model: nn.Module, ratio: float, example: Any) -> dict[str, str]:
    """Prune, and give the reasons of layers that are whole."""
    return dict(
        import_module("drophot.structured").prune_channels(model, ratio, example).unpruned_layers
    )


def imported() -> str:
    """Load the libraries, and return their versions."""
    names = ("drophot.structured", "torch_pruning", "timm", "torchvision.models.detection")
    for name in (*names, "segmentation_models_pytorch", "transformers"):
        import_module(name)
    library = import_module("transformers")
    for kind, config, _ in zoo.HF.values():
        assert getattr(library, kind)  # loads them
        assert getattr(library, config)
    small = nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)
    )  # loads lazily imported modules
    for tool in (by_drophot, by_torch_pruning):
        tool(deepcopy(small), RATIO, torch.ones(2, 4))
    packages = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch")
    return ", ".join(f"{name} {version(name)}" for name in (*packages, "torch-pruning"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--table" not in sys.argv:
        print(imported())
    main()
