"""Links from types in signatures to the pages that document them, without a network.

Sphinx names a type by the module that defines it, such as ``torch.nn.modules.module.Module``, or as
it was written. `PUBLIC` maps these to the names that users import, and `PAGES` maps the names of
other projects to their pages. A new type from another project needs a line in `PAGES`:
``sphinx-build -n -W`` fails without it.
"""

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

PUBLIC = {
    "Axes": "matplotlib.axes.Axes",
    "Figure": "matplotlib.figure.Figure",
    "SubFigure": "matplotlib.figure.SubFigure",
    "Dataset": "torch.utils.data.Dataset",
    "ProcessGroup": "torch.distributed.ProcessGroup",
    "Named": "drophot.settings.Named",
    "Tensor": "torch.Tensor",
    "TrackerMixin": "drophot.integrations.transformers.TrackerMixin",
    "concurrent.futures.process.ProcessPoolExecutor": "concurrent.futures.ProcessPoolExecutor",
    "lightning.pytorch.callbacks.callback.Callback": "lightning.pytorch.callbacks.Callback",
    "nn.Module": "torch.nn.Module",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
    "torch.utils.data.dataset.Dataset": "torch.utils.data.Dataset",
    "torch.utils.data.sampler.Sampler": "torch.utils.data.Sampler",
    "transformers.trainer.Trainer": "transformers.Trainer",
}

PYTHON = "https://docs.python.org/3/library"
TORCH = "https://docs.pytorch.org/docs/stable"
NUMPY = "https://numpy.org/doc/stable/reference"
TRAINER = "https://huggingface.co/docs/transformers/main_classes/trainer"
CALLBACK = "https://lightning.ai/docs/pytorch/stable/api/lightning.pytorch.callbacks.Callback.html"
AXES = "https://matplotlib.org/stable/api/_as_gen/matplotlib.axes.Axes.html"
FIGURE = "https://matplotlib.org/stable/api/figure_api.html"

PAGES = {
    "lightning.pytorch.callbacks.Callback": CALLBACK,
    "matplotlib.axes.Axes": AXES,
    "matplotlib.figure.Figure": FIGURE,
    "matplotlib.figure.SubFigure": FIGURE,
    "transformers.Trainer": f"{TRAINER}#transformers.Trainer",
    "torch.distributed.ProcessGroup": f"{TORCH}/distributed.html",  # has no separate entry
}
for names, page in {
    "bool float int object": f"{PYTHON}/functions.html",
    "bytes dict frozenset list range set slice str tuple": f"{PYTHON}/stdtypes.html",
    "FileNotFoundError ImportError IndexError KeyError MemoryError NotImplementedError OSError "
    "OverflowError RuntimeError TypeError UserWarning ValueError": f"{PYTHON}/exceptions.html",
    "None": f"{PYTHON}/constants.html",
    "pathlib.Path": f"{PYTHON}/pathlib.html",
    "typing.Any typing.Literal typing.Protocol": f"{PYTHON}/typing.html",
    "concurrent.futures.ProcessPoolExecutor": f"{PYTHON}/concurrent.futures.html",
    "torch.device torch.dtype": f"{TORCH}/tensor_attributes.html",
    "torch.Tensor": f"{TORCH}/tensors.html",
    "torch.optim.Optimizer": f"{TORCH}/optim.html",
    "torch.utils.data.DataLoader torch.utils.data.Dataset torch.utils.data.Sampler": (
        f"{TORCH}/data.html"
    ),
    "numpy.typing.ArrayLike": f"{NUMPY}/typing.html",
}.items():
    PAGES |= {name: f"{page}#{name}" for name in names.split()}
for name in ("Callable", "Collection", "Generator", "Iterable", "Iterator", "Mapping", "Sequence"):
    name = f"collections.abc.{name}"
    PAGES[name] = f"{PYTHON}/collections.abc.html#{name}"
for name in ("torch.Generator", "torch.nn.Module", "torch.optim.lr_scheduler.LRScheduler"):
    PAGES[name] = f"{TORCH}/generated/{name}.html#{name}"
for name in ("numpy.dtype", "numpy.ndarray"):
    PAGES[name] = f"{NUMPY}/generated/{name}.html#{name}"
for name in ("numpy.float64", "numpy.int64"):
    PAGES[name] = f"{NUMPY}/arrays.scalars.html#{name}"


def link(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Link a name that Sphinx has not found."""
    name = node.get("reftarget", "")
    name = PUBLIC.get(name, name)
    if node.get("refdomain") != "py":
        return None
    entry = env.domains.python_domain.objects.get(name)
    if entry is not None:
        source = node.get("refdoc", env.docname)
        return make_refnode(app.builder, source, entry.docname, entry.node_id, [content], name)
    if name not in PAGES:
        return None
    return nodes.reference("", "", content, internal=False, refuri=PAGES[name], reftitle=name)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
