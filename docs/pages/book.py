"""The pages about the book as a whole: contents, rulebook, papers, status, engines."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

from attnspec.conformance.__main__ import app
from attnspec.conformance.contract import contracts
from attnspec.conformance.laws import laws
from attnspec.conformance.mutants import mutants
from attnspec.reference import Mechanism, Paper, mechanisms
from attnspec.reference.conventions import RULES
from pages import chapter, docstrings, evidence, rest
from pages.order import families


def part_text(family: str) -> str:
    """What a part is about, from its package's docstring."""
    package = importlib.import_module(f"attnspec.reference.{family}")
    text = (inspect.getdoc(package) or "").split("\n\n")[0].rpartition(": ")[2]
    return text[:1].upper() + " ".join(text[1:].split())


def contents() -> str:
    """The table of contents, one section a part."""
    blocks = [
        rest.heading("The book", rest.TITLE),
        f"{len(mechanisms())} mechanisms, one chapter each. Begin with "
        ":ref:`dense attention <chapter-attention>`; every other chapter says how it departs from "
        "it. The :doc:`rulebook <rulebook>` holds the conventions they share.",
    ]
    for family, chapters in families().items():
        blocks += [rest.heading(family.capitalize()), part_text(family), _chapter_table(chapters)]
    parts = [f"{family}/index" for family in families()]
    entries = ["rulebook", *parts, "laws", "primitives", "papers", "status"]
    blocks.append(rest.directive("toctree", body="\n".join(entries), hidden=""))
    return rest.page(*blocks)


def part(family: str) -> str:
    """The page of a part."""
    chapters = families()[family]
    entries = "\n".join(mechanism.slug for mechanism in chapters)
    return rest.page(
        rest.heading(family.capitalize(), rest.TITLE),
        f".. rst-class:: lead\n\n{part_text(family)}",
        _chapter_table(chapters),
        rest.directive("toctree", body=entries, hidden=""),
    )


def _chapter_table(chapters: list[Mechanism]) -> str:
    rows = [
        [f":ref:`{m.title} <chapter-{m.slug}>`", rest.escape(m.idea), str(m.paper.year)]
        for m in chapters
    ]
    return rest.table(("Chapter", "Idea", "Year"), rows, widths="25 65 10")


def rulebook() -> str:
    """Every rule, the chapters that cite it, and the functions that execute some of them."""
    blocks = [
        rest.heading("The rulebook", rest.TITLE),
        "What every chapter, contract and kernel takes for granted. The rules that decide a number "
        "are functions of :py:mod:`attnspec.reference.conventions`, below.",
    ]
    cited = {slug: _rules_cited(mechanism) for slug, mechanism in mechanisms().items()}
    for name, text in RULES.items():
        users = [f":ref:`{slug} <chapter-{slug}>`" for slug in cited if name in cited[slug]]
        blocks += [
            rest.label(f"rule-{name.lower()}"),
            rest.heading(name, rest.SUBSECTION),
            rest.escape(text),
            f".. rst-class:: cited\n\nCited by {', '.join(users)}." if users else "",
        ]
    module = "attnspec.reference.conventions"
    return rest.page(
        *blocks,
        rest.heading("As functions"),
        rest.directive("automodule", module, members="", member_order="bysource"),
    )


def _rules_cited(mechanism: Mechanism) -> set[str]:
    sources = (inspect.getsource(module) for module in docstrings.modules(mechanism))
    return {f"K{n}" for source in sources for n in re.findall(r"\bK(\d+)\b", source)}


def bibtex(slug: str, paper: Paper) -> str:
    """The paper as a BibTeX entry whose key is the chapter's slug."""
    fields = {
        "title": f"{{{paper.title}}}",
        "author": " and ".join(paper.authors),
        "year": str(paper.year),
    }
    if paper.arxiv:
        fields |= {"eprint": paper.arxiv, "archiveprefix": "arXiv"}
        fields["url"] = f"https://arxiv.org/abs/{paper.arxiv}"
    if paper.venue:
        fields["booktitle"] = paper.venue
    kind = "inproceedings" if paper.venue else "misc"
    body = ",\n".join(f"  {key} = {{{_tex(value)}}}" for key, value in fields.items())
    return f"@{kind}{{{slug},\n{body}\n}}\n"


def _tex(text: str) -> str:
    return re.sub(r"([&%#])", r"\\\1", text)


def bibliography() -> str:
    return "\n".join(bibtex(slug, m.paper) for slug, m in mechanisms().items())


def papers() -> str:
    return rest.page(
        rest.heading("Papers", rest.TITLE),
        "The entries are made from the records the chapters end with.",
        rest.directive("bibliography", all=""),
    )


def status() -> str:
    """One row a mechanism: what exists, and what was certified where."""
    rows = []
    known = contracts()
    for family, chapters in families().items():
        for m in chapters:
            total = len(m.operations)
            done = sum(o.qualified_name in known for o in m.operations)
            path = chapter.ROOT / "fast" / family / f"{m.slug}.py"
            rows.append(
                [
                    f":ref:`{m.slug} <chapter-{m.slug}>`",
                    family,
                    f"{done} of {total}",
                    str(sum(x.operation.startswith(f"{m.slug}.") for x in mutants())),
                    "yes" if path.exists() else "",
                    evidence.verdict(m.slug, "cpu"),
                    evidence.verdict(m.slug, "cuda"),
                    "yes" if evidence.benchmark_files(m.slug) else "",
                ]
            )
    header = (
        "Mechanism",
        "Part",
        "Contracts",
        "Mutants",
        "Fast path",
        "CPU certificate",
        "GPU certificate",
        "Measured",
    )
    return rest.page(
        rest.heading("Status", rest.TITLE),
        "What exists today, counted when these pages were built. A dash means not yet: a mechanism "
        "without a certificate has been certified by nobody.",
        rest.table(header, rows, css="figures"),
    )


def engines(folder: Path = chapter.ROOT / "fast" / "engines") -> str:
    """A section for each engine package, from its docstring."""
    blocks = [
        rest.heading("Engines", rest.TITLE),
        "Most mechanisms reduce to a handful of kernels. An engine is one kernel family, in Triton "
        "for CUDA tensors and in Numba for CPU tensors; a mechanism's module plans the work and "
        "hands it to an engine.",
    ]
    for path in sorted(folder.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if text:
            blocks += [rest.heading(path.parent.name.capitalize()), text]
    return rest.page(*blocks)


def primitives() -> str:
    """Every module of the shared vocabulary."""
    package = importlib.import_module("attnspec.reference.primitives")
    blocks = [
        rest.heading("Primitives", rest.TITLE),
        rest.directive("automodule", package.__name__),
    ]
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = f"{package.__name__}.{info.name}"
        title = info.name.replace("_", " ").capitalize()
        blocks += [
            rest.heading(title),
            rest.directive("automodule", module, members="", member_order="bysource"),
        ]
    return rest.page(*blocks)


def law_table() -> str:
    """Every law of the suite."""
    rows = [
        [law.name, rest.escape(law.promise), ", ".join(map(docstrings.rule_link, law.rules))]
        for law in sorted(laws().values(), key=lambda law: law.name)
    ]
    return rest.page(
        rest.heading("The laws", rest.TITLE),
        "Written once, and applied to every operation whose contract allows. A mechanism's page "
        "says which of them speak about it.",
        rest.table(("Law", "Promise", "Rules"), rows, widths="15 70 15"),
    )


def commands() -> str:
    """The command line, from its own help."""
    import typer

    group = typer.main.get_command(app)
    blocks = [rest.heading("attnspec (command)", rest.TITLE), rest.escape(group.help or "")]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        rows = []
        for parameter in command.params:
            option = parameter.param_type_name == "option"
            usage = ", ".join(parameter.opts) if option else parameter.name.upper()
            rows.append([rest.code(usage), rest.escape(getattr(parameter, "help", "") or "")])
        blocks += [
            rest.heading(f"attnspec {name}"),
            command.help or "",
            rest.table(("Argument", "Meaning"), rows, widths="25 75") if rows else "",
        ]
    return rest.page(*blocks)
