"""Contracts of SnapKV: the prompt, the slots it leaves and the tokens that follow.

The stages of the selection are in `snapkv_selection`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Ranking, Stream
from attnspec.conformance.contracts.cache.snapkv_selection import (
    CELLS,
    HEADS,
    PROMPT,
    left_padding,
    nan_in_padding,
    window_sizes,
)
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
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")
TOKEN = (
    Array("q", "batch heads 1 d", role="query"),
    Array("k", "batch kv_heads 1 d", role="key"),
    Array("v", "batch kv_heads 1 dv", role="value"),
)
STREAM = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch kv_heads tokens d", role="key"),
    Array("v", "batch kv_heads tokens dv", role="value"),
)
STATE = (
    Output("out"),
    Output("state.k", "copy"),
    Output("state.v", "copy"),
    Output("state.pos", "exact"),
    Output("state.seen", "exact", plain=True),
)


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


def make_slots(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Distinct positions of the prefix for each head, ascending."""
    batch, kv_heads, keys = case.shape("batch kv_heads keys")
    slot_heads = case.heads if rng.random() < 0.3 else kv_heads
    prefix = keys - case.parameters["w"]
    n = int(rng.integers(1, prefix + 1))
    return np.sort(rng.random((batch, slot_heads, prefix)).argsort(axis=-1)[..., :n], axis=-1)


def nan_in_dropped(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no head keeps."""
    k, idx = arguments["k"], arguments["idx"]
    kept = np.zeros((*idx.shape[:2], k.shape[-2]), bool)
    np.put_along_axis(kept, idx, True, axis=-1)
    kept = kept.reshape(*k.shape[:2], -1, k.shape[-2]).any(axis=2)
    kept[..., k.shape[-2] - arguments["w"] :] = True
    for name in ("k", "v"):
        arguments[name] = np.where(kept[..., None], arguments[name], np.nan)
    return arguments


def make_state(rng: np.random.Generator, case: Case) -> State:
    """Slots with gaps between their positions, some of them padding at the front."""
    batch, kv_heads, slots = case.shape("batch kv_heads slots")
    slot_heads = case.heads if rng.random() < 0.3 else kv_heads
    shape = (batch, slot_heads, slots)
    pos = np.cumsum(rng.integers(1, 4, shape), axis=-1) - 1
    padded = rng.integers(0, slots + 1, (batch, slot_heads, 1)) * (rng.random() < 0.4)
    k, v = (rng.standard_normal((*shape, case.sizes[axis])) for axis in ("d", "dv"))
    seen = int(pos.max(initial=-1)) + 1 + int(rng.integers(0, 5))
    return State(k, v, np.where(np.arange(slots) < padded, -1, pos), seen)


def nan_in_padded_slots(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    state = arguments["state"]
    real = state.pos[..., None] >= 0
    k, v = np.where(real, state.k, np.nan), np.where(real, state.v, np.nan)
    return {**arguments, "state": state._replace(k=k, v=v)}


def feed(whole: Mapping[str, Any], state: State, first: int, last: int) -> dict[str, Any]:
    tokens = {name: whole[name][..., first:last, :] for name in ("q", "k", "v")}
    return {"state": state, **tokens}


def filled(arguments: Mapping[str, Any]) -> State:
    """A state that has seen the prompt already."""
    k, v = arguments["k"], arguments["v"]
    pos = np.broadcast_to(np.arange(k.shape[-2]), k.shape[:-1])
    return State(k, v, pos, k.shape[-2])


WRONG_KEYS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("k of another dtype", "k", lambda a: a["k"] > 0),
    ("v with fewer tokens than k", "v", lambda a: a["v"][..., :-1, :]),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)

CONTRACTS = (
    Contract(
        operation="snapkv.compress",
        sizes={**HEADS, "window": (1, 6), "keys": (7, 24), "d": (1, 8), "dv": (1, 8)},
        least={"keys": 7},
        arrays=(K, V, Array("idx", "batch slot_heads n", make=make_slots)),
        outputs=(Output("k_c", "copy"), Output("v_c", "copy"), Output("pos", "exact")),
        parameters=window_sizes,
        poison=nan_in_dropped,
        bad_inputs=(
            ("v with fewer tokens than k", "v", lambda a: a["v"][..., :-1, :]),
            ("a slot in the window", "idx", lambda a: a["idx"] + a["k"].shape[-2] - a["w"]),
            ("a negative slot", "idx", lambda a: a["idx"] - a["k"].shape[-2]),
            ("fractional slots", "idx", lambda a: a["idx"] + 0.5),
            ("another batch in idx", "idx", lambda a: a["idx"].repeat(3, axis=0)),
            ("a window as long as the prompt", "w", lambda a: a["k"].shape[-2]),
            ("an empty window", "w", lambda a: 0),
        ),
    ),
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
    Contract(
        operation="snapkv.step",
        sizes={**HEADS, "slots": (0, 16), "tokens": (1, 16), "d": (1, 24), "dv": (1, 24)},
        least={"tokens": 1},
        arrays=(Array("state", make=make_state), *TOKEN),
        outputs=STATE,
        poison=nan_in_padded_slots,
        cells={name: CELLS[name] for name in ("MHA", "GQA", "MQA")},
        bad_inputs=(
            *WRONG_KEYS,
            ("two queries a step", "q", lambda a: a["q"].repeat(2, axis=-2)),
            ("two keys a step", "k", lambda a: a["k"].repeat(2, axis=-2)),
            ("values wider than the state's", "v", lambda a: a["v"].repeat(2, axis=-1)),
        ),
        stream=Stream(
            arrays=STREAM,
            start=lambda whole: init_state(whole["k"], whole["v"]),
            feed=feed,
            whole=lambda whole: attend(**whole, causal=True)[0],
            chunked=False,
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
