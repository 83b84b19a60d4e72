"""The names under which the API is documented: those that users import."""

import re

from docutils.nodes import Node
from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry
from sphinx.domains.python._object import PyXrefMixin
from sphinx.environment import BuildEnvironment

import drophot

LITERAL = re.compile(r"((?:~?typing\.)?Literal\[[^\]]*\])")
make_xrefs = PyXrefMixin.make_xrefs


def add_package_names(app: Sphinx, env: BuildEnvironment) -> None:
    """`drophot.select` is also found as `drophot.coreset.select`."""
    objects = env.domains.python_domain.objects
    for name in drophot.__all__:
        entry = objects.get(f"drophot.{name}")
        if entry is not None and entry.docname.startswith("api/"):
            package = entry.docname.removeprefix("api/")
            alias = ObjectEntry(entry.docname, entry.node_id, entry.objtype, aliased=True)
            objects.setdefault(f"drophot.{package}.{name}", alias)


def keep_colons(
    app: Sphinx, kind: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Keep napoleon from reading the words before the first colon of an attribute as its type."""
    if kind in {"attribute", "data", "property"}:
        lines.insert(0, "\\")  # which escapes the line break, and renders as nothing


def make_xrefs_after_literal(
    mixin: PyXrefMixin, role: str, domain: str, target: str, *args: object, **options: object
) -> list[Node]:
    """Link the types that follow a Literal, too, which Sphinx takes for parts of it."""
    parts = [part for part in LITERAL.split(target) if part]
    return [
        node for part in parts for node in make_xrefs(mixin, role, domain, part, *args, **options)
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    PyXrefMixin.make_xrefs = make_xrefs_after_literal
    app.connect("env-updated", add_package_names)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon has 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
