"""Contracts of SinkLoRA: attention in groups and to global sinks, and where its heads may move.

Its masks are in `sinklora_heads`, the cache in `sinklora_h2o` and `sinklora_step`, the prompt in
`sinklora_prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.patterns.longlora import (
    check_ahead,
    check_order,
    group_sizes,
)
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.values import bad_integers
from attnspec.conformance.violation import Violation
from attnspec.reference.patterns.sinklora import sf_attend
from attnspec.reference.patterns.sinklora_heads import sf_head_kind

RHO = (0.5, 0.0, 0.25, 1.0, 0.7)
BAD_PATTERN = (
    *bad_integers("G"),
    ("a group that cannot be rolled", "G", lambda a: 65 if a["wrap"] else -1),
    ("an odd group to roll", "G", lambda a: 1 if a["wrap"] else None),
    ("s = -1", "s", lambda a: -1),
    ("s = 0.5", "s", lambda a: 0.5),
    ("rho = 1.5", "rho", lambda a: 1.5),
    ("a share in words", "rho", lambda a: "half"),
    ("wrap = 1", "wrap", lambda a: 1),
    ("causal = 1", "causal", lambda a: 1),
)


def pattern(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """Even numbers of tokens may be rolled."""
    rolls = sizes["tokens"] % 2 == 0
    return {
        "G": group_sizes(sizes["tokens"], rolls),
        "s": st.sampled_from((4, 1, 0, 2, 7, 30)),
        "rho": st.sampled_from(RHO),
        "wrap": st.sampled_from([True, False, True] if rolls else [False]),
        "causal": st.sampled_from([True, True, False]),
    }


def heads_to_move(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Four kv heads: the query heads of two are plain, of one returned, of the last shifted."""
    return draw_case(
        contract, kernel, dtype, axes={"kv_heads": st.just(4)}, parameters={"rho": 0.5}
    )


def check_kinds(trial: Trial) -> None:
    """Plain heads, returned ones among them, change places with all that they read."""
    check_order(trial, np.array([2, 0, 1, 3]))


def long_texts(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(
        contract,
        kernel,
        dtype,
        axes={"tokens": st.sampled_from([24, 16, 48]), "kv_heads": st.integers(2, 3)},
        values=("flat",),
        parameters={"causal": True, "G": 8, "s": 3, "rho": 0.0},
    )


def check_reach(trial: Trial) -> None:
    """Another text between the sinks and a token's segment changes no bit of what it gets; other
    sinks do change it.
    """
    arguments, G = trial.arguments(), trial.case.parameters["G"]
    T, s = trial.case.sizes["tokens"], trial.case.parameters["s"]
    first = T - G - G // 2
    before = trial.run(arguments)
    for tokens, reaches in ((slice(s, first), False), (slice(0, s), True)):
        changed = dict(arguments)
        for name in ("k", "v"):
            changed[name] = arguments[name].copy()
            changed[name][..., tokens, :] = 3.0 - changed[name][..., tokens, :]
        after = trial.run(changed)
        same = np.array_equal(before["out"][..., T - G :, :], after["out"][..., T - G :, :])
        if same == reaches:
            what = "do not reach" if reaches else "reach"
            raise Violation("out", f"tokens {tokens.start}..{tokens.stop - 1} {what} the last")


def check_wrap(trial: Trial) -> None:
    """Rolled heads look ahead in the first half group, returned and plain ones nowhere."""
    case = trial.case
    shifted = sf_head_kind(case.heads, case.parameters["rho"]) == 1
    check_ahead(trial, case.sizes["tokens"] // 2, shifted)


def rolled(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(
        contract,
        kernel,
        dtype,
        axes={"tokens": st.sampled_from([8, 16, 24]), "kv_heads": st.just(2)},
        parameters={"wrap": True, "causal": True, "G": 8, "rho": 0.0},
    )


def _attends(contract: Contract, kernel: Kernel) -> bool:
    return contract.spec.function is sf_attend


CONTRACTS = (
    Contract(
        operation="sinklora.sf_attend",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 4),
            "group": (1, 3),
            "tokens": (1, 24),
            "d": (1, 24),
            "dv": (1, 24),
        },
        arrays=(
            Array("q", "batch heads tokens d", role="query"),
            Array("k", "batch kv_heads tokens d", role="key"),
            Array("v", "batch kv_heads tokens dv", role="value"),
        ),
        outputs=(Output("out", cancels=True), Output("lse", dtype="float32", row_axes=0)),
        parameters=lambda sizes: {**pattern(sizes), "scale": st.sampled_from([None, 0.5])},
        queries="tokens",
        keys="tokens",
        linear_in=("v",),
        cancelling=("dq", "dk"),
        causal=lambda case: case.parameters["causal"] and not case.parameters["wrap"],
        cells={
            "noncausal self": lambda case: case.with_(parameters={"causal": False}),
            "causal self": lambda case: case.with_(parameters={"causal": True}),
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("a cache of earlier keys", "k", lambda a: a["k"].repeat(2, axis=-2)),
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(17, axis=1)),
            *BAD_PATTERN,
        ),
    ),
)
LAWS = (
    Law(
        "rolled-heads",
        "Rolled heads look ahead in the first half group, and nowhere else.",
        (),
        rolled,
        check_wrap,
        applies=_attends,
        examples=0.3,
    ),
    Law(
        "kinds",
        "Plain and returned heads may change places.",
        (),
        heads_to_move,
        check_kinds,
        applies=_attends,
        examples=0.2,
    ),
    Law(
        "reach",
        "A token reads the sinks and its own segment, and nothing between them.",
        ("K11",),
        long_texts,
        check_reach,
        applies=_attends,
        examples=0.2,
    ),
)
