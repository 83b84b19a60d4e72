import logging
import os
import sys
import tomllib
from pathlib import Path

import numpy.typing
import torch
from sphinx.application import Sphinx
from sphinx_gallery.sorting import ExplicitOrder

# A union of private names, replaced before drophot is imported so that signatures say ArrayLike.
numpy.typing.ArrayLike = type("ArrayLike", (), {"__module__": "numpy.typing"})

import drophot  # noqa: E402

DOCS = Path(__file__).parent
sys.path.append(str(DOCS / "_ext"))
hatch = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["tool"]["hatch"]
addresses = hatch["metadata"]["hooks"]["custom"]
repository = addresses["repository"]  # "" leads to a site without links to it

project = "drophot"
copyright = "2026, the drophot developers"
version = release = drophot.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxext.opengraph",
    "mathml",
    "public_names",
    "type_links",
]
html_theme = "furo"
html_title = "drophot"
html_static_path = ["_static/site.css"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", addresses["documentation"])
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
if repository:
    html_theme_options = {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
    }
ogp_site_name = "drophot"
ogp_site_url = html_baseurl
ogp_social_cards = {"enable": False}
copybutton_exclude = ".linenos, .gp, .go"  # the prompts and the output of a session
exclude_patterns = ["_build", "gallery"]
myst_enable_extensions = ["dollarmath", "colon_fence", "substitution"]
myst_substitutions = {
    "code": f"The code is at <{repository}>."
    if repository
    else "The entries of the [API](api/index.md) link to their code."
}
myst_heading_anchors = 3

default_role = "literal"  # docstrings write code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
suppress_warnings = ["ref.python"]  # `bytes` is a type and a field of several results
# What has no page: aliases, which the description of the argument explains, and parts of results.
nitpick_ignore_regex = [
    (
        "py:class",
        r"(loop\.)?(BatchLoss|Cache|Forgetting|Json|Measure|Mode|Numbers|OptimizerFactory|ProtocolName"
        r"|Ratio|RemovedChannels|RunImportance|ScheduleName|Scope)",
    ),
    ("py:class", r"drophot\.(\w+\.)+(DependencyGraph|Executor|SampleCounter)"),
    ("py:class", r"drophot\.(\w+\.)+(SelectionHook|Watched)"),
    ("py:class", r"torch\.utils\.hooks\.RemovableHandle|Trainer"),
]
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

logging.getLogger("drophot").setLevel("WARNING")  # furo's a11y-pygments turns on everybody's INFO
torch.set_num_threads(1)  # the networks are so small that threads would wait for each other
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "within_subsection_order": ExplicitOrder([
        "plot_forgetting.py",
        "plot_wrong_labels.py",
        "plot_coresets.py",
        "plot_little_data.py",
        "plot_pruning.py",
        "plot_budgets.py",
    ]),
    "abort_on_example_error": True,
    "capture_repr": (),
    "image_srcset": ["2x"],
    "download_all_examples": False,
    "first_notebook_cell": '%pip install -q "drophot[plot,stats]" scikit-learn',
    "show_signature": False,
    "min_reported_time": float("inf"),
    "write_computation_times": False,
}


def link_colab(app: Sphinx, name: str, source: list[str]) -> None:
    """Link an example of the gallery to Colab, which opens notebooks of GitHub only."""
    if name.startswith("auto_gallery/plot_") and repository.startswith("https://github.com/"):
        path = repository.removeprefix("https://github.com/")
        notebook = name.removeprefix("auto_gallery/")
        colab = f"https://colab.research.google.com/github/{path}/blob/notebooks/{notebook}.ipynb"
        source[0] += f"\n\n`Open this example in Colab <{colab}>`__\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_colab)
