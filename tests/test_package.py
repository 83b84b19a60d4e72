"""The package: what an import costs, which way imports point, and what the README promises."""

import ast
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import drophot

SOURCE = ROOT / "src" / "drophot"

# A package imports only from the rows above its own, never from its own row.
ROWS = [
    {"models", "_core"},
    {"settings", "data"},
    {"tracking", "prune", "records"},
    {"coreset", "structured", "training", "stats", "integrations"},
    {"sampling", "report"},
    {"pipeline"},
    {"grid"},
    {"_command_line"},
    {"__main__"},
]
ALIASES = {"forgetting"}  # another name for a package; nothing inside imports it

FRESH = """
import json, sys
import torch, numpy, typing_extensions
before = {name.partition(".")[0] for name in sys.modules}
import drophot
def added():
    after = {name.partition(".")[0] for name in sys.modules}
    return sorted(after - before - set(sys.stdlib_module_names) - {"drophot"})
found = {"added": added()}
found |= {kind.__name__: [n for n in kind(drophot) if n[0] != "_"] for kind in (vars, dir)}
drophot.report
found["of the report"] = sorted({"matplotlib", "scipy"} & set(sys.modules))
def there(path):
    try:
        return callable(eval(path))
    except (AttributeError, ImportError):
        return False
found["promised"] = [path for path in sys.argv[1:] if not there(path)]
drophot.integrations
import logging
logging.getLogger("drophot").warning("as if")
import hypothesis
found["one more"] = "hypothesis" in added()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What a new process finds that has imported drophot and nothing else of ours."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, *sorted(PROMISED)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"errors": done.stderr}


@pytest.mark.slow
def test_importing_drophot_costs_torch_numpy_and_typing_extensions_only(
    fresh: dict[str, Any],
) -> None:
    assert fresh["added"] == []
    assert fresh["one more"], "which would be seen"


@pytest.mark.slow  # as all tests with `fresh`
def test_importing_the_report_imports_neither_matplotlib_nor_scipy(fresh: dict[str, Any]) -> None:
    assert fresh["of the report"] == []


def imported(path: Path) -> set[str]:
    """The packages of drophot that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("drophot.")}
    return found


def wrong_way(imports: dict[str, set[str]]) -> list[str]:
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    return sorted(
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in sorted(others - {name, "__version__"})
        if row[other] >= row[name]
    )


def test_packages_import_only_from_the_rows_above() -> None:
    imports: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if package not in {"__init__", *ALIASES}:
            imports.setdefault(package, set()).update(imported(path))
    assert imports.keys() == set().union(*ROWS), "every module is in a package with a row"
    assert wrong_way(imports) == []


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_an_extra_that_is_not_installed_is_an_error_with_the_line_for_pip(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"drophot.integrations.{name}"
    for loaded in [other for other in sys.modules if other.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=re.escape(f'pip install "drophot[{name}]"')):
        importlib.import_module(module)


def test_the_test_of_the_imports_can_fail() -> None:
    assert wrong_way({"prune": {"training", "prune"}}) == ["prune imports training"]
    assert wrong_way({"prune": {"tracking"}}) == ["prune imports tracking"]  # both are in one row
    assert wrong_way({"prune": {"_core"}}) == []


PROMISED = {
    "drophot.forgetting.ForgettingTracker",
    "drophot.coreset.select",
    "drophot.prune.magnitude_prune",
    "drophot.pipeline.DropHot",
    "drophot.structured.prune_channels",
    "drophot.training.fit",
    "drophot.grid.Grid",
    "drophot.report.html",
    "drophot.stats.paired",
    "drophot.models.lenet",
    "drophot.tracking.DynamicsTracker",
    "drophot.sampling.CrestLoader",
    "drophot.data.IndexedDataset",
}


def test_promised_paths_are_there_after_a_plain_import(fresh: dict[str, Any]) -> None:
    pytest.importorskip("torchvision", reason="the extra `vision` is not installed")
    assert fresh["promised"] == []


def test_nothing_leaks_from_the_package(fresh: dict[str, Any]) -> None:
    """Its attributes are its public names and its packages."""
    packages = {path.stem for path in SOURCE.iterdir() if path.name[0] != "_"} - {"py"}
    assert set(fresh["vars"]) <= {*drophot.__all__, *packages}
    assert packages <= set(fresh["dir"]) <= {*drophot.__all__, *packages}


def test_public_names_are_there_and_documented() -> None:
    assert sorted(drophot.__all__) == drophot.__all__
    for name in drophot.__all__:
        assert getattr(drophot, name).__doc__, name


def test_the_package_is_typed_and_its_version_stands_in_one_place() -> None:
    assert (SOURCE / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", drophot.__version__)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert drophot.__version__ not in pyproject
    assert f"[{drophot.__version__.removesuffix('.dev0')}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_library_is_silent(fresh: dict[str, Any]) -> None:
    """Even where nobody has set up logging."""
    assert fresh["errors"] == ""


UNRUN = ("changelog.md", "contributing.md", "examples.md", "result_tables.md", "results.md")
PAGES = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in UNRUN]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.S)


# What is missing where no extra is installed, and by which words of its code a page needs it.
NEEDS = {
    "matplotlib": r"from drophot\.report import .*(html|plot_)|import matplotlib",
    "scipy": r"from drophot\.report import .*differences|from drophot\.stats import",
    "tensorboard": r"torch\.utils\.tensorboard",
    "pandas": r"import pandas",
    "datasets": r"import datasets",
    "lightning": r"(from|import) lightning|integrations\.lightning",
    "transformers": r"(from|import) transformers|integrations\.transformers",
    "accelerate": r"(from|import) (accelerate|transformers)",  # the Trainer's
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page}" for page in PAGES)])
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # advice on small data
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.")  # its use of torch
def test_the_python_blocks_of_a_page_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(name).stem
    found = blocks(name, "python")
    assert found
    for package, words in NEEDS.items():
        if re.search(words, "".join(found)):
            pytest.importorskip(package, reason=f"`{package}` is not installed")
    monkeypatch.chdir(tmp_path)
    if "forkserver" in get_all_start_methods():  # sooner there than a process that is spawned
        quick = get_context("forkserver")
        monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: quick)
    names: dict[str, object] = {"__name__": page}
    torch.manual_seed(1)  # their data is random, and a coreset of it may lack a class
    for block in found:
        exec(compile(block, name, "exec"), names)  # blocks of a page build on each other


def test_readme_has_the_two_commands_and_ci_runs_the_second() -> None:
    commands = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    assert sum(c.startswith("python3 -m venv") and "quickstart.py" in c for c in commands) == 1
    tests = [c for c in commands if c.startswith("python3 -m venv") and "-m pytest -n 2 " in c]
    assert len(tests) == 1
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    line = subprocess.run(
        ["bash", "-c", re.findall(r"tests=\$\((.*)\)", script)[0]],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.strip()
    assert line == tests[0]


WORDS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]
WORDS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def dead(name: str, text: str) -> list[str]:
    """The links of a page that lead to no file of the repository, or to no heading of one."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):  # a place on the web: sphinx-build -b linkcheck asks these
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        made = "auto_gallery" in path or "auto_gallery" in name  # by the build, which checks it
        if not made and (not target.exists() or (anchor and anchor not in anchors(target))):
            found.append(link)
    return found


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub and myst make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", WORDS)
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    assert dead(name, (ROOT / name).read_text()) == []


def test_the_test_of_links_can_fail() -> None:
    text = "[a](docs/nowhere.md) [b](docs/results.md#nowhere) [c](docs/results.md#commands)"
    assert dead("README.md", text) == ["docs/nowhere.md", "docs/results.md#nowhere"]
