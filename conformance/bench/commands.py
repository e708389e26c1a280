"""The commands that measure: ``attnspec bench`` and ``attnspec tune``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Annotated, Any

import typer

from attnspec.conformance import registry
from attnspec.conformance.bench.model import Benchmark, benchmarks
from attnspec.conformance.bench.run import run_benchmarks
from attnspec.conformance.bench.tuning import pairs, tune_kernels
from attnspec.conformance.console import JsonFile, Select, console, tell, usage_error, write_json
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.terminal import progress, show_benchmarks, show_tuning


def bench(
    select: Select = None,
    against: Annotated[str | None, typer.Option(help="Rivals, comma separated.")] = None,
    device: Annotated[str | None, typer.Option(help="Only benchmarks of cpu or cuda.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure kernels beside their rivals. A kernel that is not right gets no number (exit 1)."""
    chosen = _benchmarks(select, device)
    kernels = _kernels()
    with progress() as advance:
        number = count()
        result = run_benchmarks(
            chosen,
            kernels,
            against=against.split(",") if against else None,
            progress=lambda what: advance(next(number), None, what),
        )
    write_json(json_file, result)
    show_benchmarks(result, console)
    _say_if_interrupted(result)
    failed = any("timing" not in row for row in result["results"])
    raise typer.Exit(1 if failed or result["interrupted"] else 0)


def tune(
    select: Select = None,
    device: Annotated[str, typer.Option(help="Tune the kernels of cuda or cpu.")] = "cuda",
    json_file: JsonFile = None,
) -> None:
    """Time the configurations kernels choose from, here, and write the best as a table.

    Put it in force with ATTNSPEC_TABLE=FILE. A configuration with another answer than the present
    one gets no number. Exit status 1 if there was one, or if a benchmark does not run.
    """
    chosen = pairs(_benchmarks(select, device), _kernels())
    if not chosen:
        raise usage_error(f"--device: got {device!r}, for which no kernel chosen is tuned by table")
    if device == "cuda" and not _gpu():
        raise usage_error("--device: got 'cuda', but torch finds no GPU")
    with progress() as advance:
        number = count()
        result = tune_kernels(chosen, progress=lambda what: advance(next(number), None, what))
    write_json(json_file, result)
    show_tuning(result, console)
    _say_if_interrupted(result)
    failed = any({"wrong", "error"} & set(row) for row in result["measured"])
    raise typer.Exit(1 if failed or result["interrupted"] else 0)


def _say_if_interrupted(result: Mapping[str, Any]) -> None:
    if result["interrupted"]:
        tell("interrupted: this is what was measured until then", "yellow")


def _benchmarks(select: list[str] | None, device: str | None) -> list[Benchmark]:
    wanted = select or []
    chosen = [
        b
        for b in benchmarks()
        if device in (None, b.device)
        and (not wanted or {b.name, b.operation, b.operation.partition(".")[0]} & set(wanted))
    ]
    if not chosen:
        raise usage_error(f"select: got {wanted}, which no benchmark of this device matches")
    return chosen


def _kernels() -> list[Kernel]:
    try:
        return registry.registered_kernels()
    except registry.Unavailable as error:
        raise usage_error(str(error)) from None


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
