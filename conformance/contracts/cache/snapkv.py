"""Contracts of SnapKV: the prompt, what it keeps, and what that must not depend on.

The stages of the selection are in `snapkv_selection`, the slots and the tokens that follow in
`snapkv_slots`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.contract import Array, Contract, Output, Ranking
from attnspec.conformance.contracts.cache.snapkv_selection import (
    CELLS,
    PROMPT,
    left_padding,
    nan_in_padding,
)
from attnspec.conformance.contracts.cache.snapkv_slots import STATE, WRONG_KEYS, K, V
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.cache.snapkv import State, compress, init_state
from attnspec.reference.cache.snapkv_selection import (
    POOLS,
    REDUCTIONS,
    pool_scores,
    prefix_scores,
    reduce_groups,
    window_attention,
)
from attnspec.reference.dense.attention import attend

Q = Array("q", "batch heads queries d", role="query")


@st.composite
def capacities(draw: st.DrawFn, sizes: Mapping[str, int]) -> int:
    """Mostly less than the prompt, if that is longer than the window; else more."""
    window, queries, keys = sizes["window"], sizes["queries"], sizes["keys"]
    least = window + 1 if queries >= window else max(window, keys) + 1
    most = draw(st.sampled_from((least + 1, (least + keys) // 2, keys + 1)))
    return draw(st.integers(least, max(least, most)))


def prompt_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "w": st.just(sizes["window"]),
        "C": capacities(sizes),
        "p": st.sampled_from([3, 5, 7, 1]),
        "pool": st.sampled_from(("max", *POOLS)),
        "gqa": st.sampled_from(("group_mean", *REDUCTIONS)),
    }


def real_keys(arguments: Mapping[str, Any]) -> np.ndarray:
    """bool (batch, 1, T), False at padding."""
    mask, k = arguments.get("mask"), arguments["k"]
    return np.ones((len(k), 1, k.shape[-2]), bool) if mask is None else mask[:, None, :]


def kept_tokens(pos: np.ndarray, arguments: Mapping[str, Any]) -> np.ndarray:
    """bool (batch, slot_heads, T): the tokens whose positions are in the slots; -1 is padding."""
    kept = np.zeros((*pos.shape[:-1], arguments["k"].shape[-2] + 1), bool)
    np.put_along_axis(kept, np.clip(pos, -1, kept.shape[-1] - 2), True, axis=-1)
    return kept[..., :-1]


def votes(arguments: Mapping[str, Any]) -> Ranking:
    """The smoothed votes for the prefix; the window is kept whatever it gets."""
    k, w, C = arguments["k"], arguments["w"], arguments["C"]
    real, T = real_keys(arguments), k.shape[-2]
    if T < C:
        everything = np.broadcast_to(real, (*k.shape[:2], T))
        return Ranking(np.zeros(everything.shape), T, allowed=everything, forced=everything)
    A = window_attention(arguments["q"], k, w, arguments.get("mask"))
    s = pool_scores(prefix_scores(A, w), arguments["p"], arguments["pool"])
    m = reduce_groups(s, k.shape[1], arguments["gqa"])
    scores = np.concatenate([m, np.zeros_like(m, shape=(*m.shape[:-1], w))], axis=-1)
    real = np.broadcast_to(real, scores.shape)
    return Ranking(scores, C, allowed=real, forced=real & (np.arange(T) >= T - w))


def keep(arguments: Mapping[str, Any], kept: np.ndarray) -> tuple[np.ndarray, State]:
    """The prompt's result, had the votes fallen on the tokens `kept`."""
    k, v, w, C = (arguments[name] for name in ("k", "v", "w", "C"))
    real, T = real_keys(arguments), k.shape[-2]
    out, _ = attend(arguments["q"], k, v, causal=True, mask=real[:, :, None, :])
    if T < C:
        pos = np.broadcast_to(np.arange(T), k.shape[:-1])
        return out, State(k, v, np.where(real, pos, -1), T)
    # Where padding has to fill the slots, the first of it does.
    prefix = np.argsort(~kept[..., : T - w], axis=-1, kind="stable")[..., : C - w]
    k_c, v_c, pos = compress(k, v, np.sort(prefix, axis=-1), w)
    hidden = ~np.take_along_axis(np.broadcast_to(real, (*pos.shape[:-1], T)), pos, axis=-1)
    return out, State(k_c, v_c, np.where(hidden, -1, pos), T)


def filled(arguments: Mapping[str, Any]) -> State:
    """A state that has seen the prompt already."""
    k, v = arguments["k"], arguments["v"]
    pos = np.broadcast_to(np.arange(k.shape[-2]), k.shape[:-1])
    return State(k, v, pos, k.shape[-2])


CONTRACTS = (
    Contract(
        operation="snapkv.prefill",
        sizes={**PROMPT, "dv": (1, 24)},
        arrays=(Q, K, V, Array("mask", "batch keys", make=left_padding, optional=True)),
        outputs=(
            *STATE[:3],
            Output("state.pos", "selection", chosen=kept_tokens),
            STATE[4],
        ),
        parameters=prompt_parameters,
        ranking=votes,
        follow=keep,
        linear_in=("v",),
        causal=lambda case: True,
        poison=nan_in_padding("k", "v"),
        neutral={
            "mask": lambda case: np.ones(case.shape("batch keys"), bool),
            "state": lambda case: init_state(
                np.ones(case.shape("batch kv_heads keys d")),
                np.ones(case.shape("batch kv_heads keys dv")),
            ),
        },
        cells=CELLS,
        bad_inputs=(
            *WRONG_KEYS,
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
            ("a window as large as the cache", "w", lambda a: a["C"]),
            ("an empty window", "w", lambda a: 0),
            ("a cache for the window only", "C", lambda a: a["w"]),
            ("a pool of even width", "p", lambda a: 4),
            ("a pool without a width", "p", lambda a: 0),
            ("an unknown pool", "pool", lambda a: "median"),
            ("an unknown reduction", "gqa", lambda a: "first"),
            ("an integer mask", "mask", lambda a: np.ones(a["k"].shape[::2], np.int64)),
            ("a mask of another length", "mask", lambda a: np.ones((len(a["k"]), 2), bool)),
            ("a second prompt", "state", filled),
        ),
    ),
)


def prompts(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, cross=True)


def check_prompt(trial: Trial) -> None:
    """Another capacity, pool and reduction change not one bit of the prompt's own output."""
    arguments = trial.arguments()
    others = {"C": arguments["C"] + 1, "p": 9, "pool": "max", "gqa": "per_query_head"}
    first = trial.run(arguments)["out"]
    if not np.array_equal(first, trial.run({**arguments, **others})["out"]):
        raise Violation("out", "depends on what is kept of the prompt")


def check_votes(trial: Trial) -> None:
    """Other values change none of the positions kept."""
    arguments = trial.arguments()
    first = trial.run(arguments)["state.pos"]
    second = trial.run({**arguments, "v": 3.0 - arguments["v"]})["state.pos"]
    if not np.array_equal(first, second):
        raise Violation("state.pos", "depends on the values")


def _of_prefill(contract: Contract, kernel: Kernel) -> bool:
    return contract.operation == "snapkv.prefill"


LAWS = (
    Law(
        "prompt",
        "What is kept of a prompt does not change its output.",
        ("K10",),
        prompts,
        check_prompt,
        applies=_of_prefill,
        examples=0.3,
    ),
    Law(
        "votes",
        "Queries and keys decide what is kept, values do not.",
        ("K6",),
        prompts,
        check_votes,
        applies=_of_prefill,
        examples=0.3,
    ),
)
