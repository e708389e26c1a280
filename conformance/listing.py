"""What ``attnspec list`` and ``attnspec show`` print: mechanisms, operations, promises."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws import laws_for
from attnspec.conformance.mutants import Mutant
from attnspec.reference import Mechanism, mechanisms


def mechanism_rows(kernels: Sequence[Kernel], mutants: Sequence[Mutant]) -> list[dict[str, Any]]:
    """Every mechanism as plain data: its operations, and the kernels and mutants of them."""
    return [
        {
            "slug": slug,
            "family": mechanism.family,
            "title": mechanism.title,
            "operations": [o.qualified_name for o in mechanism.operations],
            "kernels": [
                {
                    "name": k.name,
                    "operation": k.operation,
                    "backend": k.backend,
                    "device": k.device,
                }
                for k in kernels
                if k.operation.startswith(f"{slug}.")
            ],
            "mutants": [m.name for m in mutants if m.operation.startswith(f"{slug}.")],
            "doc": mechanism.module.__name__,
        }
        for slug, mechanism in mechanisms().items()
    ]


def show_mechanisms(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    """One line a mechanism."""
    table = _table("mechanism", "family", "operations", "kernels", "mutants", "title")
    for row in rows:
        counts = (len(row[name]) for name in ("operations", "kernels", "mutants"))
        table.add_row(row["slug"], row["family"], *map(str, counts), row["title"])
    console.print(table)


def show_chapter(mechanism: Mechanism, console: Console) -> None:
    """The definition, and the signature of every operation."""
    paper = mechanism.paper
    console.print(mechanism.title, style="bold")
    source = f"{paper.title} ({paper.year}) {paper.arxiv}\n"
    console.print(source, highlight=False, markup=False)
    console.print(inspect.getdoc(mechanism.module), highlight=False, markup=False)
    for operation in mechanism.operations:
        console.print(f"  {operation.qualified_name}{operation.signature}", markup=False)


def show_operation(contract: Contract, console: Console) -> None:
    """Signature, documentation, and the laws that a kernel of the operation must keep."""
    spec = contract.spec
    name = contract.operation
    console.print(f"{name}{spec.signature}", style="bold", markup=False, highlight=False)
    console.print(f"clauses {', '.join(spec.clauses)}\n", highlight=False)
    console.print(inspect.getdoc(spec.function), markup=False, highlight=False)
    kernel = Kernel("any", name, spec.function, backward=spec.gradient)
    table = _table("law", "rules", "promise")
    for law in laws_for(contract, kernel):
        table.add_row(law.name, " ".join(law.rules), law.promise)
    console.print()
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name)
    return table
