"""The mask and score functions for FlexAttention, found by their modules' names."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from attnspec.reference import Mechanism
from pages import rest
from pages.order import chapters

ROOT = Path(__file__).parent.parent.parent
SUFFIX = "_flex"


def source(mechanism: Mechanism) -> Path:
    return ROOT / "fast" / mechanism.family / f"{mechanism.slug}{SUFFIX}.py"


def functions(mechanism: Mechanism) -> list[str]:
    """The names of a mechanism's mask and score functions, in the order of their source."""
    path = source(mechanism)
    if not path.exists():
        return []
    body = ast.parse(path.read_text()).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if not name.startswith("_")]


def section(mechanism: Mechanism) -> list[str]:
    """What a chapter's page says of them."""
    names = functions(mechanism)
    if not names:
        return []
    module = f"attnspec.fast.{mechanism.family}.{mechanism.slug}{SUFFIX}"
    importlib.import_module(module)
    return [
        rest.heading("In FlexAttention", rest.SUBSECTION),
        rest.directive("automodule", module),
        *(rest.directive("autofunction", f"{module}.{name}") for name in names),
    ]


def listing() -> str:
    """A row for each mechanism that has some."""
    rows = []
    for mechanism in chapters():
        names = functions(mechanism)
        if names:
            text = ast.get_docstring(ast.parse(source(mechanism).read_text())) or ""
            kinds = [[n for n in names if n.endswith(end)] for end in ("mask_mod", "score_mod")]
            rows.append(
                [
                    f":ref:`{mechanism.title} <chapter-{mechanism.slug}>`",
                    rest.code(f"fast.{mechanism.slug}{SUFFIX}"),
                    *map(rest.codes, kinds),
                    rest.escape(" ".join(text.partition("\n\n")[0].split())),
                ]
            )
    header = ("Chapter", "Module", "Who sees whom", "Scores", "What they are")
    return rest.page(
        rest.heading("In FlexAttention", rest.TITLE),
        "Who sees whom, wherever that is settled before the attention begins, and the scores that "
        "a pair alone decides, as functions for ``torch.nn.attention.flex_attention``; the tests "
        "compare each with the reference. :doc:`../guides/production` shows how they are used, and "
        "what cannot be one. A chapter without a mask of its own has that of dense attention.",
        rest.table(header, rows),
    )
