"""Formulas as MathML, made when the pages are built: they need neither a script nor a network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ACCENTED = re.compile(r"\\(?:bar|dot|hat|tilde|vec)\s*(?:\{[^{}]*\}|\\[A-Za-z]+|\w)(?=\s*[_^])")


def mathml(tex: str, **options: bool) -> str:
    """`tex` as MathML. docutils puts the index of an accented letter under it, unless the index
    hangs on an empty group behind the letter.
    """
    markup: str = tex2mathml(ACCENTED.sub(r"\g<0>{}", tex), **options)
    return markup


def visit_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def visit_displaymath(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
