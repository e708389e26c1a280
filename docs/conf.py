"""Sphinx configuration; the chapters' pages are written by `generate` before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import generate
from docutils import nodes
from pages import docstrings

import attnspec

project = "attnspec"
author = "the attnspec authors"
version = release = attnspec.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinxcontrib.bibtex",
    "sphinx_copybutton",
    "sphinx_design",
    "pages.mathml",
]
exclude_patterns = ["_build", "pages", "pictures"]
nitpicky = True
default_role = "py:obj"
html_math_renderer = "mathml"
pygments_style = "friendly"
pygments_dark_style = "github-dark"

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 72
toc_object_entries = False
add_module_names = False
viewcode_line_numbers = True

bibtex_bibfiles = ["chapters/references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "attnspec"
html_static_path = ["_static"]
html_css_files = ["attnspec.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b57a4",
        "color-brand-content": "#0b57a4",
        "color-brand-visited": "#0b57a4",
    },
    "dark_css_variables": {
        "color-brand-primary": "#79b8ff",
        "color-brand-content": "#79b8ff",
        "color-brand-visited": "#79b8ff",
    },
}


def resolve(app: Any, env: Any, node: Any, content: nodes.TextElement) -> nodes.Node | None:
    """A name in single backticks links to the module it abbreviates, or is plain code.

    Types of other libraries are plain code too, since their pages are not at hand offline.
    """
    kind, target = node.get("reftype"), node.get("reftarget", "")
    if node.get("refdomain") != "py" or kind not in ("obj", "class", "data", "exc"):
        return None
    module = docstrings.short_modules().get(target)
    if module is not None:
        python = env.get_domain("py")
        place = node.get("refdoc", "")
        return python.resolve_xref(env, place, app.builder, "mod", module, node, content)
    if kind == "obj" and target.startswith("attnspec."):
        return None
    return content


def setup(app: Any) -> None:
    app.connect("config-inited", lambda app, config: generate.write_pages())
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.process_signature)
    app.connect("missing-reference", resolve)
