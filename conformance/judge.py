"""The judge: truth, budgets derived from rounded runs, verdicts row by row.

Truth is the reference in float64 on the kernel's own rounded inputs. The budget of a row is what
rounded runs of the same reference lose on it, times `HEADROOM`, plus a few units in the last place
of the output's dtype. Nothing here knows which mechanism it judges, and no test has a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from attnspec.conformance.arrays import flatten, ragged
from attnspec.conformance.contract import Output
from attnspec.conformance.dtypes import EPS, TINY, accumulator, round_to
from attnspec.conformance.rounding import Rounded, rounded_arithmetic
from attnspec.conformance.violation import Violation

HEADROOM = 4.0
"""How much worse than the worst rounded run a kernel may be: one constant for the whole suite."""

ULPS = 4.0
"""Units in the last place of the output dtype that any row may be off by."""

RUNS = 4
"""Rounded runs a budget is taken from."""

CANCELLING_RUNS = 16
"""As many where errors cancel, and a few runs may show none by luck."""

CONFIRMING_RUNS = 32
"""As many before a kernel is found wrong: a few runs may have been lucky on the row in question."""

Norms = tuple[np.ndarray, np.ndarray]
"""Root mean square and largest entry of each row."""

Spread = dict[str, Norms]


@dataclass(frozen=True)
class Expectation:
    """Truth of some outputs and the spread of the rounded runs around it.

    `measure` makes those runs when it is first called: an output without an error needs none.
    `confirm` gives the same spread with less luck in it, from more runs.
    """

    truth: dict[str, np.ndarray]
    measure: Callable[[], Spread] = dict
    confirm: Callable[[], Spread] | None = None

    @property
    def spread(self) -> Spread:
        return self.measure()


def out_dtype(output: Output, dtype: str) -> str:
    """The dtype an output must have from a kernel of `dtype`; float64 kernels widen float32."""
    if output.dtype == "input":
        return dtype
    return accumulator(dtype) if output.dtype == "float32" else output.dtype


def expect(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    outputs: tuple[Output, ...],
    dtype: str,
    form: Callable[..., Any] | None = None,
) -> Expectation:
    """Truth and spread of ``function(**arguments)`` for a kernel of `dtype`.

    `form` is an equal function that rounded runs execute as well (see `Contract.form`).
    """
    forms = [function] if form is None else [function, form]
    truth = truth_of(function, arguments, outputs)
    judged = [output for output in outputs if output.kind == "value"]
    if not judged:
        return Expectation(truth)
    runs = CANCELLING_RUNS if any(output.cancels for output in judged) else RUNS

    together = runs * len(forms)
    seen: dict[str, list[Norms]] = {o.name: [] for o in judged}

    @cache
    def spread(total: int) -> Spread:
        begun = len(seen[judged[0].name])
        for seed in range(begun, total * len(forms)):
            errors = _errors(forms, arguments, outputs, dtype, truth, seed)
            for o in judged:
                seen[o.name].append(_row_norms(errors[o.name], o.row_axes))
        return {
            o.name: _spread(seen[o.name][: total * len(forms)], together, truth[o.name], o.row_axes)
            for o in judged
        }

    return Expectation(truth, lambda: spread(runs), lambda: spread(CONFIRMING_RUNS))


def _errors(
    forms: list[Callable[..., Any]],
    arguments: Mapping[str, Any],
    outputs: tuple[Output, ...],
    dtype: str,
    truth: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, np.ndarray]:
    """How far one rounded run is from the truth: the forms take turns, and so do the models."""
    run, number = divmod(seed, len(forms))
    with rounded_arithmetic(dtype, seed, alike=run % 2 == 1), np.errstate(all="ignore"):
        results = flatten(forms[number](**_wrap(arguments)))
    errors = {}
    for output, result in zip(outputs, results, strict=True):
        if output.kind == "value":
            plain = np.asarray(result).view(np.ndarray)
            rounded = round_to(plain, out_dtype(output, dtype)).astype(np.float64)
            error = _difference(rounded, truth[output.name], output.nan)
            errors[output.name] = np.where(np.isnan(error), np.inf, error)
    return errors


def truth_of(
    function: Callable[..., Any], arguments: Mapping[str, Any], outputs: tuple[Output, ...]
) -> dict[str, np.ndarray]:
    """What ``function(**arguments)`` returns in float64, by output name."""
    results = zip((o.name for o in outputs), flatten(function(**arguments)), strict=True)
    return {name: _to_float64(value) for name, value in results}


def _spread(
    norms: list[Norms], together: int, truth: np.ndarray, row_axes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Worst root mean square and worst entry of each row over the runs, never below the median.

    Of more than `together` runs it is the mean over groups of so many: as large, only less a matter
    of luck. One lucky run must not make a row impossible: the median over rows is the floor. A row
    of zeros that every run gets right has no spread at all (K4). A row that overflows in a run, as
    it would in an honest kernel, has an infinite one.
    """
    zero = np.all(truth == 0, axis=-1) if row_axes else False
    floored = []
    for runs in map(np.stack, zip(*norms, strict=True)):
        groups = runs.reshape(len(runs) // together, together, *runs.shape[1:])
        values = groups.max(axis=1).mean(axis=0)
        finite = values[np.isfinite(values)]
        typical = np.median(finite) if finite.size else 0.0
        floored.append(np.where(zero & (values == 0), 0.0, np.maximum(values, typical)))
    return floored[0], floored[1]


def _row_norms(errors: np.ndarray, row_axes: int) -> Norms:
    size = np.abs(errors)
    if row_axes == 0:
        return size, size
    if size.shape[-1] == 0:
        empty = np.zeros(size.shape[:-1])
        return empty, empty
    return np.sqrt(np.mean(size**2, axis=-1)), size.max(axis=-1)


def _difference(got: np.ndarray, truth: np.ndarray, nan: bool) -> np.ndarray:
    """|got - truth| with equal infinities counted as equal, and NaN as well if it may be there."""
    same = (got == truth) | (nan & np.isnan(got) & np.isnan(truth))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.abs(got - truth))


def compare(
    got: np.ndarray, expectation: Expectation, output: Output, dtype: str
) -> tuple[float, Violation | None]:
    """How much of the budget the worst row uses, and the violation if that is more than all.

    `dtype` is the kernel's. Rows of exact zeros must be exactly 0 (K4).
    """
    truth = expectation.truth[output.name]
    if got.shape != truth.shape:
        return np.inf, Violation(output.name, f"shape {got.shape}, expected {truth.shape}")
    if output.kind != "value":
        both_nan = np.isnan(got) & np.isnan(truth)
        wrong = np.argwhere((got != truth) & ~both_nan)
        if not len(wrong):
            return 0.0, None
        place = tuple(int(i) for i in wrong[0])
        numbers = float(truth[place]), float(got[place])
        return np.inf, Violation(output.name, f"{len(wrong)} entries differ", place, *numbers)
    if not truth.size:
        return 0.0, None
    kind = out_dtype(output, dtype)
    error = _difference(got, truth, output.nan)
    if not error.any():
        return 0.0, None
    error_rms, error_top = _row_norms(error, output.row_axes)
    truth_rms, truth_top = _row_norms(np.where(np.isfinite(truth), truth, 0.0), output.row_axes)
    spread_rms, spread_top = expectation.spread[output.name]
    floor = np.where(truth_top == 0, 0.0, TINY[kind])
    ratio = np.zeros_like(error_rms)
    budgets = []
    for measured, spread, size in (
        (error_rms, spread_rms, truth_rms),
        (error_top, spread_top, truth_top),
    ):
        budget = HEADROOM * spread + ULPS * (EPS[kind] * size + floor)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where((measured == 0) | np.isinf(budget), 0.0, measured / budget)
        ratio = np.maximum(ratio, np.where(np.isnan(share), np.inf, share))
        budgets.append(budget)
    worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    used = float(ratio[worst])
    if used <= 1.0:
        return used, None
    place = _worst_entry(error, worst, output.row_axes)
    return used, Violation(
        output.name,
        "wrong value" if np.isfinite(got[place]) or np.isinf(truth[place]) else "not finite",
        place,
        float(truth[place]),
        float(got[place]),
        float(error_rms[worst]),
        float(budgets[0][worst]),
    )


def _worst_entry(error: np.ndarray, row: tuple[Any, ...], row_axes: int) -> tuple[int, ...]:
    place = tuple(int(i) for i in row)
    if row_axes:
        place += (int(np.argmax(np.nan_to_num(error[row], nan=np.inf, posinf=np.inf))),)
    return place


def _to_float64(value: Any) -> np.ndarray:
    array = ragged(value) if isinstance(value, list) else np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _wrap(arguments: Mapping[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: convert(item) for name, item in value.items()}
        if isinstance(value, tuple):
            items = [convert(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return Rounded.wrap(value) if isinstance(value, np.ndarray) else value

    return {name: convert(value) for name, value in arguments.items()}
