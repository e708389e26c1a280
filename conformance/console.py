"""What the commands share: the consoles, their common options, files written and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()

Select = Annotated[
    list[str] | None,
    typer.Argument(help="Mechanisms, operations or kernel names; all if none."),
]
Jobs = Annotated[int, typer.Option(help="Processes at a time.", min=1)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")]


def usage_error(message: str) -> typer.Exit:
    """Print what was wrong with the call; exit status 2."""
    tell(message, "red")
    return typer.Exit(2)


def tell(message: str, style: str) -> None:
    """A line on the error stream, as it is: brackets are no markup, and commands stay in one."""
    said = f"attnspec: {message}"
    Console(stderr=True).print(said, style=style, highlight=False, markup=False, soft_wrap=True)


def write_json(path: Path | None, data: Any) -> None:
    """Write `data` to `path`, if one is given; its folder is made."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
