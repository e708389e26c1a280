"""Laws of what lies outside: wrong inputs, undeclared cells and stated limits must be refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from attnspec.conformance.arrays import place_arguments
from attnspec.conformance.contract import BadValue, Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Refused, Trial
from attnspec.conformance.violation import Violation
from attnspec.reference import find_mechanism
from attnspec.reference.spec import HEADS, PADDINGS, PATTERNS

CELLS = (*PATTERNS, *PADDINGS, *HEADS)


def comfortable(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=())


def declared_cells(contract: Contract) -> set[str]:
    """The cells of the coverage matrix that the mechanism declares."""
    coverage = find_mechanism(contract.operation.partition(".")[0]).coverage
    return {*coverage.patterns, *coverage.paddings, *coverage.heads}


def check_cells(trial: Trial) -> None:
    """A declared cell agrees with the reference, an undeclared one raises."""
    declared = declared_cells(trial.contract)
    for cell, move in trial.contract.cells.items():
        if cell in PADDINGS and cell not in declared and not trial.kernel.reads_values:
            continue
        case = move(trial.case)
        moved = Trial(trial.kernel, trial.contract, case, trial.used)
        inside = cell in declared and trial.kernel.supports("cell", cell)
        inside = inside and all(trial.kernel.supports(a, n) for a, n in case.sizes.items())
        inside = inside and all(trial.kernel.supports(o, True) for o in case.options)
        try:
            if inside:
                moved.check()
            else:
                _must_refuse(moved, moved.arguments(), f"the undeclared cell '{cell}'", None)
        except Violation as violation:
            violation.message += f" (cell '{cell}')"
            raise


def check_refusals(trial: Trial) -> None:
    """Every wrong call raises TypeError or ValueError and names the argument (K14)."""
    arguments = trial.arguments()
    for what, name, value, hidden in wrong_calls(trial.contract, arguments):
        hidden = hidden or _differs_in_values(_right(trial, arguments, name), value)
        if hidden and not trial.kernel.reads_values:
            continue
        _must_refuse(trial, {**arguments, name: value}, what, name)


def _right(trial: Trial, arguments: dict[str, Any], name: str) -> Any:
    """A good value of an argument, also of one that the case leaves out."""
    arrays = {array.name: array for array in trial.contract.arrays}
    if arguments.get(name) is None and name in arrays:
        return arrays[name].data(trial.case)
    return arguments.get(name)


def _differs_in_values(right: Any, wrong: Any) -> bool:
    """Whether only what an array holds is wrong, not its shape or dtype."""
    if isinstance(right, tuple) and isinstance(wrong, tuple) and len(right) == len(wrong):
        pairs = [(a, b) for a, b in zip(right, wrong, strict=True) if a is not b]
        return all(_same_kind(a, b) for a, b in pairs)
    return _same_kind(right, wrong)


def _same_kind(right: Any, wrong: Any) -> bool:
    """Two arrays of one shape and dtype, or a wrong one full of NaN."""
    if not (isinstance(right, np.ndarray) and isinstance(wrong, np.ndarray)):
        return False
    same = (right.shape, right.dtype) == (wrong.shape, wrong.dtype)
    return same or (wrong.dtype.kind == "f" and bool(np.isnan(wrong).any()))


def wrong_calls(
    contract: Contract, arguments: dict[str, Any]
) -> Iterator[tuple[str, str, Any, bool]]:
    """(what is wrong, which argument, its wrong value, is it a `BadValue`), from good ones."""
    for array in contract.arrays:
        value = arguments.get(array.name)
        if array.optional or array.make is not None or not isinstance(value, np.ndarray):
            continue
        yield f"a list as {array.name}", array.name, value.tolist(), False
        yield f"None as {array.name}", array.name, None, False
        if value.dtype.kind == "f":
            yield f"integers as {array.name}", array.name, np.zeros(value.shape, np.int64), False
            yield f"complex as {array.name}", array.name, value.astype(np.complex64), False
        yield f"a number as {array.name}", array.name, np.zeros((), value.dtype), False
    for bad in contract.bad_inputs:
        what, name, change = bad
        yield what, name, change(dict(arguments)), isinstance(bad, BadValue)


def _must_refuse(trial: Trial, arguments: dict[str, Any], what: str, name: str | None) -> None:
    placed = place_arguments(trial.kernel.arrays, arguments, "contiguous", trial.case.dtype)
    try:
        trial.contract.call(trial.kernel.call, placed)
    except (TypeError, ValueError) as error:
        # A message of a thousand characters is a traceback from the depths, not a refusal.
        if name is not None and name not in str(error):
            raise Violation(
                trial.contract.operation, f"{what}: the message does not name it: {error}"
            ) from None
        return
    except Exception as error:
        raise Violation(
            trial.contract.operation, f"{what}: raised {type(error).__name__}: {error}"
        ) from None
    raise Violation(trial.contract.operation, f"{what}: accepted, expected TypeError or ValueError")


def check_outside(trial: Trial) -> None:
    """A case just outside a stated limit raises instead of computing something."""
    for axis, allowed in trial.kernel.limits.items():
        if axis not in trial.contract.sizes:
            continue
        low, high = trial.contract.sizes[axis]
        outside = [n for n in (*range(low, high + 1), 7, 48, 300, 513) if n not in allowed and n]
        if not outside:
            continue
        case = trial.case.with_(sizes={axis: outside[0]})
        moved = Trial(trial.kernel, trial.contract, case, trial.used)
        try:
            moved.run(moved.arguments())
        except Refused:
            continue
        raise Violation(
            trial.contract.operation, f"{axis}={outside[0]} is outside its limits but was computed"
        )


LAWS = (
    Law(
        "cells",
        "Declared cells of the coverage matrix are right, undeclared ones are refused.",
        ("K14",),
        comfortable,
        check_cells,
        applies=lambda contract, kernel: bool(contract.cells),
        examples=0.1,
    ),
    Law(
        "refusal",
        "Wrong input raises TypeError or ValueError naming the argument.",
        ("K14",),
        comfortable,
        check_refusals,
        examples=0.03,
    ),
    Law(
        "limits",
        "What lies outside a stated limit is refused.",
        ("K14",),
        comfortable,
        check_outside,
        applies=lambda contract, kernel: bool(set(kernel.limits) & contract.axes()),
        examples=0.05,
    ),
)
