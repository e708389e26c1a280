"""Small pieces of reStructuredText."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

TITLE, SECTION, SUBSECTION = "=", "-", "~"
DASH = "\N{EN DASH}"


def heading(text: str, mark: str = SECTION) -> str:
    return f"{text}\n{mark * max(len(text), 3)}\n"


def label(name: str) -> str:
    return f".. _{name}:\n"


def directive(name: str, argument: str = "", body: str = "", **options: str) -> str:
    """A directive; an option's underscores become hyphens, and an empty value makes it a flag."""
    lines = [f".. {name}:: {argument}".rstrip()]
    lines += [f"   :{key.replace('_', '-')}: {value}".rstrip() for key, value in options.items()]
    return "\n".join(lines) + "\n" + (f"\n{textwrap.indent(body, '   ')}\n" if body else "")


def picture(stem: str, caption: str, body: str = "") -> str:
    """The drawings of a picture for light and for dark pages; `body` is the caption marked up."""
    return page(
        *(
            directive(
                "figure",
                f"{stem}-{theme}.svg",
                body or caption,
                alt=caption,
                figclass=f"only-{theme}",
                width="100%",
            )
            for theme in ("light", "dark")
        )
    )


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], widths: str = "auto", css: str = ""
) -> str:
    """A list-table; an empty cell shows as a dash."""
    lines = []
    for row in (header, *rows):
        for n, cell in enumerate(row):
            lead = "* - " if n == 0 else "  - "
            lines.append(lead + textwrap.indent(cell or DASH, "    ").lstrip())
    options = {"header_rows": "1", "widths": widths}
    if css:
        options["class"] = css
    return directive("list-table", body="\n".join(lines), **options)


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items) + "\n"


def code(text: str) -> str:
    return f"``{text}``" if text else ""


def codes(names: Iterable[str]) -> str:
    return ", ".join(code(name) for name in names)


def escape(text: str) -> str:
    """Plain text that contains no mark-up."""
    return "".join(f"\\{c}" if c in "\\*`|_" else c for c in text)


def page(*blocks: str) -> str:
    """Blocks with an empty line between them."""
    return "\n\n".join(block.strip("\n") for block in blocks if block) + "\n"
