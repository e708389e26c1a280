"""Laws of NTK-Attention alone: prefixes add and stay, zeros are none, Z counts without k.

Packed sequences share a prefix and nothing else.
"""

from __future__ import annotations

import numpy as np

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_anywhere, draw_case
from attnspec.conformance.laws.controls import check_apart
from attnspec.conformance.trial import Trial
from attnspec.reference.linear.ntk_attention import (
    ntk_attend,
    prefix_state,
)


def _square(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Every row sees a key: one that sees none is not moved by keys."""
    return draw_case(contract, kernel, dtype, options=())


def check_addition(trial: Trial) -> None:
    """The state of two prefixes end to end is the sum of theirs."""
    arguments = trial.arguments()
    half = arguments["K_P"].shape[-2] // 2
    first, last = (
        trial.run({name: x[:, rows] for name, x in arguments.items()})
        for rows in (slice(None, half), slice(half, None))
    )
    trial.judge({name: first[name] + last[name] for name in ("Z", "k")}, arguments)


def check_empty_prefix(trial: Trial) -> None:
    """Z = 0 and k = 0 leave softmax attention, even where all scores are far below 0."""
    arguments = trial.arguments()
    arguments |= {name: np.zeros_like(arguments[name]) for name in ("Z", "k")}
    arguments["positivity"] = "abs"
    low = trial.case.generator("low").choice([0.0, 4.0, 200.0])
    for name, value in (("q", low), ("K", -low)):
        arguments[name] = arguments[name].copy()
        arguments[name][..., 0] = value
    trial.check(arguments)


def check_numerator_alone(trial: Trial) -> None:
    """k = 0 beside a Z that is not: the prefix adds to the values and takes no share of them."""
    arguments = trial.arguments()
    trial.check({**arguments, "k": np.zeros_like(arguments["k"]), "positivity": "abs"})


def check_shift(trial: Trial) -> None:
    """Keys moved along all queries take the prefix's share; in a softmax they would not.

    Values of 1 beside Z = 0 make an output the share of the keys: small at scores of -8, nearly
    all at 8.
    """
    arguments = trial.arguments()
    scale = arguments["scale"] or trial.case.sizes["d"] ** -0.5
    q, K = (np.zeros_like(arguments[name]) for name in ("q", "K"))
    q[..., 0], K[..., 0] = 1, -np.ceil(8 / scale)
    V, k, Z = np.ones_like(arguments["V"]), np.ones_like(arguments["k"]), 0 * arguments["Z"]
    low = {**arguments, "q": q, "K": K, "V": V, "Z": Z, "k": k}
    high = {**low, "K": -K}
    before, after = trial.run(low), trial.run(high)
    check_apart(
        "out", after["out"], before["out"], 0.2, "a softmax, which feels no vector added to all"
    )
    trial.judge(before, low)
    trial.judge(after, high)


LAWS = (
    Law(
        "prefix-addition",
        "Prefixes laid end to end add their states.",
        ("K5",),
        draw_anywhere,
        check_addition,
        applies=lambda contract, kernel: contract.spec.function is prefix_state,
        examples=0.3,
    ),
    Law(
        "empty-prefix",
        "A state of zeros is no prefix.",
        ("K4",),
        draw_anywhere,
        check_empty_prefix,
        applies=lambda contract, kernel: contract.spec.function is ntk_attend,
        examples=0.3,
    ),
    Law(
        "numerator-alone",
        "A prefix without a denominator still adds its numerator.",
        ("K4",),
        draw_anywhere,
        check_numerator_alone,
        applies=lambda contract, kernel: contract.spec.function is ntk_attend,
        examples=0.3,
    ),
    Law(
        "prefix-shift",
        "Adding a vector to all keys is felt: the prefix does not move along.",
        ("K4",),
        _square,
        check_shift,
        applies=lambda contract, kernel: contract.spec.function is ntk_attend,
        examples=0.2,
    ),
)
