"""Reports for a person at a terminal: one screen, the failure first in what it says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from attnspec.conformance.killing import Kill
from attnspec.conformance.report import Failure, Report, Result

MARKS = {
    "pass": ("✓", "green"),
    "fail": ("✗", "bold red"),
    "crash": ("!", "bold red"),
    "known": ("~", "yellow"),
    "unexpected pass": ("?", "bold yellow"),
}


LINE_EVERY = 30.0
"""Seconds between two lines of progress where the error stream is no terminal."""

Advance = Callable[[int, int | None, str], None]
"""Told how much is done, of how much if that is known, and what is next."""


@contextmanager
def progress() -> Iterator[Advance]:
    """What a long command shows while it runs, on the error stream: a bar, in a log a few lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    with Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=what
        )


def _lines(console: Console) -> Advance:
    last = time.monotonic()

    def advance(done: int, total: int | None, what: str) -> None:
        nonlocal last
        if time.monotonic() - last < LINE_EVERY:
            return
        last = time.monotonic()
        share = f"{done} of {total}" if total else f"{done}"
        console.print(f"{share}: {what}", highlight=False, markup=False, soft_wrap=True)

    return advance


MOST_PANELS = 3
"""Failures of one kernel and operation that are shown in full; one bug breaks many laws."""


def show_report(report: Report, console: Console, options: str = "") -> None:
    """The table of kernels by law, then the failures: the first on panels, the others by line.

    `options` are what ``attnspec replay`` needs besides the case to find the kernel.
    """
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
    shown: Counter[tuple[str, str]] = Counter()
    for failure in _distinct(report.failures):
        shown[failure.kernel, failure.operation] += 1
        if shown[failure.kernel, failure.operation] <= MOST_PANELS:
            show_failure(failure, console, f"attnspec replay {failure.path}{options}")
        else:
            _show_briefly(failure, console)
    for result in report.results:
        if result.verdict in ("known", "unexpected pass") or (
            result.verdict == "crash" and result.failure is None
        ):
            note = f"{result.verdict}: {result.kernel} {result.law} {result.note}"
            console.print(note, markup=False)
    summary = report.to_dict()["summary"]
    state = "interrupted" if report.interrupted else ("passed" if report.passed else "failed")
    console.print(
        f"{state}: {summary['kernels']} kernels, {summary['cases']} cases, "
        f"{summary['failed']} broken promises, profile {report.profile}",
        style="green" if report.passed else "bold red",
    )


def _show_briefly(failure: Failure, console: Console) -> None:
    line = Text()
    line.append(f"✗ {failure.law:<12}", style="bold red")
    line.append(f" {failure.when}; {failure.violation.stage}: {failure.violation.message}")
    console.print(line, no_wrap=True, overflow="ellipsis")
    if failure.path:
        console.print(Text(f"  {failure.path}", style="cyan"), soft_wrap=True)


def show_failure(failure: Failure, console: Console, replay: str = "") -> None:
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
    if violation.budget is not None and violation.error is not None and isfinite(violation.error):
        lines.append(f"row error {violation.error:.3g}, budget {violation.budget:.3g}")
        if violation.budget:
            lines.append(f" ({violation.error / violation.budget:.3g} times the budget)")
        lines.append("\n")
    lines.append(f"case      {failure.case}")
    if failure.path and replay:
        lines.append(f"\nreplay    {replay}", style="cyan")
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


def show_kills(kills: Iterable[Kill], console: Console) -> None:
    """Every mutant, the law that claims it and the laws that caught it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("mutant", "claimed by", "caught by", "bug"):
        table.add_column(name)
    for kill in kills:
        state = "survives" if kill.survived else (kill.mutant.equivalent and "equivalent")
        caught = ", ".join(kill.killers) or state
        table.add_row(kill.mutant.name, kill.mutant.law, caught, escape(kill.mutant.bug))
    console.print(table)


def show_benchmarks(result: Mapping[str, Any], console: Console) -> None:
    """Medians, rates, share of the roofline, and how many times slower each rival is."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("operation", "benchmark", "kernel", "dtype", "ms", "TFLOP/s", "TB/s", "roofline"):
        table.add_column(name, justify="left" if name in ("operation", "benchmark") else "right")
    table.add_column("rivals (ms, times ours)")
    for row in result["results"]:
        names = (row["operation"], row["benchmark"], row["kernel"], row["dtype"])
        if "timing" not in row:
            table.add_row(
                *names, "-", "-", "-", "-", escape(row.get("error", f"gate {row['gate']}"))
            )
            continue
        table.add_row(
            *names,
            f"{row['timing']['median'] * 1e3:.4g}",
            f"{row['flops_per_second'] / 1e12:.3g}",
            f"{row['bytes_per_second'] / 1e12:.3g}",
            f"{row['of_roofline']:.0%}",
            escape("  ".join(map(_rival, row["rivals"]))),
        )
    console.print(table)


def _rival(entry: Mapping[str, Any]) -> str:
    if "timing" not in entry:
        return f"{entry['name']}: {entry['unavailable']}"
    return f"{entry['name']} {entry['timing']['median'] * 1e3:.4g} ({entry['ratio']:.2f}x)"


def show_tuning(result: Mapping[str, Any], console: Console) -> None:
    """For each choice: the candidates by what they change, how many times faster than the one in
    force each is, and why some have no number; then the benchmarks that did not run.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("choice", "candidate", "benchmarks", "speed-up", ""):
        table.add_column(name, justify="right" if name in ("benchmarks", "speed-up") else "left")
    present = {row["key"]: row["candidate"] for row in result["summary"] if row["in_force"]}
    for row in result["summary"]:
        before = present[row["key"]]
        changed = [f"{name}={x}" for name, x in row["candidate"].items() if x != before[name]]
        mark = "chosen" if row["chosen"] else ""
        table.add_row(
            row["key"] if row["in_force"] else "",
            " ".join(changed) or "in force",
            str(row["benchmarks"]),
            f"{row['ratio']:.3f}" if "ratio" in row else "-",
            Text(row.get("note", mark), style="bold green" if row["chosen"] else ""),
        )
    console.print(table)
    for row in result["measured"]:
        if "error" in row:
            console.print(
                f"{row['operation']} {row['benchmark']}: {row['error']}", style="red", markup=False
            )
    better = sum(row["chosen"] and not row["in_force"] for row in result["summary"])
    console.print(f"{len(result['choices'])} choices, {better} changed", style="green")
