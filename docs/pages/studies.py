"""Studies: what models do with the mechanisms, from numbers that are checked in.

A study ``<name>`` is two modules and a file in ``docs/studies``: ``<name>.py``, a script that makes
``<name>.json``, and ``<name>_page.py``, which says and draws what is in it:

- `TITLE`, and `MECHANISMS`, the slugs whose pages link to the study;
- `NEEDS`, if the script imports packages that are not the library's, their names;
- ``text(results)``, the body of the page in reStructuredText;
- `FIGURES`, by name a caption and a function ``draw(results, ink)`` that returns the figure.

Without numbers there is no page. What the scripts share is in ``running.py``.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pictures

from pages import rest
from pages.evidence import DOCS, load


@cache
def studies(folder: Path = DOCS / "studies") -> dict[str, ModuleType]:
    """The page module of every study that has numbers, by its name."""
    names = (path.stem.removesuffix("_page") for path in sorted(folder.glob("*_page.py")))
    return {
        name: importlib.import_module(f"studies.{name}_page")
        for name in names
        if (folder / f"{name}.json").exists()
    }


def results(name: str, folder: Path = DOCS / "studies") -> Any:
    return load(folder / f"{name}.json")


def study(name: str, module: ModuleType, numbers: Any) -> str:
    """The page of one study; its drawings lie beside it."""
    users = ", ".join(f":ref:`{slug} <chapter-{slug}>`" for slug in module.MECHANISMS)
    figures = (
        rest.picture(f"{name}-{figure}", caption) for figure, (caption, _) in module.FIGURES.items()
    )
    return rest.page(
        rest.label(f"study-{name}"),
        rest.heading(module.TITLE, rest.TITLE),
        f"With {users}.",
        *figures,
        module.text(numbers),
    )


def draw(name: str, module: ModuleType, numbers: Any, place: Path) -> None:
    """Every figure of a study, for light and for dark pages."""
    for figure, (_, function) in module.FIGURES.items():
        pictures.save(
            f"{name}-{figure}", place, lambda ink, function=function: function(numbers, ink)
        )


def contents(found: dict[str, ModuleType] | None = None) -> str:
    """The list of studies."""
    found = studies() if found is None else found
    lead = "What models do with the mechanisms, each measured by a script in docs/studies."
    return rest.page(
        rest.heading("Studies", rest.TITLE),
        lead if found else f"{lead} None has been run yet.",
        rest.directive("toctree", body="\n".join(found)) if found else "",
    )


def links(slug: str) -> str:
    """The studies that a mechanism takes part in; empty if there are none."""
    names = [name for name, module in studies().items() if slug in module.MECHANISMS]
    return rest.bullets(f":ref:`{studies()[name].TITLE} <study-{name}>`" for name in names)
