"""Certify kernels: plan the tasks, run them one by one or side by side, put together a report."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path

from attnspec.conformance.contract import find_contract
from attnspec.conformance.isolate import Child, run_side_by_side
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws import laws
from attnspec.conformance.report import Report, Result
from attnspec.conformance.runner import PROFILES, Profile, Task, check_case, plan, run_task
from attnspec.conformance.saved import SavedCase, load_case, load_cases
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation

Numbered = Generator[tuple[int, Result], None, None]


def certify(
    kernel: Kernel | Sequence[Kernel],
    *,
    profile: str | Profile = "ci",
    dtypes: Sequence[str] | None = None,
    laws: Sequence[str] | None = None,
    cases: str | Path | None = None,
    isolate: bool | None = None,
    jobs: int = 1,
    timeout: float = 120.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Certify one kernel, or several, against the reference.

    profile: "smoke", "ci" or "thorough". cases: folder of counterexamples, replayed first and
    written to; `StaleCase` if one of these kernels' no longer fits. isolate: run in a child process
    with `timeout` seconds a law, so that a crash or a hang is a result; by default only for CUDA
    kernels. jobs: so many such processes at a time; with more than one, every kernel runs in one,
    and must be one that pickle can send there. Returns a `Report`; an interrupted run returns what
    it has.
    """
    kernels = [kernel] if isinstance(kernel, Kernel) else list(kernel)
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ValueError(f"profile: got {profile!r}, expected one of {tuple(PROFILES)}")
        profile = PROFILES[profile]
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs: got {jobs!r}, expected an integer >= 1")
    if jobs > 1 and isolate is False:
        raise ValueError(f"isolate: got False with {jobs} jobs, which are processes of their own")
    tasks = plan(kernels, dtypes, laws)
    folder = Path(cases) if cases is not None else None
    saved = load_cases(folder, kernels) if folder else []
    if jobs > 1:
        numbered = _side_by_side(tasks, kernels, profile, saved, jobs, timeout)
    else:
        numbered = _in_order(tasks, kernels, profile, saved, isolate, timeout)
    results: dict[int, Result] = {}
    report = Report(profile=profile.name)
    try:
        if progress and tasks:
            progress(0, len(tasks), str(tasks[0]))
        for number, result in numbered:
            results[number] = result
            if progress:
                progress(len(results), len(tasks), str(tasks[number]))
            if result.failure is not None and folder is not None:
                result.failure.save(folder)
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        numbered.close()
    for number in sorted(results):
        report.add(results[number])
    for result in unexpected_passes(kernels):
        report.add(result)
    return report


def _in_order(
    tasks: Sequence[Task],
    kernels: Sequence[Kernel],
    profile: Profile,
    saved: Sequence[SavedCase],
    isolate: bool | None,
    timeout: float,
) -> Numbered:
    child = Child(kernels, profile, saved)
    try:
        for number, task in enumerate(tasks):
            alone = task.kernel.device == "cuda" if isolate is None else isolate
            if alone:
                yield number, child.run(task, timeout)
            else:
                yield number, run_task(task, profile, saved)
    finally:
        child.close()


def _side_by_side(
    tasks: Sequence[Task],
    kernels: Sequence[Kernel],
    profile: Profile,
    saved: Sequence[SavedCase],
    jobs: int,
    timeout: float,
) -> Numbered:
    """Tasks of a kernel and dtype stay in one process: they share compilations and truths."""
    groups: dict[tuple[int, str], list[tuple[int, Task]]] = {}
    for number, task in enumerate(tasks):
        groups.setdefault((id(task.kernel), task.dtype), []).append((number, task))
    make_child = partial(Child, kernels, profile, saved)
    return run_side_by_side(list(groups.values()), make_child, jobs, timeout)


def unexpected_passes(kernels: Iterable[Kernel]) -> list[Result]:
    """Known failures whose witness case passes by now: the entry must go."""
    results = []
    for kernel in kernels:
        for known in kernel.known:
            saved = load_case(Path(known.witness))
            if known.quarantine:
                continue
            trial = Trial(kernel, find_contract(kernel.operation), saved.case)
            try:
                check_case(laws()[known.law], trial)
            except Violation:
                continue
            results.append(
                Result(kernel.name, kernel.operation, known.law, saved.case.dtype,
                       "unexpected pass", 1, 0.0, {}, None, note=known.issue)
            )  # fmt: skip
    return results
