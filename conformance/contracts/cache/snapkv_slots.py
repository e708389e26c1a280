"""Contracts of SnapKV, the slots: gathered from a prompt, then decoded on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.cache.snapkv_selection import (
    CELLS,
    HEADS,
    window_sizes,
)
from attnspec.reference.cache.snapkv import State, init_state
from attnspec.reference.dense.attention import attend

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
    kept = np.any(kept.reshape(*k.shape[:2], -1, k.shape[-2]), axis=2)
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
