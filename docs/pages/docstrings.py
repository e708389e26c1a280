"""Reading the chapters' docstrings: their sections, their clauses and the rules they cite."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from attnspec.reference import Mechanism, mechanisms
from attnspec.reference.conventions import RULES
from pages import rest

SECTION = re.compile(r"^(\S.*)\n-{3,}\n", re.MULTILINE)
CLAUSE = re.compile(r"^S(\d+)\. ", re.MULTILINE)
CITATION = re.compile(r"\b([SK])(\d+)\b")
VERBATIM = re.compile(r"(``.+?``|:[\w:]+:`.+?`|`.+?`_?|\*\*.+?\*\*)", re.DOTALL)
PLACEHOLDER = re.compile(r"(?<![`:\w])`([^`]*<\w+>[^`]*)`(?!`)")
FIELD = re.compile(r"^(\w[\w, ]*(?:\([\w, ]*\))?): (?=\S)")


@dataclass(frozen=True)
class Text:
    """A module docstring: title (its first paragraph), lead, sections by heading."""

    title: str
    lead: str
    sections: dict[str, str]


def read(module: ModuleType) -> Text:
    pieces = SECTION.split(inspect.getdoc(module) or "")
    title, _, lead = pieces[0].partition("\n\n")
    sections = {
        name: body.strip("\n") for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }
    return Text(" ".join(title.split()), lead.strip("\n"), sections)


def owner(stem: str) -> Mechanism | None:
    """The chapter a reference module called `stem` belongs to: the longest slug it begins with."""
    slugs = [slug for slug in mechanisms() if stem == slug or stem.startswith(f"{slug}_")]
    return mechanisms()[max(slugs, key=len)] if slugs else None


def modules(mechanism: Mechanism) -> list[ModuleType]:
    """The chapter's module, then those that go on from it, ordered by their first clause."""
    family = importlib.import_module(mechanism.module.__name__.rpartition(".")[0])
    stems = [info.name for info in pkgutil.iter_modules(family.__path__)]
    others = [
        importlib.import_module(f"{family.__name__}.{stem}")
        for stem in stems
        if stem != mechanism.slug and owner(stem) == mechanism
    ]
    return [mechanism.module, *sorted(others, key=lambda m: min(_numbers(m), default=999))]


@cache
def short_modules() -> dict[str, str]:
    """Full name of every chapter module by its last part, as the chapters cite one another."""
    return {
        module.__name__.rpartition(".")[2]: module.__name__
        for mechanism in mechanisms().values()
        for module in modules(mechanism)
    }


def _numbers(module: ModuleType) -> list[int]:
    return [int(number) for number in CLAUSE.findall(inspect.getdoc(module) or "")]


@cache
def clauses(slug: str) -> frozenset[str]:
    """The clauses a chapter defines, in its own module or in those that go on from it."""
    return frozenset(
        f"S{number}" for module in modules(mechanisms()[slug]) for number in _numbers(module)
    )


def clause_link(slug: str, clause: str) -> str:
    return f":ref:`{clause} <clause-{slug}-{clause.lower()}>`"


def rule_link(rule: str) -> str:
    return f":ref:`{rule} <rule-{rule.lower()}>`"


def link(text: str, slug: str | None) -> str:
    """`text` with its citations (S3, K5) as links, outside code, maths and strong text."""
    text = PLACEHOLDER.sub(r"``\1``", text)
    pieces = VERBATIM.split(text)
    pieces[::2] = [_link_plain(piece, slug) for piece in pieces[::2]]
    return "".join(pieces)


def _link_plain(text: str, slug: str | None) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match.group()
        if match.group(1) == "K":
            target = rule_link(name) if name in RULES else ""
        else:
            target = clause_link(slug, name) if slug and name in clauses(slug) else ""
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        if not target or before == "_" or after == "_":
            return name
        opening = "" if before in " \n-('\"[/" else "\\ "
        closing = "" if not after or after in " \n-)'\"]/:.,;!?" else "\\ "
        return f"{opening}{target}{closing}"

    return CITATION.sub(replace, text)


def definition(body: str, slug: str) -> str:
    """The body of a Definition: every clause gets an anchor, every citation a link."""
    blocks = []
    for block in re.split(r"\n\s*\n", body):
        match = CLAUSE.match(block)
        if match is None:
            blocks.append(link(block, slug))
            continue
        name = f"S{match.group(1)}"
        anchor = rest.label(f"clause-{slug}-{name.lower()}")
        rest_of_it = link(block[match.end() :], slug)
        blocks.append(f".. rst-class:: clause\n\n{anchor}\n**{name}.** {rest_of_it}")
    return rest.page(*blocks)


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook: citations become links, ``name: meaning`` blocks become definition lists."""
    module = getattr(obj, "__module__", None) or name
    found = owner(module.rpartition(".")[2]) if module.startswith("attnspec.reference") else None
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    done = []
    for block in blocks:
        if ">>>" in block:
            done.append(block)
        else:
            done.append(link(_fields(block), found.slug if found else None))
    lines[:] = "\n\n".join(done).splitlines()


def process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any]:
    """Sphinx's hook: a dataclass's made-up default must not keep a signature from being parsed."""
    return (signature.replace("<factory>", "...") if signature else signature), returns


def _fields(block: str) -> str:
    """``name: meaning`` lines, with indented continuations, as a definition list."""
    lines = block.splitlines()
    if not all(line.startswith(" ") or FIELD.match(line) for line in lines):
        return block
    if len(lines) < 2 or lines[0].startswith(" "):
        return block
    out: list[str] = []
    for line in lines:
        match = FIELD.match(line)
        if match:
            out += ["", f"``{match.group(1)}``", f"    {line[match.end() :]}"]
        else:
            out.append(line)
    return "\n".join(out).strip("\n")


def without_docstring(function: Any) -> tuple[str, int]:
    """Source of a function or class without its docstring, and the line it begins on."""
    import ast

    lines, first = inspect.getsourcelines(function)
    node = ast.parse("".join(lines)).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    if ast.get_docstring(node) is not None:
        text = node.body[0]
        assert text.end_lineno is not None
        end = text.end_lineno
        if len(node.body) > 1 and not lines[end].strip():
            end += 1
        lines = lines[: text.lineno - 1] + lines[end:]
    return "".join(lines).rstrip("\n"), first
