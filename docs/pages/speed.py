"""All measured speeds on one page, each beside the fastest of its rivals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnspec.reference import mechanisms
from pages import evidence, rest

HEADER = (
    "Chapter",
    "Operation and case",
    "Dtype",
    "ms",
    "Of roofline",
    "Fastest rival",
    "Its time over ours",
)


def overview(folder: Path = evidence.DOCS / "benchmarks") -> str:
    """A table for each machine."""
    tables: dict[str, list[list[str]]] = {}
    for mechanism in mechanisms().values():
        chapter = f":ref:`{mechanism.title} <chapter-{mechanism.slug}>`"
        for record, results in evidence.benchmark_files(mechanism.slug, folder):
            rows = tables.setdefault(evidence.machine(record), [])
            rows += [[chapter, *_row(result)] for result in results if "timing" in result]
    return rest.page(
        rest.heading("Speed", rest.TITLE),
        "Medians of kernels that passed the suite's smoke profile in the same run. The last column "
        "is the time of the fastest rival that could run the case, over ours: where it is below 1, "
        "use the rival. All rivals, versions and rates are on the chapters' pages, and how much of "
        "the roofline a kernel reaches and why is in the guides of its engine.",
        *(
            f"{rest.heading(machine)}\n\n{rest.table(HEADER, rows, css='figures')}"
            for machine, rows in sorted(tables.items())
        ),
    )


def _row(result: dict[str, Any]) -> list[str]:
    operation = rest.code(result["operation"].partition(".")[2])
    rivals = [rival for rival in result.get("rivals", []) if "timing" in rival]
    fastest = min(rivals, key=lambda rival: rival["ratio"], default=None)
    return [
        f"{operation} {rest.escape(result.get('benchmark', ''))}",
        result.get("dtype", ""),
        f"{result['timing']['median'] * 1e3:.3g}",
        f"{result['of_roofline']:.0%}",
        rest.escape(fastest["name"]) if fastest else "none",
        f"{fastest['ratio']:.2f} x" if fastest else "",
    ]
