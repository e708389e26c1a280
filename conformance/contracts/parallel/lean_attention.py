"""Contracts of lean attention: attention by any number of workers.

The triples they exchange are in `lean_attention_triples`, the schedule, integers only, is in
`lean_attention_schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.laws.base import Law, draw_anywhere
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation

SIZES = {
    "batch": (1, 3),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "queries": (1, 24),
    "keys": (1, 24),
    "d": (1, 24),
    "dv": (1, 24),
}
TILES = (1, 2, 3, 5, 8, 16, 32, 64, 128, 256)
WORKERS = (1, 2, 3, 4, 5, 7, 8, 13, 32, 132)
Drawn = dict[str, st.SearchStrategy[Any]]


def wrong_integers(*names: str) -> tuple[tuple[str, str, Any], ...]:
    """Values that are no integer of at least 1."""
    return tuple(
        (f"{name} = {value}", name, lambda a, value=value: value)
        for name in names
        for value in (0, 2.5, True)
    )


def whole(case: Case) -> bool:
    """Whether every sequence has as many keys as there is room for."""
    return case.seed % 3 == 0


def make_lengths(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Ragged lengths; one sequence in four is empty."""
    batch, keys = case.shape("batch keys")
    if whole(case):
        return np.full(batch, keys)
    return np.where(rng.random(batch) < 0.25, 0, rng.integers(0, keys + 1, batch))


def parameters(sizes: Mapping[str, int]) -> Drawn:
    return {
        "N": st.sampled_from(TILES),
        "G": st.sampled_from(WORKERS),
        "scale": st.sampled_from([None, 0.5]),
        "causal": st.booleans(),
        "M": st.sampled_from([None, 1, 2, 5, 16, 64]),
        "order": st.sampled_from(["natural", "paired"]),
    }


def _beyond(arguments: Mapping[str, Any]) -> np.ndarray:
    """bool (batch, 1, keys, 1): the keys behind the last of each sequence."""
    keys = arguments["k"].shape[-2]
    return (np.arange(keys) >= arguments["lengths"][:, None])[:, None, :, None]


def poison_beyond(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    unread = _beyond(arguments)
    for name in ("k", "v"):
        arguments[name] = np.where(unread, np.nan, arguments[name])
    return arguments


def halves(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]] | None:
    if arguments["causal"]:
        return None
    cut, lengths = case.sizes["keys"] // 2, arguments["lengths"]
    parts = []
    for keys, left in (
        (slice(None, cut), np.minimum(lengths, cut)),
        (slice(cut, None), np.maximum(lengths - cut, 0)),
    ):
        cropped = {name: arguments[name][..., keys, :] for name in ("k", "v")}
        parts.append({**arguments, **cropped, "lengths": left})
    return parts


RESULT = (Output("out"), Output("lse", dtype="float32", row_axes=0))

CONTRACTS = (
    Contract(
        operation="lean_attention.attend",
        sizes=SIZES,
        arrays=(
            Array("q", "batch heads queries d", role="query"),
            Array("k", "batch kv_heads keys d", role="key"),
            Array("v", "batch kv_heads keys dv", role="value"),
            Array("lengths", "batch", make=make_lengths),
        ),
        outputs=RESULT,
        parameters=parameters,
        linear_in=("v",),
        key_arrays=("k", "v"),
        permutable=lambda case: not case.parameters["causal"] and whole(case),
        causal=lambda case: case.parameters["causal"],
        poison=poison_beyond,
        split=halves,
        cells={
            "noncausal self": keys_cell(False, 0),
            "causal self": keys_cell(True, 0),
            "noncausal cross": keys_cell(False, 3),
            "causal cross": keys_cell(True, 3),
            "right": lambda case: case.with_(seed=1),
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
            ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
            ("a length beyond the keys", "lengths", lambda a: a["lengths"] + 1000),
            ("a negative length", "lengths", lambda a: a["lengths"] - 1000),
            ("lengths as floats", "lengths", lambda a: a["lengths"] + 0.5),
            ("a length too many", "lengths", lambda a: np.append(a["lengths"], 0)),
            ("no lengths", "lengths", lambda a: None),
            ("another order", "order", lambda a: "reversed"),
            *wrong_integers("N", "G", "M"),
        ),
    ),
)


def check_schedules(trial: Trial) -> None:
    """Tiles, workers, blocks of queries and the order of the line: the same truth for all."""
    arguments = trial.arguments()
    rng = trial.case.generator("schedules")
    for _ in range(4):
        chosen = {
            "N": int(rng.choice([n for n in TILES if trial.kernel.supports("N", n)])),
            "G": int(rng.choice([g for g in WORKERS if trial.kernel.supports("G", g)])),
            "M": [None, 1, 3, 16][rng.integers(4)],
            "order": ["natural", "paired"][rng.integers(2)],
        }
        chosen = {n: value for n, value in chosen.items() if trial.kernel.supports(n, value)}
        try:
            changed = {**arguments, **chosen}
            trial.judge(trial.run(changed), changed)
        except Violation as violation:
            violation.message += f" ({', '.join(f'{n}={x}' for n, x in chosen.items())})"
            raise


LAWS = (
    Law(
        "schedule",
        "Any tile, any number of workers, any order of the line: the same attention.",
        ("K10",),
        draw_anywhere,
        check_schedules,
        applies=lambda contract, kernel: contract.operation == "lean_attention.attend",
        examples=0.5,
    ),
)
