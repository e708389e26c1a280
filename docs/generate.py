"""Write the derived pages below docs/chapters, from the reference and from what was measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pictures
from pages import book, chapter, flex, order, speed, studies

from attnspec.reference import mechanisms

CHAPTERS = Path(__file__).parent / "chapters"
PAGES = {
    "index.rst": book.contents,
    "rulebook.rst": book.rulebook,
    "laws.rst": book.law_table,
    "primitives.rst": book.primitives,
    "papers.rst": book.papers,
    "references.bib": book.bibliography,
    "status.rst": book.status,
    "engines.rst": book.engines,
    "flex.rst": flex.listing,
    "speed.rst": speed.overview,
    "command.rst": book.commands,
    "studies/index.rst": studies.contents,
}


def write(path: Path, text: str) -> None:
    """Write a page, unless it says the same already: Sphinx rebuilds what is newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_pages(folder: Path = CHAPTERS) -> None:
    """All derived pages; the pages of what is gone are removed."""
    for old in folder.glob("*/*.rst"):
        if old.stem not in {"index", *mechanisms(), *studies.studies()}:
            old.unlink()
    for family in order.families():
        write(folder / family / "index.rst", book.part(family))
    for slug, mechanism in mechanisms().items():
        place = folder / mechanism.family
        place.mkdir(parents=True, exist_ok=True)
        caption = pictures.draw(slug, place)
        write(place / f"{slug}.rst", chapter.chapter(mechanism, slug if caption else "", caption))
    place = folder / "studies"
    place.mkdir(parents=True, exist_ok=True)
    for name, module in studies.studies().items():
        numbers = studies.results(name)
        studies.draw(name, module, numbers, place)
        write(place / f"{name}.rst", studies.study(name, module, numbers))
    for name, make in PAGES.items():
        write(folder / name, make())


def clean(folder: Path = CHAPTERS) -> None:
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    write_pages()
