"""Laws of Titans alone: depth, chunks handed over with their state, and what chunks are for."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from attnspec.conformance.arrays import flatten, place_arguments, round_arguments
from attnspec.conformance.contract import Contract, Output
from attnspec.conformance.contracts.linear.titans import layers_of
from attnspec.conformance.judge import expect
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import EXPECTATIONS, Trial

CHUNKED = ("titans.titans_chunk_linear", "titans.titans_chunk_mlp", "titans.titans_sequential")


def _anywhere(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype)


def _real(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=("S0",))


def check_depth(trial: Trial) -> None:
    """One layer, two, or three: the same function."""
    contract, case, kind = trial.contract, trial.case, trial.kernel.arrays
    arguments = trial.arguments()
    rng = case.generator("depth")
    hidden = int(rng.integers(1, 9))
    for depth in (1, 3):
        widths = (case.sizes["d"], *[hidden] * (depth - 1), case.sizes["dv"])
        layers = layers_of(rng, case.shape("batch kv_heads"), widths)
        changed = round_arguments({**arguments, "W0": layers, "S0": None}, case.dtype)
        outputs = tuple(
            Output(f"{n}{i}", dtype="input" if n == "y" else "float32")
            for n, many in (("y", 1), ("W", depth), ("S", depth)) for i in range(many)
        )  # fmt: skip
        expectation = EXPECTATIONS.get(
            ("depth", depth, case.key),
            partial(expect, contract.spec.function, changed, outputs, case.dtype),
        )
        placed = place_arguments(kind, changed, "contiguous", case.dtype)
        with trial.guarded():
            results = flatten(contract.call(trial.kernel.call, placed))
        got = {o.name: kind.get(x) for o, x in zip(outputs, results, strict=True)}
        trial.compare(outputs, got, expectation)


def check_hand_over(trial: Trial) -> None:
    """Two calls, cut behind a whole chunk, are one call."""
    arguments = trial.arguments()
    tokens, b = trial.case.sizes["tokens"], arguments["b"]
    cut = int(trial.case.generator("cut").integers(0, tokens // b + 1)) * b
    first, second = (_part(arguments, rows) for rows in (slice(0, cut), slice(cut, None)))
    kind = trial.kernel.arrays
    results: list[Any] = []
    for part in (first, second):
        placed = place_arguments(kind, part, "contiguous", trial.case.dtype)
        if results:
            placed["W0"], placed["S0"] = results[-1][1:]
        with trial.guarded():
            results.append(trial.contract.call(trial.kernel.call, placed))
    y = np.concatenate([kind.get(result[0]) for result in results], axis=-2)
    rest = [kind.get(x) for x in flatten(results[1][1:])]
    names = [output.name for output in trial.contract.outputs]
    trial.judge(dict(zip(names, [y, *rest], strict=True)), arguments)


def _part(arguments: dict[str, Any], rows: slice) -> dict[str, Any]:
    part = dict(arguments)
    for name in ("k", "v", "q"):
        part[name] = arguments[name][..., rows, :]
    part["rates"] = tuple(x[..., rows] for x in arguments["rates"])
    return part


LAWS = (
    Law(
        "depth",
        "A memory of any depth follows the same rule.",
        ("K1",),
        _anywhere,
        check_depth,
        applies=lambda contract, kernel: contract.operation in CHUNKED[1:],
        examples=0.2,
    ),
    Law(
        "hand-over",
        "Weights and momentum handed over behind a whole chunk continue the call.",
        ("K12",),
        _real,
        check_hand_over,
        applies=lambda contract, kernel: contract.operation in CHUNKED,
        examples=0.2,
    ),
)
