"""A plugin of `.ci/gpu`: the suite with CUDA as the default device, on a machine with few packages.

Files that import a package that is not installed are left out, and named at the end.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
# What every test file may import; helpers import no other packages than these and torch's.
OWN = {path.stem for path in TESTS.iterdir()} | {"conftest", "drophot", "helpers"}

if torch.cuda.is_available():
    torch.set_default_device("cuda")


def missing(path: Path) -> list[str]:
    """The packages that a file imports at its top level and that are not installed."""
    names = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    return sorted(name for name in names - OWN if find_spec(name) is None)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    is_test = collection_path.is_file() and collection_path.name.startswith("test_")
    return True if is_test and missing(collection_path) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left_out = {path: missing(path) for path in sorted(TESTS.rglob("test_*.py"))}
    for path, names in left_out.items():
        if names:
            terminalreporter.write_line(
                f"LEFT OUT {path.relative_to(TESTS)}: no {', '.join(names)}"
            )
