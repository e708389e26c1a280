"""All measured speeds on one page, each beside the fastest of its rivals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import evidence, rest
from pages.order import chapters

HEADER = ("Chapter", "Case", "ms", "Roofline", "Fastest rival", "Ratio")


def overview(folder: Path = evidence.DOCS / "benchmarks") -> str:
    """A table for each machine."""
    tables: dict[str, list[list[str]]] = {}
    for mechanism in chapters():
        chapter = f":ref:`{mechanism.title} <chapter-{mechanism.slug}>`"
        for record, results in evidence.benchmark_files(mechanism.slug, folder):
            rows = tables.setdefault(evidence.machine(record), [])
            rows += [[chapter, *_row(result)] for result in results if "timing" in result]
    return rest.page(
        rest.heading("Speed", rest.TITLE),
        "Medians of kernels that passed the suite's smoke profile in the same run, and how much of "
        "the roofline they reach. The ratio is the time of the fastest rival that could run the "
        "case, over ours: where it is below 1 and computes the same, use the rival. Dense "
        "attention beside a mechanism shows what that costs or saves. All rivals, versions and "
        "rates are on the chapters' pages; the guides on engines say what a kernel lacks.",
        *(
            f"{rest.heading(machine)}\n\n{rest.table(HEADER, rows)}"
            for machine, rows in sorted(tables.items())
        ),
    )


def _row(result: dict[str, Any]) -> list[str]:
    operation = rest.code(result["operation"].partition(".")[2])
    rivals = [rival for rival in result.get("rivals", []) if "timing" in rival]
    fastest = min(rivals, key=lambda rival: rival["ratio"], default=None)
    return [
        f"{operation} {rest.escape(result['benchmark'])}, {result['dtype']}",
        f"{result['timing']['median'] * 1e3:.3g}",
        f"{result['of_roofline']:.0%}",
        rest.escape(fastest["name"]) if fastest else "none",
        f"{fastest['ratio']:.2f}" if fastest else "",
    ]
