"""Equations without scripts: as MathML, which browsers draw themselves.

They are written as GitHub reads them: ``$...$`` in a line, and a fenced block ``math`` with an
optional ``\\tag{3}`` for a numbered one, which gets the anchor ``eq-3``.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

_TAG = re.compile(r"\s*\\tag\{(\d+)\}")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(NumberEquations)
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class NumberEquations(SphinxTransform):
    """Turns the tags of equations into anchors that links within and between pages find."""

    default_priority = 300  # after the headings have their anchors, before links look for them

    def apply(self, **kwargs: Any) -> None:
        for node in self.document.findall(nodes.math_block):
            tag = _TAG.search(node.astext())
            if tag is None:
                continue
            text = _TAG.sub("", node.astext())
            node.children = [nodes.Text(text)]
            node["number"] = tag[1]
            # Where MyST keeps the anchors of headings: line, anchor, title.
            anchors = self.env.metadata[self.env.docname].setdefault("myst_slugs", {})
            anchors[f"eq-{tag[1]}"] = (node.line, f"eq-{tag[1]}", f"({tag[1]})")
            self.document.myst_slugs = anchors


def _visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    math = _mathml(node, "block")
    number = node["number"]
    if number is None:
        translator.body.append(f'<div class="equation">{math}</div>')
    else:
        translator.body.append(
            f'<div class="equation" id="eq-{number}">{math}<span>({number})</span></div>'
        )
    raise nodes.SkipNode


def _mathml(node: nodes.Element, display: str) -> str:
    text = node.astext()
    try:
        math = convert(text.strip(), display=display)
    except Exception as error:
        logger.warning("equation %r: %r", text, error, location=node)
        return ""
    if "<mi>&</mi>" in math or "\\" in math:
        # What the converter does not know, it passes through.
        logger.warning("equation %r was not understood", text, location=node)
    return math
