"""Laws of NTK-Attention alone: prefixes add, a state of zeros is none, Z counts without k."""

from __future__ import annotations

import numpy as np

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.reference.linear.ntk_attention import ntk_attend, prefix_state


def _anywhere(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, cross=True)


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


LAWS = (
    Law(
        "prefix-addition",
        "Prefixes laid end to end add their states.",
        ("K5",),
        _anywhere,
        check_addition,
        applies=lambda contract, kernel: contract.spec.function is prefix_state,
        examples=0.3,
    ),
    Law(
        "empty-prefix",
        "A state of zeros is no prefix.",
        ("K4",),
        _anywhere,
        check_empty_prefix,
        applies=lambda contract, kernel: contract.spec.function is ntk_attend,
        examples=0.3,
    ),
    Law(
        "numerator-alone",
        "A prefix without a denominator still adds its numerator.",
        ("K4",),
        _anywhere,
        check_numerator_alone,
        applies=lambda contract, kernel: contract.spec.function is ntk_attend,
        examples=0.3,
    ),
)
