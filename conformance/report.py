"""The outcome of a run: results by law, and failures a person can act on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from attnspec.conformance.case import Case, SavedCase
from attnspec.conformance.violation import Violation


@dataclass(frozen=True)
class Failure:
    """The smallest counterexample to a law: `when` says in a sentence what it takes."""

    kernel: str
    operation: str
    law: str
    promise: str
    case: Case
    violation: Violation
    when: str
    path: str = ""

    @property
    def stage(self) -> str:
        return self.violation.stage

    @property
    def coordinate(self) -> tuple[int, ...] | None:
        return self.violation.coordinate

    def save(self, folder: Path) -> Path:
        """Write the case below `folder`; ``attnspec replay`` takes the file."""
        saved = SavedCase(
            self.kernel, self.law, self.case, str(self.violation), metadata.version("attnspec")
        )
        path = saved.save(folder)
        object.__setattr__(self, "path", str(path))
        return path

    def __str__(self) -> str:
        return (
            f"{self.kernel} breaks '{self.law}' ({self.when}): {self.violation}; case: {self.case}"
        )

    def to_dict(self) -> dict[str, Any]:
        violation = self.violation
        return {
            "stage": violation.stage,
            "message": violation.message,
            "coordinate": violation.coordinate,
            "expected": violation.expected,
            "got": violation.got,
            "error": violation.error,
            "budget": violation.budget,
            "when": self.when,
            "promise": self.promise,
            "case": json.loads(self.case.to_json()),
            "path": self.path,
        }


@dataclass(frozen=True)
class Result:
    """One law on one kernel in one dtype.

    verdict: "pass", "fail", "known" (a listed failure), "unexpected pass" (a listed failure that is
    gone) or "crash". `used` is the share of the error budget the worst row took, by stage.
    """

    kernel: str
    operation: str
    law: str
    dtype: str
    verdict: str
    cases: int
    seconds: float
    used: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict in ("pass", "known")

    def to_dict(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "operation": self.operation,
            "law": self.law,
            "dtype": self.dtype,
            "verdict": self.verdict,
            "cases": self.cases,
            "seconds": round(self.seconds, 3),
            "budget_used": {name: round(share, 4) for name, share in self.used.items()},
            "failure": self.failure.to_dict() if self.failure else None,
            "note": self.note,
        }


def environment() -> dict[str, str]:
    """Versions and hardware a result depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("attnspec", "numpy", "hypothesis", "torch", "triton", "numba"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["cores"] = str(os.cpu_count())
    return found


@dataclass
class Report:
    """Results so far; `passed` only if something ran, all of it passed and none was cut short."""

    profile: str
    results: list[Result] = field(default_factory=list)
    interrupted: bool = False

    def add(self, result: Result) -> None:
        self.results.append(result)

    @property
    def failures(self) -> list[Failure]:
        return [result.failure for result in self.results if result.failure and not result.passed]

    @property
    def passed(self) -> bool:
        ran = any(result.cases for result in self.results)
        return ran and not self.interrupted and all(result.passed for result in self.results)

    def kernels(self) -> dict[tuple[str, str], list[Result]]:
        """Results by (kernel, operation), in order."""
        grouped: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            grouped.setdefault((result.kernel, result.operation), []).append(result)
        return grouped

    def headroom(self, results: list[Result]) -> float:
        """The largest share of a budget that `results` used."""
        return max((share for r in results for share in r.used.values()), default=0.0)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "interrupted": self.interrupted,
            "profile": self.profile,
            "environment": environment(),
            "summary": {
                "kernels": len(self.kernels()),
                "cases": sum(result.cases for result in self.results),
                "failed": sum(not result.passed for result in self.results),
            },
            "results": [result.to_dict() for result in self.results],
        }

    def save_json(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
