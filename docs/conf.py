import logging

import torch
from sphinx_gallery.sorting import ExplicitOrder

import drophot

project = "drophot"
copyright = "2026, the drophot developers"
version = release = drophot.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = "drophot"
html_static_path = ["_static/site.css"]
html_css_files = ["site.css"]
exclude_patterns = ["_build", "gallery"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
suppress_warnings = ["ref.python"]  # `bytes` is a type and a field of several results
autodoc_default_options = {"members": True, "show-inheritance": False}
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
    "notebook_extensions": set(),
    "show_signature": False,
    "min_reported_time": float("inf"),
    "write_computation_times": False,
}
