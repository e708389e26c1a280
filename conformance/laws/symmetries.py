"""Laws that compare a kernel with itself: what must not matter, and what must act linearly.

They need no truth, so they hold a kernel to more than its budget: where the rule says *equal*, the
two answers differ by rounding at most, and where a value may not be read, not at all.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.contract import Contract
from attnspec.conformance.dtypes import EPS, TINY, accumulator
from attnspec.conformance.judge import expect, truth_of
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_anywhere, draw_case
from attnspec.conformance.trial import EXPECTATIONS, Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.primitives.softmax import merge


def _slice(trial: Trial, arguments: dict[str, Any], axis: str, index: Any) -> dict[str, Any]:
    """`arguments` with every array indexed along `axis`."""
    changed = dict(arguments)
    for array in trial.contract.arrays:
        axes = array.axes.split()
        if axis in axes and isinstance(arguments.get(array.name), np.ndarray):
            changed[array.name] = np.take(arguments[array.name], index, axis=axes.index(axis))
    return changed


def several(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, axes={"batch": st.integers(2, 3)})


def check_batch(trial: Trial) -> None:
    """Each entry of a batch computed alone, and the batch in another order, agree with truth."""
    arguments = trial.arguments()
    batch = trial.case.sizes["batch"]
    trial.check(_slice(trial, arguments, "batch", np.arange(batch)[::-1]))
    trial.check(_slice(trial, arguments, "batch", np.array([batch - 1])))


def check_permutation(trial: Trial) -> None:
    """Keys, values and masks permuted together: the answer stays within the budget."""
    arguments = trial.arguments()
    keys = trial.case.sizes[trial.contract.keys]
    order = trial.case.generator("permutation").permutation(keys)
    permuted = dict(arguments)
    for array in trial.contract.arrays:
        if array.name in trial.contract.key_arrays and array.name in arguments:
            axis = array.axes.split().index(trial.contract.keys)
            permuted[array.name] = np.take(arguments[array.name], order, axis=axis)
    trial.judge(trial.run(permuted), arguments)


def check_prefix(trial: Trial) -> None:
    """Tokens to come change no earlier row, not by one bit unless the kernel says so.

    They are doubled and negated, which every dtype does exactly.
    """
    contract, arguments = trial.contract, trial.arguments()
    tokens = trial.case.sizes[contract.queries]
    cut = int(trial.case.generator("cut").integers(0, tokens)) + 1
    changed = dict(arguments)
    for array in contract.arrays:
        axes = array.axes.split()
        value = arguments.get(array.name)
        if contract.keys in axes and isinstance(value, np.ndarray) and value.dtype.kind == "f":
            changed[array.name] = value.copy()
            later = [slice(None)] * value.ndim
            later[axes.index(contract.keys)] = slice(cut, None)
            tail = changed[array.name][tuple(later)]
            changed[array.name][tuple(later)] = np.where(np.isfinite(tail), -2.0 * tail, tail)
    before, after = trial.run(arguments), trial.run(changed)
    for output in contract.outputs:
        if output.kind != "value" or not output.by_query:
            continue
        axis = -2 if output.row_axes else -1
        old = np.take(before[output.name], np.arange(cut), axis=axis)
        new = np.take(after[output.name], np.arange(cut), axis=axis)
        if trial.kernel.exact_prefix and not np.array_equal(old, new):
            raise Violation(output.name, f"a row before token {cut} depends on later tokens")
    if not trial.kernel.exact_prefix:
        trial.judge(before, arguments)
        trial.judge(after, changed)


def check_linearity(trial: Trial) -> None:
    """Doubling the values, an exact operation in every dtype, doubles the output exactly.

    Only numbers too small to be normal lose bits on the way. Such an operand of float16 is off by
    up to half of `TINY`, which what it is multiplied with makes larger, and that may tip the
    rounding of the sum. Then both answers stay within the budget, and values so much larger that
    the lost bits are there double exactly: n bits of a significand are back after n doublings.
    """
    arguments, dtype = trial.arguments(), trial.case.dtype
    first = trial.contract.outputs[0].name
    once = trial.run(arguments)
    for name in trial.contract.linear_in:
        twice = trial.run(_times(2.0, arguments, name))
        if _is_double(twice[first], once[first], dtype):
            continue
        if TINY[dtype] / EPS[dtype] > np.finfo(accumulator(dtype)).tiny:
            trial.judge(once, arguments)
            trial.judge(twice, _times(2.0, arguments, name))
            if _doubles_further_up(trial, arguments, name, twice[first]):
                continue
        raise Violation(first, f"doubling {name} does not double it")


def _times(factor: float, arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """`arguments` with those in `name` multiplied by a power of two."""
    scaled = {n: factor * arguments[n] for n in name.split() if arguments.get(n) is not None}
    return {**arguments, **scaled}


def _is_double(twice: np.ndarray, once: np.ndarray, dtype: str) -> bool:
    least = 2.0 * TINY[dtype] + float(np.finfo(accumulator(dtype)).tiny)
    return np.allclose(twice, 2.0 * once, rtol=0, atol=least, equal_nan=True)


def _doubles_further_up(
    trial: Trial, arguments: dict[str, Any], name: str, before: np.ndarray
) -> bool:
    """Whether some values up to 1 / `EPS` times as large, short of overflow, double exactly."""
    dtype = trial.case.dtype
    first = trial.contract.outputs[0].name
    for power in range(2, 2 + round(-np.log2(EPS[dtype]))):
        after = trial.run(_times(2.0**power, arguments, name))[first]
        if not np.array_equal(np.isfinite(after), np.isfinite(before)):
            return False
        if _is_double(after, before, dtype):
            return True
        before = after
    return False


def check_split(trial: Trial) -> None:
    """Attention over two halves of the keys, merged by lse, is attention over all (K5)."""
    arguments = trial.arguments()
    split = trial.contract.split
    assert split is not None
    parts = split(arguments, trial.case)
    if not parts or not all(_within_limits(trial, part) for part in parts):
        return
    outputs = trial.contract.outputs[:2]
    results = [trial.run(part) for part in parts]
    merged = _merge([(result[outputs[0].name], result[outputs[1].name]) for result in results])
    function, case = trial.contract.spec.function, trial.case

    def in_parts(**whole: Any) -> Any:
        return _merge([function(**part) for part in split(whole, case) or ()])

    # The last bits of a large lse weigh in a merge, so the budget is that of a rounded merge.
    expectation = EXPECTATIONS.get(
        ("split", case.key),
        lambda: replace(
            expect(in_parts, arguments, outputs, case.dtype),
            truth=truth_of(function, arguments, outputs),
        ),
    )
    got = dict(zip((output.name for output in outputs), merged, strict=True))
    trial.compare(outputs, got, expectation)


def _within_limits(trial: Trial, arguments: dict[str, Any]) -> bool:
    """Whether the kernel claims arrays of these sizes."""
    return all(
        trial.kernel.supports(axis, size)
        for array in trial.contract.arrays
        if isinstance(value := arguments.get(array.name), np.ndarray)
        for axis, size in zip(array.axes.split(), value.shape, strict=False)
    )


def _merge(parts: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    out, lse = parts[0]
    with np.errstate(all="ignore"):
        for other in parts[1:]:
            out, lse = merge(out, lse, *other)
    return out, lse


def check_poison(trial: Trial) -> None:
    """NaN stored where the operation may not look reaches no output."""
    arguments = trial.arguments()
    poison = trial.contract.poison
    assert poison is not None
    poisoned = poison(dict(arguments), trial.case)
    trial.judge(trial.run(poisoned), arguments, copied=poisoned)


def check_neutral(trial: Trial) -> None:
    """An argument at its neutral value acts as if it were absent."""
    arguments = trial.arguments()
    for name, value in trial.contract.neutral.items():
        if not trial.kernel.supports(name, True):
            continue
        absent = {n: v for n, v in arguments.items() if n != name}
        if trial.contract.spec.signature.parameters[name].default is inspect.Parameter.empty:
            absent[name] = None
        trial.judge(trial.run({**absent, name: value(trial.case)}), absent)


def permutable(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, cross=True).filter(contract.permutable)


def causal(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    is_causal = contract.causal
    assert is_causal is not None
    return draw_case(contract, kernel, dtype).filter(
        lambda case: is_causal(case) and case.sizes[contract.queries] > 0
    )


def bounded(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, values=("normal", "structured"), cross=True)


LAWS = (
    Law(
        "batch",
        "An entry of a batch does not feel its neighbours.",
        ("K1",),
        several,
        check_batch,
        applies=lambda contract, kernel: (
            "batch" in contract.sizes
            and kernel.supports("batch", 2)
            and all(array.axes for array in contract.arrays)
        ),
        examples=0.3,
    ),
    Law(
        "permutation",
        "Without positions the order of the keys does not matter.",
        ("K3",),
        permutable,
        check_permutation,
        applies=lambda contract, kernel: bool(contract.key_arrays),
        examples=0.3,
    ),
    Law(
        "prefix",
        "Under a causal order no row depends on what comes after it.",
        ("K3",),
        causal,
        check_prefix,
        applies=lambda contract, kernel: contract.causal is not None,
        examples=0.3,
    ),
    Law(
        "linearity",
        "The output is linear in the values.",
        ("K10",),
        bounded,
        check_linearity,
        applies=lambda contract, kernel: bool(contract.linear_in),
        examples=0.3,
    ),
    Law(
        "split",
        "Results over disjoint keys merge into the result over all of them.",
        ("K5",),
        draw_anywhere,
        check_split,
        applies=lambda contract, kernel: contract.split is not None,
        examples=0.3,
    ),
    Law(
        "poison",
        "NaN behind a mask never leaks.",
        ("K11",),
        draw_anywhere,
        check_poison,
        applies=lambda contract, kernel: contract.poison is not None,
        examples=0.5,
    ),
    Law(
        "neutral",
        "A neutral argument is no argument.",
        ("K4", "K8", "K9"),
        draw_anywhere,
        check_neutral,
        applies=lambda contract, kernel: any(
            kernel.supports(name, True) for name in contract.neutral
        ),
        examples=0.3,
    ),
)
