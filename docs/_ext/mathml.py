"""Formulas as MathML, which browsers render without a script or a download."""

import re

from docutils.nodes import SkipNode, math, math_block
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

logger = getLogger(__name__)


def visit_inline(translator: HTML5Translator, node: math) -> None:
    translator.body.append(convert(node))
    raise SkipNode


def visit_block(translator: HTML5Translator, node: math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(convert(node, as_block=True))
    translator.body.append("</div>\n")
    raise SkipNode


def convert(node: math | math_block, as_block: bool = False) -> str:
    formula = re.sub(r"\\dots\b", r"\\ldots", node.astext())
    if r"\begin{" not in formula and ("\\\\" in formula or "&" in formula):  # as MathJax has it
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    try:
        return tex2mathml(formula, as_block=as_block)
    except MathError as error:
        logger.warning("cannot convert the formula %s: %s", formula, error, location=node)
        return ""


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
