"""`python -m drophot`: summaries of networks, grids and suspicious labels without a script."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import drophot


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Args:
        arguments: The words after `drophot`; `None` takes those of the process.

    Returns:
        0, or 2 after an error, or 1 if the reader of a pipe stopped before the end.

    Raises:
        SystemExit: After `--help` and `--version`, or if the arguments are not those of a command.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123  # Python flushes stdout once more
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}."
        print("drophot: error:", *text.split(), file=sys.stderr)  # noqa: T201  # one line
        return 2
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("drophot", description=drophot.__doc__)
    parser.add_argument("--version", action="version", version=f"drophot {drophot.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    key = "the entry of a checkpoint to read, such as `ema` or `states.ema`, if it has several"

    text = "print the layers, parameters and sparsity of a network"
    summary = commands.add_parser("summary", help=text, description=text)
    summary.add_argument(
        "source",
        metavar="FILE_OR_FACTORY",
        help="a file of torch.save, safetensors or save_compressed, or module:factory, which is "
        "imported and called without arguments, such as torchvision.models:resnet18",
    )
    summary.add_argument("--key", metavar="KEY", help=key)
    summary.set_defaults(run=_summary)

    text = "print the samples that are most likely mislabeled, as CSV"
    suspects = commands.add_parser("suspects", help=text, description=text)
    suspects.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a file of torch.save that holds the state_dict of a DynamicsTracker",
    )
    suspects.add_argument(
        "--score",
        default="aum",
        help="the statistic to sort by (default: %(default)s)",
    )
    suspects.add_argument(
        "--number", type=int, default=100, help="how many samples to print (default: %(default)s)"
    )
    suspects.add_argument("--key", metavar="KEY", help=key)
    suspects.set_defaults(run=_suspects)

    text = "look at the folder of a grid, which may still be running"
    grid = commands.add_parser("grid", help=text, description=text)
    grid_commands = grid.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "print how many runs are done"
    status = grid_commands.add_parser("status", help=text, description=text)
    text = "write an HTML page of the results"
    report = grid_commands.add_parser("report", help=text, description=text)
    for command in (status, report):
        command.add_argument(
            "store", type=Path, metavar="STORE", help="the folder that was passed to Grid.run"
        )
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: STORE/report.html)"
    )
    status.set_defaults(run=_status)
    report.set_defaults(run=_report)
    return parser


# Each command imports its code when it runs, so that the others do not wait for it.


def _summary(options: Namespace) -> None:
    from drophot._command_line import network_summary

    print(network_summary.of(options.source, options.key))  # noqa: T201


def _suspects(options: Namespace) -> None:
    from drophot._command_line import suspects

    suspects.write(options.checkpoint, options.score, options.number, options.key, sys.stdout)


def _status(options: Namespace) -> None:
    from drophot._command_line import grid_status

    print(grid_status.of(options.store))  # noqa: T201


def _report(options: Namespace) -> None:
    from drophot._command_line import grid_status
    from drophot.report import html

    grid_status.check_folder(options.store)
    print(html(options.store, options.output or options.store / "report.html"))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
