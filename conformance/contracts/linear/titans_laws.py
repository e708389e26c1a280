"""Laws of Titans alone: depth, chunks handed over, what chunks are for, and no gated delta rule."""

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
from attnspec.conformance.laws.controls import check_apart, several
from attnspec.conformance.trial import EXPECTATIONS, Trial

LONG = 64
"""A gradient chunk in which all tokens of the usual cases are."""
CHUNKED = ("titans.titans_chunk_linear", "titans.titans_chunk_mlp", "titans.titans_sequential")
PACKED = ("titans.titans_packed_linear", "titans.titans_packed_mlp")


def _real(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=("S0",))


def _several(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Three tokens: an exclusive read of the third is the first to see the second one stored."""
    axes = several(contract, kernel, "tokens", 3)
    return draw_case(contract, kernel, dtype, axes, options=())


def check_depth(trial: Trial) -> None:
    """One layer, two, or three: the same function."""
    contract, case, kind = trial.contract, trial.case, trial.kernel.arrays
    arguments = trial.arguments()
    rng = case.generator("depth")
    hidden = int(rng.integers(1, 9))
    leading = case.shape(f"{'batch' if 'batch' in case.sizes else 'sequences'} kv_heads")
    for depth in (1, 3):
        widths = (case.sizes["d"], *[hidden] * (depth - 1), case.sizes["dv"])
        layers = layers_of(rng, leading, widths)
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


def _part(arguments: dict[str, Any], rows: Any) -> dict[str, Any]:
    part = dict(arguments)
    for name in ("k", "v", "q"):
        part[name] = arguments[name][..., rows, :]
    part["rates"] = tuple(x[..., rows] for x in arguments["rates"])
    return part


def _one_pair(arguments: dict[str, Any], weight: float, alpha: float, b: int) -> dict[str, Any]:
    """One unit key with the value 1, stored and read again and again in steps that recall it."""
    W0, k, q = (np.zeros_like(arguments[name]) for name in ("W0", "k", "q"))
    W0[..., 0, :], k[..., 0], q[..., 0] = weight, 1, 1
    theta, eta, forget = (np.zeros_like(x) for x in arguments["rates"])
    rates = (theta + 1 / arguments["loss_scale"], eta, forget + alpha)
    v = np.ones_like(arguments["v"])
    return {**arguments, "W0": W0, "k": k, "v": v, "q": q, "rates": rates, "b": b}


def _moved(arguments: dict[str, Any]) -> slice:
    """The rows that read weights behind the first token or a later one."""
    return slice(int(arguments["read"] == "exclusive"), None)


def check_gated_delta(trial: Trial) -> None:
    """With alpha = 1/2 the weight w goes on to 1 - w / 2: 1/2, 3/4, 5/8 and so on, never to 1.

    The gated delta rule, whose gradient is that of decayed weights, recalls 1 every time. Where
    nothing is forgotten, learned or known yet, the two coincide.
    """
    arguments = _one_pair(trial.arguments(), 1.0, 0.5, 1)
    got = trial.run(arguments)
    for name, read in (("y", got["y"][..., _moved(arguments), :]), ("W", got["W"][..., 0, :])):
        check_apart(name, read, np.ones_like(read), 0.125, "the gated delta rule")
    trial.judge(got, arguments)


def check_chunk_length(trial: Trial) -> None:
    """Chunks of one token recall 1 behind every one; a chunk of all of them adds 1 at each.

    The two agree on the first token, and on no other.
    """
    short, whole = (_one_pair(trial.arguments(), 0.0, 0.0, b) for b in (1, LONG))
    one, many = trial.run(short), trial.run(whole)
    rows = slice(_moved(short).start + 1, LONG)
    check_apart(
        "y", one["y"][..., rows, :], many["y"][..., rows, :], 0.5, "one rule for every chunk length"
    )
    trial.judge(one, short)
    trial.judge(many, whole)


LAWS = (
    Law(
        "depth",
        "A memory of any depth follows the same rule.",
        ("K1",),
        draw_case,
        check_depth,
        applies=lambda contract, kernel: contract.operation in (*CHUNKED[1:], PACKED[1]),
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
    Law(
        "gated-delta",
        "With forgetting it is not the gated delta rule.",
        ("K1",),
        _several,
        check_gated_delta,
        applies=lambda contract, kernel: (
            contract.operation == CHUNKED[0] and kernel.supports("b", 1)
        ),
        examples=0.2,
    ),
    Law(
        "chunk-length",
        "The length of a gradient chunk is felt from the second token on.",
        ("K1",),
        _several,
        check_chunk_length,
        applies=lambda contract, kernel: (
            contract.operation == CHUNKED[0]
            and kernel.supports("b", 1)
            and kernel.supports("b", LONG)
        ),
        examples=0.2,
    ),
)
