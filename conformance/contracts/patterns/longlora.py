"""Contracts of LongLoRA: attention in groups, cut or rolled, and what a roll may let through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.values import bad_integers
from attnspec.conformance.violation import Violation
from attnspec.reference.patterns.longlora import grouped_attend

GROUPS = (4, 3, 2, 8, 5, 16, 1, 24, 64)


def can_roll(sizes: Mapping[str, int]) -> bool:
    """Even numbers of tokens and of heads have groups that fit them, and may be rolled."""
    return sizes["tokens"] % 2 == 0 and sizes["kv_heads"] * sizes["group"] % 2 == 0


def group_sizes(tokens: int, rolls: bool) -> st.SearchStrategy[int]:
    """G is even and divides the tokens where the case can be rolled, and is anything elsewhere."""
    even = [G for G in (4, 2, 6, 8, 16, 32, tokens) if G and tokens % G == 0]
    return st.sampled_from(even if rolls else GROUPS)


def group_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    rolls = can_roll(sizes)
    return {
        "G": group_sizes(sizes["tokens"], rolls),
        "variant": st.sampled_from(["roll", "segments", "roll"] if rolls else ["segments"]),
        "causal": st.sampled_from([True, True, False]),
        "scale": st.sampled_from([None, 0.5]),
    }


def make_lengths(rng: np.random.Generator, case: Case) -> np.ndarray | None:
    """None for rolled groups and for every second other case; else from no token to all."""
    given = "right" in case.options or rng.integers(2) == 0
    if case.parameters["variant"] == "roll" or not given:
        return None
    return rng.integers(0, case.sizes["tokens"] + 1, case.sizes["batch"])


def poison_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in everything that is padded."""
    if arguments.get("lengths") is None:
        return arguments
    padded = np.arange(case.sizes["tokens"]) >= arguments["lengths"][:, None]
    for name in ("q", "k", "v"):
        x: np.ndarray = arguments[name].copy()
        x.swapaxes(1, 2)[padded] = np.nan
        arguments[name] = x
    return arguments


def rolled(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(
        contract,
        kernel,
        dtype,
        axes={"tokens": st.sampled_from([4, 8, 12, 16, 24]), "kv_heads": st.just(2)},
        parameters={"variant": "roll", "causal": True},
    )


def four_kv_heads(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, axes={"kv_heads": st.just(4)})


def check_wrap(trial: Trial) -> None:
    """Rolled groups look ahead in the first half group of shifted heads, and nowhere else."""
    heads = trial.case.heads
    check_ahead(trial, 1, np.arange(heads) >= heads // 2)


def check_ahead(trial: Trial, least: int, shifted: np.ndarray) -> None:
    """Tokens from one on, the token `least` or a later one, are changed: before it only rows of the
    first half group of `shifted` heads (heads) may feel it.
    """
    arguments, case = trial.arguments(), trial.case
    cut = int(case.generator("cut").integers(least, case.sizes["tokens"] + 1))
    changed = dict(arguments)
    for name in ("q", "k", "v"):
        changed[name] = arguments[name].copy()
        changed[name][..., cut:, :] *= -3.0
    before, after = trial.run(arguments), trial.run(changed)
    for heads, first in ((~shifted, 0), (shifted, case.parameters["G"] // 2)):
        for name in ("out", "lse"):
            old, new = (x[name][:, heads, first:cut] for x in (before, after))
            if not np.array_equal(old, new):
                raise Violation(name, f"a row from {first} to {cut} depends on later tokens")


def check_halves(trial: Trial) -> None:
    """kv heads 0 and 1, and 2 and 3, change places with all that they serve."""
    check_order(trial, np.array([1, 0, 3, 2]))


def check_order(trial: Trial, order: np.ndarray) -> None:
    """kv heads in another order, with all that they serve, give the outputs in that order."""
    arguments, group = trial.arguments(), trial.case.sizes["group"]
    rows = (order[:, None] * group + np.arange(group)).ravel()
    moved = {**arguments, "q": arguments["q"][:, rows]}
    moved |= {name: arguments[name][:, order] for name in ("k", "v")}
    outputs = trial.run(moved)
    trial.judge({name: x[:, rows.argsort()] for name, x in outputs.items()}, arguments)


def _grouped(contract: Contract, kernel: Kernel) -> bool:
    return contract.spec.function is grouped_attend


CONTRACTS = (
    Contract(
        operation="longlora.grouped_attend",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 3),
            "group": (1, 3),
            "tokens": (1, 24),
            "d": (1, 24),
            "dv": (1, 24),
        },
        arrays=(
            Array("q", "batch heads tokens d", role="query"),
            Array("k", "batch kv_heads tokens d", role="key"),
            Array("v", "batch kv_heads tokens dv", role="value"),
            Array("lengths", "batch", make=make_lengths),
        ),
        outputs=(Output("out", cancels=True), Output("lse", dtype="float32", row_axes=0)),
        parameters=group_parameters,
        queries="tokens",
        keys="tokens",
        linear_in=("v",),
        cancelling=("dq", "dk"),
        causal=lambda case: case.parameters["causal"] and case.parameters["variant"] != "roll",
        poison=poison_padding,
        cells={
            "noncausal self": lambda case: case.with_(parameters={"causal": False}),
            "causal self": lambda case: case.with_(parameters={"causal": True}),
            "right": lambda case: case.with_(
                options=("right",), parameters={"variant": "segments"}
            ),
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("a cache of earlier keys", "k", lambda a: a["k"].repeat(2, axis=-2)),
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=1)),
            *bad_integers("G"),
            ("a group that cannot be rolled", "G",
             lambda a: 64 + a["q"].shape[2] if a["variant"] == "roll" else -1),
            ("an odd group to roll", "G", lambda a: 1 if a["variant"] == "roll" else None),
            ("a third variant", "variant", lambda a: "shift"),
            ("causal = 1", "causal", lambda a: 1),
            ("lengths of other sequences", "lengths", lambda a: np.zeros(29, np.int64)),
            ("lengths as floats", "lengths", lambda a: np.zeros(len(a["q"]))),
            ("one length for all", "lengths", lambda a: 1),
            BadValue("lengths beyond the text", "lengths",
                     lambda a: np.full(len(a["q"]), a["q"].shape[2] + 1)),
            BadValue("a negative length", "lengths", lambda a: np.full(len(a["q"]), -1)),
        ),
    ),
)  # fmt: skip
LAWS = (
    Law(
        "wrap",
        "Rolled groups look ahead in the first half group of shifted heads, and nowhere else.",
        (),
        rolled,
        check_wrap,
        applies=_grouped,
        examples=0.3,
    ),
    Law(
        "halves",
        "Heads of the same half may change places.",
        (),
        four_kv_heads,
        check_halves,
        applies=_grouped,
        examples=0.2,
    ),
)
