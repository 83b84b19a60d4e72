"""Public names have complete docstrings: first line, parameters, errors, fields, an example."""

import ast
import dataclasses
import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from inspect import isroutine
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from typing_extensions import is_protocol

import drophot

# Public packages and modules: each has a page of the API.
PUBLIC = sorted(path.stem for path in (ROOT / "docs" / "api").glob("*.md") if path.stem != "index")
EXTRAS = ("lightning", "transformers")

# Results, which drophot makes and users do not: their arguments and examples are those of the
# functions that return them.
RESULTS = {
    *("Change", "Comparison", "Estimate", "LayerSummary", "LeNet", "Masks", "Paired", "Plan"),
    *("ChannelPlan", "Forgotten", "OperatorCall", "Pruned", "Stability", "Summary"),
}
# Names whose docstring has no example, since it would need an extra, and a page that runs one.
SHOWN_ELSEWHERE = {
    "TrackerMixin": "docs/transformers.md",
    "TrackedTrainer": "docs/transformers.md",
    "resnet18": "examples/paper_grid.py",
    "resnet50": "examples/paper_grid.py",
}


def modules() -> Iterator[ModuleType]:
    yield drophot
    for name in PUBLIC:
        if name == "integrations":
            yield from (import_module(f"drophot.integrations.{extra}") for extra in EXTRAS)
        else:
            yield import_module(f"drophot.{name}")
        if name == "prune":
            yield import_module("drophot.prune.importances")


def names(module: ModuleType) -> list[str]:
    """A module's `__all__`; without one, what its page of the API lists, or all that it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    page = ROOT / "docs" / "api" / f"{module.__name__.split('.')[1]}.md"
    options = re.search(rf":: {module.__name__}\n +:members:(.*)", page.read_text())
    listed = re.findall(r"\w+", options[1]) if options else []
    return listed or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """The functions and classes of a module. Python keeps no docstring for a type alias."""
    found = [(f"{module.__name__}.{name}", getattr(module, name)) for name in names(module)]
    return [(name, thing) for name, thing in found if inspect.isclass(thing) or isroutine(thing)]


def section(text: str, title: str) -> str:
    """The lines of a section of a Google-style docstring."""
    found = re.search(rf"^{title}:\n((?:[ \t]+.*\n|\n)*)", text + "\n", re.M)
    return found[1] if found else ""


def undocumented(function: Any, text: str) -> list[str]:
    """The parameters that have no entry under "Args"."""
    entries = set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \(.*\))?:", section(text, "Args"), re.M))
    parameters = inspect.signature(function).parameters
    return [n for n in parameters if n not in {"self", "cls", *entries} and not n.startswith("_")]


def raised(function: Any) -> set[str]:
    """The errors that a function raises itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):  # what a dataclass makes has no source
        return set()
    found: set[str] = set()
    nodes: list[ast.AST] = list(ast.iter_child_nodes(tree.body[0]))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            error = ast.unparse(node.exc.func).rpartition(".")[2]
            found |= {error} if error[0].isupper() else set()
        nodes += ast.iter_child_nodes(node)
    return found


def refuses(function: Any) -> bool:
    """Whether a method does nothing but raise: it has no use for its arguments."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    return isinstance(definition.body[-1], ast.Raise) and len(definition.body) <= 2


def faults_of_function(function: Any, text: str) -> list[str]:
    """What the docstring of a function or a method lacks."""
    if not text.partition("\n")[0].strip():
        return ["no first line"]
    if text.startswith("Called by the tracker"):
        return []  # a hook, whose arguments the protocol `Accumulator` describes
    found = [f"`{name}` is not under Args" for name in undocumented(function, text)]
    found = [] if refuses(function) else found
    raises = section(text, "Raises")
    found += [f"{e} is not under Raises" for e in sorted(raised(function)) if e not in raises]
    result = inspect.signature(function).return_annotation
    said = section(text, "Returns") or section(text, "Yields") or "\n" not in text.strip()
    if result not in {"None", None, inspect.Signature.empty} and not said and not refuses(function):
        found.append("no Returns")
    return found


def silent_fields(thing: Any) -> list[str]:
    """The fields of a dataclass that neither its docstring names nor a string below describes."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(body, ast.ClassDef)
    described = {
        field.target.id
        for field, below in pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
    text = inspect.getdoc(thing) or ""
    described |= {*re.findall(r"^ {4}(\w+): ", text, re.M), *re.findall(r"`(\w+)`", text)}
    if thing.__name__ == "Comparison":  # its other fields are a record's
        described |= {field.name for field in dataclasses.fields(drophot.Record)}
    fields = [field.name for field in dataclasses.fields(thing)]
    own = {name for name in fields if name in thing.__annotations__ and not name.startswith("_")}
    return sorted(own - described)


def ours(thing: type) -> list[type]:
    """A class and those of its bases that are drophot's, or a test's."""
    return [base for base in thing.__mro__ if base.__module__.startswith(("drophot", __name__))]


def faults_of_class(thing: Any, text: str) -> list[str]:
    """What the docstrings of a class and of its public methods lack."""
    if not text.partition("\n")[0].strip():
        return ["no first line"]
    every = "\n\n".join(inspect.cleandoc(base.__doc__ or "") for base in ours(thing))
    found: list[str] = []
    if dataclasses.is_dataclass(thing):
        found += [f"field `{name}` is not described" for name in silent_fields(thing)]
    elif not is_protocol(thing) and thing.__name__ not in RESULTS:
        found += [f"`{name}` is not under Args" for name in undocumented(thing, every)]
    for method in ("__init__", "__post_init__"):
        own = vars(thing).get(method)
        errors = sorted(raised(own)) if own is not None and not is_protocol(thing) else []
        found += [f"{e} is not under Raises" for e in errors if e not in section(every, "Raises")]
    theirs = [base for base in thing.__mro__ if base not in ours(thing)]
    for name, value in vars(thing).items():
        method = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        if re.search(rf"^ {{4}}{name}:", section(text, "Attributes"), re.M):
            continue
        said = inspect.getdoc(getattr(thing, name)) or ""
        lacks = faults_of_function(method, said)
        if any(hasattr(base, name) for base in theirs) or thing.__name__ == "TrackerMixin":
            lacks = (
                [] if said else ["no first line"]
            )  # its arguments are those of what it overrides
        elif isinstance(value, property):
            lacks = [fault for fault in lacks if fault != "no Returns"]
        found += [f"{name}: {fault}" for fault in lacks]
    return found


def example(text: str, *, with_result: bool = False) -> str:
    """The source of the examples of a docstring, if they run."""
    examples = doctest.DocTestParser().get_examples(text)
    shown = any(e.want or e.source.startswith("assert ") for e in examples)
    skipped = any(doctest.SKIP in e.options for e in examples)
    return "" if skipped or (with_result and not shown) else "".join(e.source for e in examples)


def has_example(thing: Any, module: ModuleType) -> bool:
    """Whether a name is shown in its docstring, or in that of its package or of another name.

    The example of a name of `drophot` itself is its own and shows a result.
    """
    text = inspect.cleandoc(thing.__doc__ or "")
    if module is drophot:
        return bool(example(text, with_result=True))
    if example(text):
        return True
    texts = [module.__doc__ or "", *(other.__doc__ or "" for _, other in public(module))]
    used = "".join(example(inspect.cleandoc(text)) for text in texts)
    return re.search(rf"\b{thing.__name__}\(", used) is not None


def faults(thing: Any, module: ModuleType = drophot) -> list[str]:
    """What the documentation of a public function or class lacks."""
    text = inspect.cleandoc(thing.__doc__ or "")
    is_class = inspect.isclass(thing)
    found = faults_of_class(thing, text) if is_class else faults_of_function(thing, text)
    without = thing.__name__ in {*RESULTS, *SHOWN_ELSEWHERE} or (is_class and is_protocol(thing))
    if not without and not has_example(thing, module):
        found.append("no example")
    return found


@pytest.mark.parametrize("module", ["", *PUBLIC])
def test_public_names_have_complete_docstrings(module: str) -> None:
    if module == "integrations":
        for extra in EXTRAS:
            pytest.importorskip(extra, reason=f"`{extra}` is not installed")
    checked = [m for m in modules() if m.__name__.partition(".")[2].partition(".")[0] == module]
    found = {}
    for one in checked:
        assert one.__doc__, one.__name__
        for name, thing in public(one):
            if lacks := faults(thing, one):
                found[name] = lacks
    assert found == {}


def test_the_exceptions_are_public_names_and_shown_where_they_say() -> None:
    for extra in EXTRAS:
        pytest.importorskip(extra, reason=f"`{extra}` is not installed")
    everything = {name.rpartition(".")[2] for one in modules() for name, _ in public(one)}
    assert everything >= {*RESULTS, *SHOWN_ELSEWHERE}
    for name, page in SHOWN_ELSEWHERE.items():
        assert re.search(rf"\b{name}\b", (ROOT / page).read_text()), name


def test_the_test_of_the_docstrings_can_fail() -> None:
    def nothing(ratio: float) -> float: ...

    def half(ratio: float, seed: int) -> float:
        """Keep a share.

        Args:
            ratio: The share.

        Example:
            >>> half(1, 2)
        """
        if ratio > 1:
            raise ValueError(ratio)
        return ratio

    class Loader:
        """A loader.

        Args:
            size: The number of samples.

        Example:
            >>> Loader(3).size
            3
        """

        def __init__(self, size: int, seed: int) -> None:
            if size < 0:
                raise ValueError(size)

        def reset(self, seed: int) -> None:
            """Start again."""

        def close(self) -> None: ...

    assert faults(nothing) == ["no first line", "no example"]
    assert faults(half) == [
        "`seed` is not under Args",
        "ValueError is not under Raises",
        "no Returns",
        "no example",
    ]
    assert faults(Loader) == [
        "`seed` is not under Args",
        "ValueError is not under Raises",
        "reset: `seed` is not under Args",
        "close: no first line",
    ]


def test_the_test_of_the_fields_can_fail() -> None:
    @dataclasses.dataclass
    class Result:
        """Something.

        Args:
            said: In the docstring.
        """

        said: int
        below: int
        """Below it."""
        silent: int

    assert silent_fields(Result) == ["silent"]
