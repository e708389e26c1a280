"""Reports for a person at a terminal: one screen, the failure first in what it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from attnspec.conformance.report import Failure, Report, Result

MARKS = {
    "pass": ("✓", "green"),
    "fail": ("✗", "bold red"),
    "crash": ("!", "bold red"),
    "known": ("~", "yellow"),
    "unexpected pass": ("?", "bold yellow"),
}


def show_report(report: Report, console: Console, replay_hint: bool = True) -> None:
    """The table of kernels by law, then every failure on a panel of its own."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("kernel", "left"),
        ("operation", "left"),
        ("dtypes", "left"),
        ("laws", "right"),
        ("cases", "right"),
        ("budget used", "right"),
        ("seconds", "right"),
        ("verdict", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for (kernel, operation), results in report.kernels().items():
        table.add_row(
            kernel,
            operation,
            " ".join(dict.fromkeys(result.dtype for result in results)),
            str(len({result.law for result in results})),
            str(sum(result.cases for result in results)),
            f"{report.headroom(results):.2f}",
            f"{sum(result.seconds for result in results):.1f}",
            _verdict(results),
        )
    console.print(table)
    for failure in _distinct(report.failures):
        show_failure(failure, console, replay_hint)
    for result in report.results:
        if result.verdict in ("known", "unexpected pass") or (
            result.verdict == "crash" and result.failure is None
        ):
            console.print(f"{result.verdict}: {result.kernel} {result.law} {result.note}")
    summary = report.to_dict()["summary"]
    state = "interrupted" if report.interrupted else ("passed" if report.passed else "failed")
    console.print(
        f"{state}: {summary['kernels']} kernels, {summary['cases']} cases, "
        f"{summary['failed']} broken promises, profile {report.profile}",
        style="green" if report.passed else "bold red",
    )


def show_failure(failure: Failure, console: Console, replay_hint: bool = True) -> None:
    """One counterexample: what was promised, when it breaks, where, by how much, how to replay."""
    violation = failure.violation
    lines = Text()
    lines.append(f"{failure.when}\n", style="bold")
    lines.append(f"promise   {failure.promise}\n")
    lines.append(f"stage     {violation.stage}: {violation.message}\n")
    if violation.coordinate is not None:
        lines.append(f"worst at  {list(violation.coordinate)}\n")
    if violation.expected is not None:
        lines.append(f"expected  {violation.expected:.9g}\ngot       {violation.got:.9g}\n")
    if violation.budget is not None and violation.error is not None:
        lines.append(f"row error {violation.error:.3g}, budget {violation.budget:.3g}")
        if violation.budget:
            lines.append(f" ({violation.error / violation.budget:.3g} times the budget)")
        lines.append("\n")
    lines.append(f"case      {failure.case}")
    if failure.path and replay_hint:
        lines.append(f"\nreplay    attnspec replay {failure.path}", style="cyan")
    title = f"{failure.kernel} · {failure.operation} · {failure.law}"
    console.print(Panel(lines, title=title, title_align="left", border_style="red"))


def _distinct(failures: Iterable[Failure]) -> list[Failure]:
    """One failure for each kernel and law: the other dtypes say the same."""
    chosen: dict[tuple[str, str], Failure] = {}
    for failure in failures:
        chosen.setdefault((failure.kernel, failure.law), failure)
    return list(chosen.values())


def _verdict(results: list[Result]) -> Text:
    broken = [result for result in results if not result.passed]
    if not broken:
        known = any(result.verdict == "known" for result in results)
        mark, style = MARKS["known" if known else "pass"]
        return Text(mark, style=style)
    mark, style = MARKS[broken[0].verdict]
    return Text(f"{mark} {', '.join(dict.fromkeys(result.law for result in broken))}", style=style)


def show_benchmarks(result: Mapping[str, Any], console: Console) -> None:
    """Medians, rates, share of the roofline, and how many times slower each rival is."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("operation", "benchmark", "kernel", "dtype", "ms", "TFLOP/s", "TB/s", "roofline"):
        table.add_column(name, justify="left" if name in ("operation", "benchmark") else "right")
    table.add_column("rivals (ms, times ours)")
    for row in result["results"]:
        names = (row["operation"], row["benchmark"], row["kernel"], row["dtype"])
        if "timing" not in row:
            table.add_row(*names, "-", "-", "-", "-", row.get("error", f"gate {row['gate']}"))
            continue
        table.add_row(
            *names,
            f"{row['timing']['median'] * 1e3:.4g}",
            f"{row['flops_per_second'] / 1e12:.3g}",
            f"{row['bytes_per_second'] / 1e12:.3g}",
            f"{row['of_roofline']:.0%}",
            "  ".join(map(_rival, row["rivals"])),
        )
    console.print(table)


def _rival(entry: Mapping[str, Any]) -> str:
    if "timing" not in entry:
        return f"{entry['name']}: {entry['unavailable']}"
    return f"{entry['name']} {entry['timing']['median'] * 1e3:.4g} ({entry['ratio']:.2f}x)"
