"""The command line: ``attnspec``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

try:
    import hypothesis  # noqa: F401
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:  # pragma: no cover
    sys.exit(f'attnspec: {missing.name} is not installed; pip install "attnspec[conformance]"')

from attnspec.conformance import listing, registry
from attnspec.conformance.bench.commands import bench, tune
from attnspec.conformance.certification import certify
from attnspec.conformance.console import (
    Jobs,
    JsonFile,
    Select,
    console,
    tell,
    usage_error,
    write_json,
)
from attnspec.conformance.contract import find_contract
from attnspec.conformance.dtypes import DTYPES
from attnspec.conformance.killing import Kill, kill_all
from attnspec.conformance.laws import laws
from attnspec.conformance.mutants import mutants as all_mutants
from attnspec.conformance.runner import PROFILES, plan
from attnspec.conformance.runner import replay as replay_case
from attnspec.conformance.saved import StaleCase, load_case
from attnspec.conformance.terminal import progress, show_failure, show_kills, show_report
from attnspec.reference import find_mechanism

app = typer.Typer(
    help="The spec of long-context attention, and the suite that certifies kernels against it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
CASES = Path("build/counterexamples")


def _check_choice(option: str, given: Iterable[str] | None, known: Iterable[str]) -> None:
    for name in given or ():
        if name not in known:
            raise ValueError(f"{option}: got {name!r}, expected one of: {', '.join(known)}")


@app.command("list")
def list_command(json_file: JsonFile = None) -> None:
    """Every mechanism with its operations, kernels and mutants."""
    try:
        kernels = registry.registered_kernels()
    except registry.Unavailable as error:
        kernels = []
        tell(f"no kernels: {error}", "yellow")
    rows = listing.mechanism_rows(kernels, all_mutants())
    write_json(json_file, {"mechanisms": rows})
    listing.show_mechanisms(rows, console)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A mechanism or an operation.")]) -> None:
    """A mechanism's definition, or an operation's signature, parameters and laws."""
    try:
        slug, dot, _ = name.partition(".")
        if dot:
            listing.show_operation(find_contract(name), console)
        else:
            listing.show_chapter(find_mechanism(slug), console)
    except ValueError as error:
        raise usage_error(str(error)) from None


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
    jobs: Jobs = 1,
    timeout: Annotated[float, typer.Option(help="Seconds a law may take in its process.")] = 300.0,
    json_file: JsonFile = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.")] = None,
) -> None:
    """Certify kernels. Exit status 0 if every claimed case passes, 1 if not, 2 for wrong usage."""
    try:
        chosen = registry.select(registry.load_kernels(kernel, operation, array), select or [])
        _check_choice("--profile", [profile], PROFILES)
        _check_choice("--law", law, laws())
        _check_choice("--dtype", dtype, DTYPES)
    except (ValueError, TypeError) as error:
        raise usage_error(str(error)) from None
    chosen = [k for k in chosen if device in (None, k.device) and backend in (None, k.backend)]
    if not plan(chosen, dtype, law):
        raise usage_error("no kernel is left after --device, --backend, --dtype and --law")
    signal.signal(signal.SIGTERM, _interrupt)
    with progress() as advance:
        try:
            report = certify(
                chosen,
                profile=profile,
                dtypes=dtype,
                laws=law,
                cases=cases,
                jobs=jobs,
                timeout=timeout,
                progress=advance,
            )
        except StaleCase as error:
            raise usage_error(str(error)) from None
    from attnspec.conformance.export import save_html, save_junit

    if json_file:
        report.save_json(json_file)
    if junit:
        save_junit(report, junit)
    if html:
        save_html(report, html)
    options = f" --kernel {kernel}" if kernel else ""
    show_report(report, console, options + (f" --array {array}" if array else ""))
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def replay(
    case: Annotated[Path, typer.Argument(help="A counterexample's JSON file.", exists=True)],
    kernel: Annotated[str | None, typer.Option(help="package.module:attribute")] = None,
    array: Annotated[str | None, typer.Option(help="numpy or torch, for a bare function.")] = None,
) -> None:
    """Run one counterexample again. Exit status 0 if it passes now, 1 if it still fails."""
    try:
        saved = load_case(case)
        operation = saved.case.operation
        pool = [m.kernel for m in all_mutants()]
        if kernel or not any(k.name == saved.kernel for k in pool):
            pool = registry.load_kernels(kernel, operation if array else None, array)
        found = [k for k in pool if (k.name, k.operation) == (saved.kernel, operation)]
        if not found:
            raise ValueError(
                f"--kernel: got {kernel or 'nothing'}, expected where the kernel {saved.kernel!r} "
                f"of {operation} is: package.module:attribute"
            )
    except registry.Unavailable as error:
        raise usage_error(
            f"--kernel: got nothing, expected where {saved.kernel!r} is: package.module:attribute; "
            f"registered kernels: {error}"
        ) from None
    except (ValueError, TypeError) as error:
        raise usage_error(str(error)) from None
    failure = replay_case(found[0], saved)
    if failure is None:
        console.print(f"passes now: {saved.case}", style="green", highlight=False)
        return
    show_failure(failure, console)
    raise typer.Exit(1)


@app.command()
def mutants(
    select: Select = None,
    matrix: Annotated[bool, typer.Option(help="Try every law, not only the claiming one.")] = False,
    jobs: Jobs = 1,
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
    with progress() as advance:
        kills: list[Kill] = []
        try:
            for kill in kill_all(chosen, matrix, jobs):
                kills.append(kill)
                advance(len(kills), len(chosen), kill.mutant.name)
        except KeyboardInterrupt:
            tell(f"interrupted after {len(kills)} of {len(chosen)} mutants", "yellow")
    survivors = [kill for kill in kills if kill.survived]
    record = {"mutants": [kill.to_dict() for kill in kills], "survivors": len(survivors)}
    write_json(json_file, record)
    show_kills(kills, console)
    console.print(
        f"{len(kills)} mutants, {len(survivors)} survive",
        style="bold red" if survivors else "green",
    )
    raise typer.Exit(1 if survivors or len(kills) < len(chosen) else 0)


app.command()(bench)
app.command()(tune)


@app.command("new-kernel")
def new_kernel(
    operation: Annotated[str, typer.Argument(help="mechanism.operation")],
    path: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "kernel.py"
    ),
) -> None:
    """Write a commented kernel to start from; attnspec conform already passes it."""
    from attnspec.conformance.new_kernel import write_kernel

    try:
        write_kernel(operation, path)
    except (ValueError, OSError) as error:
        raise usage_error(str(error)) from None
    place = "" if path.parent == Path() else f" in {path.parent}"
    command = f"attnspec conform --kernel {path.stem}:KERNEL"
    console.print(f"wrote {path}; certify it{place}: {command}", soft_wrap=True)


def _interrupt(number: int, frame: Any) -> None:
    """A terminated run ends like an interrupted one: with the report it has."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the ``attnspec`` command. Kernels are found from the current folder too."""
    sys.path.insert(0, "")
    app()


if __name__ == "__main__":
    main()
