"""The command line: ``attnspec``."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as missing:  # pragma: no cover
    sys.exit(f'attnspec: {missing.name} is not installed; pip install "attnspec[conformance]"')

from attnspec.conformance import registry
from attnspec.conformance.case import SavedCase
from attnspec.conformance.contract import find_contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.killing import kill_all
from attnspec.conformance.laws import laws_for
from attnspec.conformance.mutants import mutants as all_mutants
from attnspec.conformance.runner import PROFILES, certify
from attnspec.conformance.runner import replay as replay_case
from attnspec.reference import find_mechanism, mechanisms

app = typer.Typer(
    help="The spec of long-context attention, and the suite that certifies kernels against it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
CASES = Path("build/counterexamples")

Select = Annotated[
    list[str] | None,
    typer.Argument(help="Mechanisms, operations or kernel names; all if none."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")]


def usage_error(message: str) -> typer.Exit:
    """Print what was wrong with the call; exit status 2."""
    Console(stderr=True).print(f"attnspec: {message}", style="red", highlight=False)
    return typer.Exit(2)


def write_json(path: Path | None, data: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")


def load_kernels(path: str | None, operation: str | None, array: str | None) -> list[Kernel]:
    """The registered kernels, or those at ``package.module:attribute``."""
    if path is None:
        return registry.registered_kernels()
    sys.path.insert(0, "")
    found = registry.load_object(path)
    if operation is not None:
        if array is None:
            raise ValueError("--array: got nothing, expected numpy or torch beside --operation")
        return [Kernel(path.rpartition(":")[2], operation, found, array=array)]
    return registry.as_kernels(found, path)


@app.command("list")
def list_command(json_file: JsonFile = None) -> None:
    """Every mechanism with its operations, kernels and mutants."""
    kernels = registry.registered_kernels()
    rows: list[dict[str, Any]] = []
    for slug, mechanism in mechanisms().items():
        own = [k for k in kernels if k.operation.startswith(f"{slug}.")]
        rows.append(
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
                    for k in own
                ],
                "mutants": [m.name for m in all_mutants() if m.operation.startswith(f"{slug}.")],
                "doc": mechanism.module.__name__,
            }
        )
    write_json(json_file, {"mechanisms": rows})
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("mechanism", "family", "operations", "kernels", "mutants", "title"):
        table.add_column(name)
    for row in rows:
        counts = (len(row[name]) for name in ("operations", "kernels", "mutants"))
        table.add_row(row["slug"], row["family"], *map(str, counts), row["title"])
    console.print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A mechanism or an operation.")]) -> None:
    """A mechanism's definition, or an operation's signature, parameters and laws."""
    import inspect

    try:
        slug, dot, _ = name.partition(".")
        mechanism = find_mechanism(slug)
        if not dot:
            console.print(mechanism.title, style="bold")
            paper = mechanism.paper
            console.print(f"{paper.title} ({paper.year}) {paper.arxiv}\n", highlight=False)
            console.print(inspect.getdoc(mechanism.module), highlight=False, markup=False)
            for operation in mechanism.operations:
                console.print(f"  {operation.qualified_name}{operation.signature}", markup=False)
            return
        contract = find_contract(name)
    except ValueError as error:
        raise usage_error(str(error)) from None
    spec = contract.spec
    console.print(f"{name}{spec.signature}", style="bold", markup=False, highlight=False)
    console.print(f"clauses {', '.join(spec.clauses)}\n", highlight=False)
    console.print(inspect.getdoc(spec.function), markup=False, highlight=False)
    kernel = Kernel("any", name, spec.function, backward=spec.gradient)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("law", "rules", "promise"):
        table.add_column(column)
    for law in laws_for(contract, kernel):
        table.add_row(law.name, " ".join(law.rules), law.promise)
    console.print()
    console.print(table)


@app.command()
def conform(
    select: Select = None,
    kernel: Annotated[str | None, typer.Option(help="package.module:attribute")] = None,
    operation: Annotated[str | None, typer.Option(help="What a bare function computes.")] = None,
    array: Annotated[str | None, typer.Option(help="numpy or torch, for a bare function.")] = None,
    device: Annotated[str | None, typer.Option(help="Only kernels of cpu or cuda.")] = None,
    backend: Annotated[str | None, typer.Option(help="Only kernels of this backend.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only these dtypes.")] = None,
    law: Annotated[list[str] | None, typer.Option(help="Only these laws.")] = None,
    profile: Annotated[str, typer.Option(help="smoke, ci or thorough")] = "ci",
    cases: Annotated[Path, typer.Option(help="Counterexamples: read first, written to.")] = CASES,
    timeout: Annotated[float, typer.Option(help="Seconds a law may take in its process.")] = 300.0,
    json_file: JsonFile = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.")] = None,
) -> None:
    """Certify kernels. Exit status 0 if every claimed case passes, 1 if not, 2 for wrong usage."""
    try:
        chosen = registry.select(load_kernels(kernel, operation, array), select or [])
        if profile not in PROFILES:
            raise ValueError(f"--profile: got {profile!r}, expected one of {', '.join(PROFILES)}")
    except (ValueError, TypeError) as error:
        raise usage_error(str(error)) from None
    chosen = [k for k in chosen if device in (None, k.device) and backend in (None, k.backend)]
    if not chosen:
        raise usage_error("no kernel is left after --device and --backend")
    signal.signal(signal.SIGTERM, _interrupt)
    with _progress() as progress:
        bar = progress.add_task("", total=None)

        def advance(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=what)

        report = certify(
            chosen,
            profile=profile,
            dtypes=dtype,
            laws=law,
            cases=cases,
            timeout=timeout,
            progress=advance,
        )
    from attnspec.conformance.export import save_html, save_junit
    from attnspec.conformance.terminal import show_report

    if json_file:
        report.save_json(json_file)
    if junit:
        save_junit(report, junit)
    if html:
        save_html(report, html)
    show_report(report, console)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def replay(
    case: Annotated[Path, typer.Argument(help="A counterexample's JSON file.", exists=True)],
    kernel: Annotated[str | None, typer.Option(help="package.module:attribute")] = None,
) -> None:
    """Run one counterexample again. Exit status 0 if it passes now, 1 if it still fails."""
    from attnspec.conformance.terminal import show_failure

    try:
        saved = SavedCase.load(case)
        pool = load_kernels(kernel, None, None) + [m.kernel for m in all_mutants()]
        found = [k for k in pool if k.name == saved.kernel]
        found = [k for k in found if k.operation == saved.case.operation]
        if not found:
            raise ValueError(f"replay: no kernel is called {saved.kernel!r}; give --kernel")
    except (ValueError, TypeError, KeyError) as error:
        raise usage_error(str(error)) from None
    failure = replay_case(found[0], saved)
    if failure is None:
        console.print(f"passes now: {saved.case}", style="green", highlight=False)
        return
    show_failure(failure, console, replay_hint=False)
    raise typer.Exit(1)


@app.command()
def mutants(
    select: Select = None,
    matrix: Annotated[bool, typer.Option(help="Try every law, not only the claiming one.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Prove the suite: every wrong kernel must be caught. Exit status 1 if one survives."""
    wanted = select or []
    chosen = [
        m
        for m in all_mutants()
        if not wanted or {m.name, m.operation, m.operation.partition(".")[0]} & set(wanted)
    ]
    if not chosen:
        raise usage_error(f"select: got {wanted}, which no mutant matches")
    with _progress() as progress:
        bar = progress.add_task("", total=len(chosen))
        kills = kill_all(
            chosen,
            every_law=matrix,
            progress=lambda m: progress.update(bar, advance=1, description=m.name),
        )
    survivors = [kill for kill in kills if kill.survived]
    write_json(
        json_file,
        {"mutants": [kill.to_dict() for kill in kills], "survivors": len(survivors)},
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("mutant", "claimed by", "caught by", "bug"):
        table.add_column(name)
    for kill in kills:
        state = "survives" if kill.survived else (kill.mutant.equivalent and "equivalent")
        caught = ", ".join(kill.killers) or state
        table.add_row(kill.mutant.name, kill.mutant.law, caught, kill.mutant.bug)
    console.print(table)
    console.print(
        f"{len(kills)} mutants, {len(survivors)} survive",
        style="bold red" if survivors else "green",
    )
    raise typer.Exit(1 if survivors else 0)


@app.command()
def bench(
    select: Select = None,
    against: Annotated[str | None, typer.Option(help="Rivals, comma separated.")] = None,
    device: Annotated[str | None, typer.Option(help="Only benchmarks of cpu or cuda.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure kernels beside their rivals. A kernel that is not right gets no number (exit 1)."""
    from attnspec.conformance.bench import benchmarks, run_benchmarks
    from attnspec.conformance.terminal import show_benchmarks

    wanted = select or []
    chosen = [
        b
        for b in benchmarks()
        if device in (None, b.device)
        and (not wanted or {b.name, b.operation, b.operation.partition(".")[0]} & set(wanted))
    ]
    if not chosen:
        raise usage_error(f"select: got {wanted}, which no benchmark of this device matches")
    with _progress() as progress:
        bar = progress.add_task("", total=None)
        result = run_benchmarks(
            chosen,
            registry.registered_kernels(),
            against=against.split(",") if against else None,
            progress=lambda what: progress.update(bar, advance=1, description=what),
        )
    write_json(json_file, result)
    show_benchmarks(result, console)
    raise typer.Exit(1 if any("timing" not in row for row in result["results"]) else 0)


@app.command("new-kernel")
def new_kernel(
    operation: Annotated[str, typer.Argument(help="mechanism.operation")],
    path: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "kernel.py"
    ),
) -> None:
    """Write a commented kernel to start from; it already runs under ``attnspec conform``."""
    from attnspec.conformance.new_kernel import write_kernel

    try:
        write_kernel(operation, path)
    except (ValueError, FileExistsError) as error:
        raise usage_error(str(error)) from None
    console.print(f"wrote {path}; certify it: attnspec conform --kernel {path.stem}:KERNEL")


def _interrupt(number: int, frame: Any) -> None:
    """A terminated run ends like an interrupted one: with the report it has."""
    raise KeyboardInterrupt


def _progress() -> Progress:
    return Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )


def main() -> None:
    """Entry point of the ``attnspec`` command."""
    app()


if __name__ == "__main__":
    main()
