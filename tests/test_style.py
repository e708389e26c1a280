"""What makes the source readable, where a linter does not look."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnspec.reference import mechanisms
from attnspec.reference.conventions import RULES

ROOT = Path(__file__).parent.parent
LONGEST = {"reference": 300, "conformance": 300, "fast": 400}
CITATION = re.compile(r"\b([SK])(\d+)\b")
CLAUSE = re.compile(r"^S(\d+)\. ", re.MULTILINE)
FILES = [path for folder in LONGEST for path in sorted((ROOT / folder).rglob("*.py"))]
FAMILIES = {mechanism.family for mechanism in mechanisms().values()}
CHAPTERS = [
    path
    for path in FILES
    if path.parent.parent == ROOT / "reference"
    and path.parent.name in FAMILIES
    and path.stem != "__init__"
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def owner(path: Path) -> str | None:
    """The slug of the chapter that a file of the reference belongs to."""
    slugs = [s for s in mechanisms() if path.stem == s or path.stem.startswith(f"{s}_")]
    return max(slugs, key=len) if slugs else None


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the functions and classes of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield ast.get_docstring(node) or ""


def defined_clauses(slug: str) -> set[str]:
    texts = (
        ast.get_docstring(ast.parse(path.read_text())) or ""
        for path in CHAPTERS
        if owner(path) == slug
    )
    return {f"S{number}" for text in texts for number in CLAUSE.findall(text)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    length = path.read_text().count("\n")
    assert length <= LONGEST[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_cited_clauses_exist(path: Path) -> None:
    """S0 is a state before the first token in several papers, never a clause."""
    slug = owner(path)
    assert slug is not None, "its name begins with no chapter's slug"
    cited = {
        f"{letter}{number}"
        for text in docstrings(path)
        for letter, number in CITATION.findall(text)
        if letter == "S" and number != "0"
    }
    assert cited <= defined_clauses(slug)


@pytest.mark.parametrize("slug", mechanisms())
def test_clauses_are_numbered_without_gaps(slug: str) -> None:
    numbers = sorted(int(clause[1:]) for clause in defined_clauses(slug))
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("slug", mechanisms())
def test_operations_implement_clauses_and_show_an_example(slug: str) -> None:
    clauses = defined_clauses(slug)
    for operation in mechanisms()[slug].operations:
        assert operation.clauses, operation.name
        assert set(operation.clauses) <= clauses, operation.name
        assert ">>>" in (operation.function.__doc__ or ""), operation.name


def test_cited_rules_exist() -> None:
    for path in FILES:
        cited = {f"K{n}" for letter, n in CITATION.findall(path.read_text()) if letter == "K"}
        assert cited <= set(RULES), path


@pytest.mark.parametrize("folder", ["reference", "fast", "conformance", "docs", "tests"])
def test_nothing_is_left_for_later(folder: str) -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", ".md", ".rst", ".j2", ".css"):
            assert not marks.search(path.read_text()), path
