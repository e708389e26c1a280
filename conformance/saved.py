"""Saved counterexamples: read from disk, and held against the contracts and laws of today."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attnspec.conformance.case import SavedCase
from attnspec.conformance.contract import find_contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws import laws


class StaleCase(ValueError):
    """A file that is no counterexample, or one that no longer fits its operation."""


def load_case(path: Path) -> SavedCase:
    """The counterexample in a file; `StaleCase` says why it cannot be run."""
    saved = _read(path)
    try:
        check_fits(saved)
    except ValueError as error:
        raise StaleCase(f"{path}: {error}; bring the file up to date or delete it") from None
    return saved


def load_cases(folder: Path, kernels: Iterable[Kernel]) -> list[SavedCase]:
    """The counterexamples below `folder` that are about one of `kernels`."""
    wanted = {(kernel.name, kernel.operation) for kernel in kernels}
    found = []
    for path in sorted(folder.glob("*.json")):
        saved = _read(path)
        if (saved.kernel, saved.case.operation) in wanted:
            found.append(load_case(path))
    return found


def check_fits(saved: SavedCase) -> None:
    """ValueError if the case misses or has what its operation or its law does not know (any more).

    The arguments are built once, because only that shows that they can be.
    """
    case, contract = saved.case, find_contract(saved.case.operation)
    if saved.law not in laws():
        raise ValueError(f"law: got {saved.law!r}, expected one of: {', '.join(sorted(laws()))}")
    missing = sorted(set(contract.sizes) - set(case.sizes))
    if missing:
        raise ValueError(
            f"sizes: got {_listed(case.sizes)}, expected also {_listed(missing)}, which "
            f"{case.operation} has"
        )
    for field, given, known in (
        ("parameters", case.parameters, contract.spec.signature.parameters),
        ("options", case.options, contract.optional),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"{field}: got {_listed(unknown)}, expected some of: {_listed(known)}, which "
                f"{case.operation} has"
            )
    try:
        contract.arguments(case)
    except Exception as error:
        raise ValueError(
            f"case: no arguments of {case.operation} can be made of it "
            f"({type(error).__name__}: {error})"
        ) from error


def _read(path: Path) -> SavedCase:
    try:
        return SavedCase.load(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StaleCase(
            f"{path}: got {type(error).__name__}: {error}, expected a counterexample that "
            "attnspec conform has written"
        ) from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
