"""The settings of the documentation's site, read without building it."""

import ast
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT

CONF = ast.parse((ROOT / "docs" / "conf.py").read_text())


def setting(name: str) -> Any:
    """The value of a setting in `docs/conf.py`, which must be a literal."""
    (value,) = [
        node.value
        for node in CONF.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    return ast.literal_eval(value)


def link_colab(repository: str, page: str) -> str:
    """What the site appends to a page."""
    names: dict[str, Any] = {"repository": repository, "Sphinx": None}
    functions: list[ast.stmt] = [
        node
        for node in CONF.body
        if isinstance(node, ast.FunctionDef) and node.name == "link_colab"
    ]
    exec(compile(ast.Module(functions, []), "conf.py", "exec"), names)
    source = ["text"]
    names["link_colab"](None, page, source)
    return source[0].removeprefix("text")


def test_code_has_a_button_that_copies_it_without_prompts_and_output() -> None:
    assert "sphinx_copybutton" in setting("extensions")
    assert {".gp", ".go"} <= set(setting("copybutton_exclude").split(", "))


def test_the_icon_and_the_styles_are_there() -> None:
    docs = ROOT / "docs"
    icon = docs / setting("html_favicon")
    assert ElementTree.parse(icon).getroot().tag.endswith("svg")
    files = [docs / name for name in setting("html_static_path")]
    assert all(file.is_file() for file in files)
    assert {Path(file).name for file in files} >= set(setting("html_css_files"))


@pytest.mark.parametrize("name", ["plot_pruning", "plot_coresets"])
def test_an_example_of_the_gallery_links_to_its_notebook_on_github(name: str) -> None:
    found = link_colab("https://github.com/owner/drophot", f"auto_gallery/{name}")
    address = "https://colab.research.google.com/github/owner/drophot/blob/notebooks"
    assert f"<{address}/{name}.ipynb>`__" in found
    assert (ROOT / "docs" / "gallery" / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("repository", "page"),
    [
        ("", "auto_gallery/plot_pruning"),  # not hosted yet
        ("https://gitlab.com/owner/drophot", "auto_gallery/plot_pruning"),
        ("https://github.com/owner/drophot", "auto_gallery/index"),
        ("https://github.com/owner/drophot", "pruning"),
    ],
)
def test_other_pages_have_no_link_to_colab(repository: str, page: str) -> None:
    assert link_colab(repository, page) == ""
