"""Laws of sequences laid end to end: each is what it is alone, and goes on from its state."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.arrays import place_arguments
from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial


def several(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    axes = {"sequences": st.integers(2, 4)}
    return draw_case(contract, kernel, dtype, axes=axes, cross=True)


def check_alone(trial: Trial) -> None:
    """Each sequence gives what it gives alone, among others of NaN and with states of NaN."""
    arguments = trial.arguments()
    for n in range(trial.case.sizes["sequences"]):
        among, alone, rows = _apart(trial.contract, arguments, n)
        got = trial.run(among)
        for output in trial.contract.outputs:
            behind = [slice(None)] * output.row_axes
            cut: Any = (..., rows, *behind) if output.by_query else slice(n, n + 1)
            got[output.name] = got[output.name][cut]
        trial.judge(got, alone)


def _apart(
    contract: Contract, arguments: Mapping[str, Any], n: int
) -> tuple[dict[str, Any], dict[str, Any], slice]:
    """The arguments with sequence n among spoilt ones, those of n alone, and its queries' rows."""
    packed = contract.packed
    assert packed is not None
    among, alone, rows = dict(arguments), dict(arguments), []
    for offsets, axes in packed.tokens.items():
        own = slice(int(arguments[offsets][n]), int(arguments[offsets][n + 1]))
        alone[offsets] = np.array([0, own.stop - own.start])
        rows.append(own)
        for name, axis in axes.items():
            place = (..., own, *[slice(None)] * (-axis - 1))
            others = packed.fill.get(name, np.nan)
            among[name], alone[name] = _cut_out(arguments[name], place, place, others)
    for name in packed.states:
        if arguments.get(name) is not None:
            others = packed.fill.get(name, np.nan)
            among[name], alone[name] = _cut_out(arguments[name], n, slice(n, n + 1), others)
    return among, alone, rows[0]


def _cut_out(x: Any, place: Any, cut: Any, fill: float | None) -> tuple[Any, Any]:
    """x with `fill` outside of a place, unless that is None, and what a cut leaves of x."""
    if isinstance(x, tuple):
        pairs = [_cut_out(part, place, cut, fill) for part in x]
        # A NamedTuple is made of its fields, a tuple of one sequence.
        make: Any = getattr(x, "_make", tuple)
        return make([among for among, _ in pairs]), make([alone for _, alone in pairs])
    among = np.array(x) if fill is None else np.full_like(x, fill)
    among[place] = x[place]
    return among, x[cut]


def check_continued(trial: Trial) -> None:
    """Sequences cut in two, the rest packed behind the states that the first parts leave."""
    packed, kind = trial.contract.packed, trial.kernel.arrays
    assert packed is not None
    assert packed.handed is not None
    arguments = trial.arguments()
    ((name, axes),) = packed.tokens.items()
    offsets, stride, rng = arguments[name], packed.stride(arguments), trial.case.generator("cuts")
    cuts = [int(a + stride * rng.integers(0, (b - a) // stride + 1)) for a, b in pairwise(offsets)]
    handed: Mapping[str, Any] = {}
    results: list[Any] = []
    rows: list[np.ndarray] = []
    for starts, stops in ((offsets[:-1], cuts), (cuts, offsets[1:])):
        rows.append(np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)]))
        part = {**arguments, name: np.cumsum([0, *np.subtract(stops, starts)])}
        part |= {n: _take(arguments[n], rows[-1], axis) for n, axis in axes.items()}
        placed = place_arguments(kind, part, "contiguous", trial.case.dtype)
        # Handed on as they are: placed anew, states would be rounded to the kernel's dtype.
        placed |= handed
        with trial.guarded():
            results.append(trial.contract.call(trial.kernel.call, placed))
        handed = packed.handed(results[0], placed)
    first, second = (trial.contract.outputs_of(result) for result in results)
    order = np.argsort(np.concatenate(rows), kind="stable")
    got = {n: kind.get(x) for n, x in second.items()}
    for output in trial.contract.outputs:
        if output.by_query:
            axis = -1 - output.row_axes
            both = [kind.get(first[output.name]), got[output.name]]
            got[output.name] = np.take(np.concatenate(both, axis=axis), order, axis=axis)
    trial.judge(got, arguments)


def _take(x: Any, rows: np.ndarray, axis: int) -> Any:
    if isinstance(x, tuple):
        return tuple(_take(part, rows, axis) for part in x)
    return np.take(x, rows, axis=axis)


LAWS = (
    Law(
        "alone",
        "A packed sequence does not feel its neighbours, whatever they hold, NaN included.",
        ("K1", "K11"),
        several,
        check_alone,
        applies=lambda contract, kernel: contract.packed is not None,
        examples=0.4,
    ),
    Law(
        "continued",
        "Packed sequences, each cut anywhere, go on from the states of their first parts.",
        ("K13",),
        draw_case,
        check_continued,
        applies=lambda contract, kernel: (
            contract.packed is not None and contract.packed.handed is not None
        ),
        examples=0.3,
    ),
)
