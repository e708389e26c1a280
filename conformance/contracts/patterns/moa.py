"""Contracts of MoA's attention: windows and sinks that differ from head to head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.values import longer
from attnspec.reference.patterns.moa_masks import moa_block_mask, moa_token_mask

SIZES = {"batch": (1, 2), "kv_heads": (1, 3), "group": (1, 3), "d": (1, 24), "dv": (1, 24)}


def one_a_head(least: int, most: int) -> Any:
    """Integers of a head: half of them equal, whole blocks where the case has windows of these."""

    def make(rng: np.random.Generator, case: Case) -> tuple[int, ...]:
        heads = case.sizes["kv_heads"]
        sizes = rng.integers(least, most + 1, heads)
        sizes = np.where(rng.random(heads) < 0.5, sizes[0], sizes)
        unit = 1
        if case.parameters.get("granularity") == "block":
            unit = case.parameters["block"]
            sizes = np.minimum(sizes, -(-12 // unit))
        return tuple(int(n) * unit for n in sizes)

    return make


def bad_plans() -> tuple[tuple[str, str, Any], ...]:
    """Sizes that no plan has."""
    return (
        ("a negative sink", "s", lambda a: (-1,) * len(a["s"])),
        ("an empty window", "c", lambda a: (0,) * len(a["c"])),
        ("sizes that are no integers", "s", lambda a: (0.5,) * len(a["s"])),
        ("one size for all", "c", lambda a: 4),
        ("sizes of more heads", "c", lambda a: (*a["c"], a["c"][-1])),
    )


def visible(a: Mapping[str, Any]) -> np.ndarray:
    """bool (heads, T, T): the pairs that the plan shows."""
    T, group = a["q"].shape[2], a["q"].shape[1] // a["k"].shape[1]
    if a["granularity"] == "token":
        mask = moa_token_mask(T, a["s"], a["c"])
    else:
        mask = moa_block_mask(T, a["s"], a["c"], a["block"])
    return np.repeat(mask, group, axis=0)


def check_hidden(trial: Trial) -> None:
    """NaN in one token's key and value leaves the rows right that do not see the token."""
    arguments = trial.arguments()
    T = trial.case.sizes["tokens"]
    u = int(trial.case.generator("token").integers(0, T))
    changed = dict(arguments)
    for name in ("k", "v"):
        changed[name] = arguments[name].copy()
        changed[name][:, :, u] = np.nan
    before, after = trial.run(arguments), trial.run(changed)
    sees = visible(arguments)[:, :, u]
    out = np.where(sees[..., None], before["out"], after["out"])
    trial.judge({"out": out, "lse": np.where(sees, before["lse"], after["lse"])}, arguments)


def check_rules_move(trial: Trial) -> None:
    """Heads in another order, with their rules, give the outputs in that order."""
    arguments, group = trial.arguments(), trial.case.sizes["group"]
    order = trial.case.generator("order").permutation(trial.case.sizes["kv_heads"])
    rows = (order[:, None] * group + np.arange(group)).ravel()
    moved = {**arguments, "q": arguments["q"][:, rows]}
    moved |= {name: arguments[name][:, order] for name in ("k", "v")}
    moved |= {name: tuple(arguments[name][h] for h in order) for name in ("s", "c")}
    outputs = trial.run(moved)
    trial.judge({name: x[:, np.argsort(rows)] for name, x in outputs.items()}, arguments)


def long_texts(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, axes={"tokens": st.integers(6, 24)})


def several_heads(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, axes={"kv_heads": st.integers(2, 4)})


def _attends(contract: Contract, kernel: Kernel) -> bool:
    return contract.operation == "moa.moa_attend"


CONTRACTS = (
    Contract(
        operation="moa.moa_attend",
        sizes={**SIZES, "tokens": (1, 24)},
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("q", "batch heads tokens d", role="query"),
            Array("k", "batch kv_heads tokens d", role="key"),
            Array("v", "batch kv_heads tokens dv", role="value"),
            Array("s", make=one_a_head(0, 4)),
            Array("c", make=one_a_head(1, 9)),
        ),
        outputs=(Output("out", cancels=True), Output("lse", dtype="float32", row_axes=0)),
        parameters=lambda sizes: {
            "granularity": st.sampled_from(["token", "block", "token"]),
            "block": st.sampled_from([2, 8, 16, 3]),
            "scale": st.sampled_from([None, 0.5]),
        },
        linear_in=("v",),
        cancelling=("dq", "dk"),
        causal=lambda case: True,
        cells={
            "causal self": lambda case: case,
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("more keys than queries", "k", lambda a: longer(a["k"])),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=1)),
            *bad_plans(),
            ("an unknown granularity", "granularity", lambda a: "row"),
            ("windows of half a block", "s",
             lambda a: (a["block"] * 2 + 1,) * len(a["s"]) if a["granularity"] == "block"
             else (True,) * len(a["s"])),
        ),
    ),
)  # fmt: skip
LAWS = (
    Law(
        "outside-window",
        "NaN in a token reaches no row whose sinks and window leave the token out.",
        ("K11",),
        long_texts,
        check_hidden,
        applies=_attends,
        examples=0.5,
    ),
    Law(
        "rules-move",
        "A head takes its rule along wherever it stands.",
        ("K7",),
        several_heads,
        check_rules_move,
        applies=_attends,
        examples=0.5,
    ),
)
