"""The names under which the API is documented: those that users import."""

from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry
from sphinx.environment import BuildEnvironment

import drophot


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


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-updated", add_package_names)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon has 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
