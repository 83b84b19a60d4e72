"""The release: the two archives and their metadata, the changelog, the pages of the API."""

import ast
import json
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, run

import drophot

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SDIST = [
    name.strip("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
]
ALWAYS = {"pyproject.toml", ".gitignore"}  # what hatchling adds of its own accord

# What else lies in a checkout that has been worked in, and belongs in no archive.
LITTER = [
    "src/drophot/__pycache__/prune.cpython-311.pyc",
    "src/drophot.egg-info/PKG-INFO",
    "tests/.hypothesis/examples/0a",
    "tests/.pytest_cache/CACHEDIR.TAG",
    "docs/_build/html/index.html",
    "docs/auto_gallery/plot_pruning.codeobj.json",
    "build/lib/drophot/prune.py",
    "dist/drophot-0.0.1.tar.gz",
    "environment/lib/site-packages/numpy/tests/test_all.py",  # a name that no ignore file has
    "data/MNIST/raw/train-images-idx3-ubyte",
    "results/records.jsonl",
]


class Archives(NamedTuple):
    """What was built of a copy of the checkout, and what is in it."""

    wheel: Path
    in_wheel: set[str]
    sdist: Path
    in_sdist: set[str]
    metadata: Message


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    tree = tmp_path_factory.mktemp("tree")
    for name in {*SDIST, *ALWAYS}:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name)
        else:
            shutil.copy(ROOT / name, tree / name)
    for name in LITTER:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    return build(tree, tree / "dist" / "new")


def build(tree: Path, into: Path) -> Archives:
    run("-m", "hatchling", "build", "-d", into, folder=tree)
    (wheel,), (sdist,) = into.glob("*.whl"), into.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        in_wheel = set(file.namelist())
        (name,) = (name for name in in_wheel if name.endswith("METADATA"))
        metadata = message_from_string(file.read(name).decode())
    with tarfile.open(sdist) as file:
        in_sdist = {member.name.partition("/")[2] for member in file if member.isfile()}
    return Archives(wheel, in_wheel, sdist, in_sdist, metadata)


def sources() -> set[str]:
    folder = ROOT / "src"
    files = [*folder.rglob("drophot/**/*.py"), folder / "drophot" / "py.typed"]
    return {path.relative_to(folder).as_posix() for path in files}


def test_the_wheel_holds_the_package_and_its_metadata_and_nothing_else(archives: Archives) -> None:
    about = f"drophot-{drophot.__version__}.dist-info"
    assert archives.wheel.name == f"drophot-{drophot.__version__}-py3-none-any.whl"
    parts = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    assert archives.in_wheel == {*sources(), *(f"{about}/{name}" for name in parts)}
    with zipfile.ZipFile(archives.wheel) as file:
        commands = file.read(f"{about}/entry_points.txt").decode()
        assert commands.split() == ["[console_scripts]", "drophot", "=", "drophot.__main__:main"]
        assert file.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


# By the longest folder that a file is in: the kinds of files that belong there.
KINDS = {
    "": {".md", ".toml"},
    ".github": {".md", ".yml"},
    ".ci": {""},
    "benchmarks": {".py", ".md"},
    "benchmarks/results": {".csv", ".json", ".jsonl"},
    "docs": {".md", ".rst", ".py", ".toml", ".css", ".svg", ".png"},
    "examples": {".py"},
    "recipe": {".yaml"},
    "src": {".py", ".typed"},
    "tests": {".py"},
}
NESTED = (".github", "docs", "src", "tests")  # with folders of their own
NAMED = {"LICENSE", "PKG-INFO", ".gitignore", ".readthedocs.yaml", "CITATION.cff", "hatch_build.py"}


def astray(names: set[str]) -> list[str]:
    """The files of a source archive that are of no kind that belongs where they are."""
    found = []
    for name in sorted(names - NAMED):
        folder = Path(name).parent
        if folder.parts and folder.parts[0] in NESTED:
            folder = Path(folder.parts[0])
        kinds = KINDS.get("" if folder == Path() else folder.as_posix(), set())
        hidden = any(part.startswith((".", "_build", "__py")) for part in Path(name).parts[1:])
        if Path(name).suffix not in kinds or hidden:
            found.append(name)
    return found


def test_the_sdist_holds_what_belongs_in_it_and_nothing_else(archives: Archives) -> None:
    assert archives.sdist.name == f"drophot-{drophot.__version__}.tar.gz"
    assert astray(archives.in_sdist) == []
    assert archives.in_sdist.isdisjoint(LITTER)
    assert archives.in_sdist >= {f"src/{name}" for name in sources()}
    assert archives.in_sdist >= {*ALWAYS, "LICENSE", "PKG-INFO", "tests/conftest.py"}
    assert archives.in_sdist >= {"docs/conf.py", ".ci/run"}, "the docs and test_package need them"


def test_the_test_of_the_sdist_can_fail() -> None:
    for name in (
        *LITTER,
        "benchmarks/store/records.jsonl",
        "examples/data/MNIST/raw/t10k",
        "a.out",
    ):
        assert astray({name}) == [name]


def test_the_sdist_holds_everything_that_git_tracks(archives: Archives) -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    tracked = {name for name in output.split("\0") if name and (ROOT / name).exists()}
    assert archives.in_sdist >= tracked


def test_the_sdist_builds_the_same_wheel(archives: Archives, tmp_path: Path) -> None:
    with tarfile.open(archives.sdist) as file:
        file.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    again = build(tree, tmp_path / "dist")
    assert again.wheel.read_bytes() == archives.wheel.read_bytes()
    assert again.in_sdist == archives.in_sdist


LINK = re.compile(r"(?<=\])\(([^)\s]+)\)")
REPOSITORY = "https://example.org/somebody/drophot"


def described(tree: Path, version: str, repository: str) -> dict[str, Any]:
    """The metadata of a version whose repository has this address."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    for name in ("README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(ROOT / name, tree / name)
    project = (ROOT / "pyproject.toml").read_text()
    project, count = re.subn(
        r'^repository = ".*?"', f'repository = "{repository}"', project, flags=re.M
    )
    assert count == 1, "the address is in one place"
    (tree / "pyproject.toml").write_text(project)
    package = tree / "src" / "drophot" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text(f'__version__ = "{version}"\n')
    return json.loads(run("-m", "hatchling", "metadata", folder=tree))


def test_all_links_of_a_release_lead_to_the_repository(tmp_path: Path) -> None:
    about = described(tmp_path, "3.2.1", REPOSITORY)
    assert about["urls"]["Repository"] == REPOSITORY
    links = LINK.findall(about["readme"]["text"])
    assert [link for link in links if not link.startswith("https://")] == []
    assert f"{REPOSITORY}/raw/v3.2.1/docs/_static/little_data.svg" in links, "an image"
    assert f"{REPOSITORY}/blob/v3.2.1/docs/choosing.md" in links
    assert len(links) == len(LINK.findall((ROOT / "README.md").read_text()))


def test_a_release_does_not_build_before_the_repository_has_an_address(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"3\.2\.1.*`repository`"):
        described(tmp_path, "3.2.1", "")


def test_the_recipe_needs_what_the_package_needs() -> None:
    recipe = (ROOT / "recipe" / "recipe.yaml").read_text()
    assert f'version: "{re.sub("[.]dev.*", "", drophot.__version__)}"' in recipe
    assert f'python_min: "{PROJECT["project"]["requires-python"].removeprefix(">=")}"' in recipe
    (needs,) = re.findall(r"^  run:\n((?:    - .*\n)+)", recipe, re.M)
    found = [line.strip(" -").replace(" ", "") for line in needs.splitlines()]
    names = [
        re.sub(r"^torch(?=\W)", "pytorch", need) for need in PROJECT["project"]["dependencies"]
    ]
    assert found == ["python>=${{python_min}}", *names]


def test_the_metadata(archives: Archives) -> None:
    about = archives.metadata
    assert about["Name"] == "drophot"
    assert about["Version"] == drophot.__version__
    assert about["License-Expression"] == "MIT"
    assert about["License-File"] == "LICENSE"
    assert about["Requires-Python"] == ">=3.11"
    assert about["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text()
    assert LINK.sub("", about.get_payload()) == LINK.sub("", readme)
    assert {"Typing :: Typed", "Programming Language :: Python :: 3"} <= set(
        about.get_all("Classifier", [])
    )
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert set(about.get_all("Provides-Extra", [])) == extras
    needs = about.get_all("Requires-Dist", [])
    assert {re.split(r"\W", line)[0] for line in needs if "extra" not in line} == {"torch", "numpy"}
    lower_bound = re.compile(r"[\w-]+(\[\w+\])?>=[\d.]+(; extra == '\w+')?")
    assert [line for line in needs if not lower_bound.fullmatch(line)] == []


SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def faults(changelog: str, version: str) -> list[str]:
    """Where a changelog is not as keepachangelog.com/en/1.1.0 has it."""
    found: list[str] = []
    releases: list[tuple[int, ...]] = []
    sections: list[str] = []
    title, *rest = re.split(r"^(?=## )", changelog, flags=re.M)
    if not title.startswith("# Changelog\n") or re.search("^##", title, re.M):
        found.append("it should begin with its title")
    for part in rest:
        heading, *sections = re.split(r"^### ", part, flags=re.M)
        head = re.fullmatch(
            r"## \[(\d+)\.(\d+)\.(\d+)\] [-–] (unreleased|\d{4}-\d\d-\d\d)", heading.strip()
        )
        if head is None:
            found.append(f"not a version and its date alone: {heading.strip()}")
            continue
        releases.append(tuple(int(number) for number in head.groups()[:3]))
        developed = len(releases) == 1 and ".dev" in version
        if developed != (head[4] == "unreleased"):
            found.append(f"its date: {heading.strip()}")
        names = [section.partition("\n")[0] for section in sections]
        found += [f"no such section: {name}" for name in names if name not in SECTIONS]
        found += [f"twice in one version: {name}" for name in {*names} if names.count(name) > 1]
        found += [
            f"no points: {s}" for s in sections if not s.partition("\n")[2].startswith("\n- ")
        ]
        if not sections:
            found.append(f"nothing under {heading.strip()}")
    if any(newer <= older for newer, older in pairwise(releases)):
        found.append("the newest version should come first")
    now = tuple(int(number) for number in re.sub(r"\.dev\d*$", "", version).split("."))
    if releases[:1] != [now]:
        found.append(f"{version} should be the first")
    return found


def test_the_changelog_is_one_that_people_can_read() -> None:
    assert faults((ROOT / "CHANGELOG.md").read_text(), drophot.__version__) == []


def test_the_test_of_the_changelog_can_fail() -> None:
    top, one, two = "# Changelog\n\nWords.\n\n", "## [0.1.0] – 2020-01-31\n\n", "## [0.2.0] - "
    point = "### Fixed\n\n- A.\n\n"
    good = top + two + "2020-02-01\n\n" + point + one + point
    assert faults(good, "0.2.0") == []
    assert faults(good.replace("2020-02-01", "unreleased"), "0.2.0.dev3") == []
    assert faults(good, "0.2.0.dev0") == ["its date: ## [0.2.0] - 2020-02-01"]
    assert faults(good, "0.3.0") == ["0.3.0 should be the first"]
    assert faults(good.replace("Fixed", "Mended", 1), "0.2.0") == ["no such section: Mended"]
    assert faults(good.replace("- A.", "A.", 1), "0.2.0") == ["no points: Fixed\n\nA.\n\n"]
    assert faults(good + point, "0.2.0") == ["twice in one version: Fixed"]
    assert faults(top + one, "0.1.0") == ["nothing under ## [0.1.0] – 2020-01-31"]
    assert faults(good.replace(top, ""), "0.2.0")[0] == "it should begin with its title"
    swapped = top + one + point + two + "2020-02-01\n\n" + point
    assert "the newest version should come first" in faults(swapped, "0.1.0")
    assert faults(good.replace("2020-01-31", "soon"), "0.2.0") == [
        "not a version and its date alone: ## [0.1.0] – soon"
    ]


API = sorted(path.stem for path in (ROOT / "docs" / "api").glob("*.md") if path.stem != "index")


def documented(page: str) -> Iterator[tuple[str, object]]:
    """The names on a page of the API, and the objects that they stand for."""
    directive = re.compile(r"^\.\. (auto\w+):: (\S+)((?:\n {3}.*)*)", re.M)
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    for kind, target, options in directive.findall(text):
        if kind != "automodule":
            module, _, name = target.rpartition(".")
            yield target, getattr(import_module(module), name)
            continue
        module = import_module(target)
        members = re.search(r":members:([^:]*)", options)
        names = set(re.findall(r"\w+", members[1])) if members else set()
        if not names:
            defined = {n for n, v in vars(module).items() if getattr(v, "__module__", "") == target}
            names = set(getattr(module, "__all__", defined))
        yield target, module
        if ":no-members:" in options:
            continue
        for name in sorted(names):
            if not name.startswith("_"):
                yield f"{target}.{name}", getattr(module, name)


def test_every_package_has_a_page_of_the_api() -> None:
    order = (ROOT / "docs" / "api" / "index.md").read_text()
    assert sorted(re.findall(r"^(\w+)$", order, re.M)) == API
    packages = {path.parent.name for path in (ROOT / "src" / "drophot").glob("[!_]*/__init__.py")}
    assert packages <= set(API)


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    things = [thing for page in API if page != "integrations" for _, thing in documented(page)]
    lazy = {*API, "forgetting"}  # packages and modules, which the test above is about
    public = [name for name in drophot.__all__ if name not in lazy]
    missing = [name for name in public if not any(getattr(drophot, name) is t for t in things)]
    assert missing == []


def test_every_class_and_function_of_the_api_has_a_line_in_the_index() -> None:
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    listed = re.findall(r"^ {3}([\w.]+)$", index, re.M)
    assert len(listed) == len(set(listed))
    things = {name: thing for page in API for name, thing in documented(page)}
    expected = {
        name.removeprefix("drophot.")
        for name, thing in things.items()
        if isinstance(thing, type | FunctionType)
    }
    assert set(listed) == expected


def test_every_name_of_a_package_is_on_its_page() -> None:
    for page in API:
        module = import_module(f"drophot.{page}")
        found = {name.rpartition(".")[2] for name, _ in documented(page)}
        assert found >= set(getattr(module, "__all__", ())), page


def test_names_of_the_top_are_documented_as_such() -> None:
    names = {name for page in API for name, _ in documented(page)}
    lazy = {*API, "forgetting"}
    assert names >= {f"drophot.{name}" for name in drophot.__all__ if name not in lazy}


# The packages of modules with another name, and those that bring a module with them.
PACKAGE_OF = {"sklearn": "scikit-learn", "PIL": "matplotlib", "onnx": "onnxscript"}
PACKAGE_OF |= {"safetensors": "transformers", "triton": "torch"}


def skipped_without() -> set[str]:
    """The packages without which a test is skipped."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(ast.Attribute(attr="importorskip"), [ast.Constant(str(name)), *_]):
                    module = name.partition(".")[0]
                    found.add(PACKAGE_OF.get(module, module).replace("_", "-"))
    return found


def test_the_script_for_versions_installs_what_tests_are_skipped_without() -> None:
    project = PROJECT["project"]
    lists = (project["dependencies"], *project["optional-dependencies"].values())
    known = {re.split(r"[>\[]", line)[0] for lines in lists for line in lines}
    script = (ROOT / ".ci" / "versions").read_text()
    (peers,) = re.findall(r"^peers=\((.*)\)$", script, re.M)
    others = {*peers.split(), "ray"}  # a test names torchao by a variable
    assert skipped_without() - known == others - {"torchao"}
    assert not others & known


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("kind", "reason", "is_excused"),
    [
        ("newest", "could not import 'ray': No module named 'ray'", True),
        ("newest", "traintools is not installed", False),
        ("lowest", "traintools is not installed", True),
        ("lowest", "could not import 'pytorch_optimizer': No module", True),
        ("lowest", "PEFT is not installed", True),
        ("lowest", "pandas is not installed", False),
        ("none", "pandas is not installed", True),
    ],
)
def test_the_script_for_versions_excuses_only_what_it_does_not_install(
    kind: str, reason: str, is_excused: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text(f"SKIPPED [1] tests/test_a.py:81: {reason}\n")
    script = (ROOT / ".ci" / "versions").read_text()
    (names,) = re.findall(r"^peers=.*\nany_peer=.*$", script, re.M)
    (check,) = re.findall(r"^ +excused=.*?; then$", script, re.M | re.S)
    text = f"{names}\nkind={kind} log={log}\n{check} echo skipped; fi"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert (done.stdout == "") == is_excused
