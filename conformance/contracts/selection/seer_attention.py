"""Contracts of SeerAttention: attention inside a block mask, alone and behind its gate.

The gate is in `seer_attention_gate`, selection in `seer_attention_selection`, training in
`seer_attention_training` and decoding in `seer_attention_decode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output, Ranking
from attnspec.conformance.contracts.selection.seer_attention_selection import (
    BAD_RULES,
    even,
    gate_parameters,
    make_Wk,
    make_Wq,
    rank_blocks,
)
from attnspec.reference.primitives.rope import rope
from attnspec.reference.selection.seer_attention import block_sparse_attend

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "tokens": (1, 24),
    "d": (1, 24),
    "dv": (1, 24),
}
SCALE = st.sampled_from([None, 0.5])
Drawn = dict[str, st.SearchStrategy[Any]]


def make_block_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Half of the pairs, those of the future too, which must not matter; one row in five empty."""
    nb = -(-case.sizes["tokens"] // case.parameters["b"])
    shape = (*case.shape("batch heads"), nb, nb)
    return (rng.random(shape) < 0.6) & (rng.random((*shape[:-1], 1)) < 0.8)


def visible(arguments: Mapping[str, Any]) -> np.ndarray:
    """bool (batch, heads, tokens, tokens): what each query may look at."""
    T, b, M = arguments["q"].shape[-2], arguments["b"], arguments["M"]
    tokens = M.repeat(b, axis=-2).repeat(b, axis=-1)[..., :T, :T]
    return np.asarray(tokens & np.tri(T, dtype=bool))


def poison_unread(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query of any head of the group may look at."""
    batch, kv_heads, tokens = case.shape("batch kv_heads tokens")
    by_head = np.any(visible(arguments), axis=-2).reshape(batch, kv_heads, -1, tokens)
    read = np.asarray(np.any(by_head, axis=-2))
    for name in ("k", "v"):
        arguments[name] = np.where(read[..., None], arguments[name], np.nan)
    return arguments


def two_masks(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
    """The selected blocks dealt out between two masks."""
    M = arguments["M"]
    first = case.generator("deal").random(M.shape) < 0.5
    return [{**arguments, "M": M & first}, {**arguments, "M": M & ~first}]


def follow_mask(arguments: Mapping[str, Any], M: np.ndarray) -> Any:
    """What `attend` returns for a block mask M that a kernel has chosen."""
    q, k, base = arguments["q"], arguments["k"], arguments["base"]
    positions = np.arange(q.shape[-2])
    q, k = rope(q, positions, base), rope(k, positions, base)
    scale = arguments["scale"]
    out, lse = block_sparse_attend(q, k, arguments["v"], M, arguments["b"], scale=scale)
    return out, lse, M


def _rank(arguments: Mapping[str, Any]) -> Ranking:
    return rank_blocks(**{n: x for n, x in arguments.items() if n not in ("v", "scale")})


def _more_queries(a: Mapping[str, Any]) -> np.ndarray:
    return np.concatenate([a["q"], a["q"]], axis=-2)


def attend_parameters(sizes: Mapping[str, int]) -> Drawn:
    return {
        "b": st.sampled_from([1, 2, 3, 8, 16, 32, 64, 128]),
        "scale": SCALE,
    }


Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d", role="key")
V = Array("v", "batch kv_heads tokens dv", role="value")
RESULT = (Output("out"), Output("lse", dtype="float32", row_axes=0))
CELLS = {
    "causal self": lambda case: case,
    "MHA": heads_cell(2, 1),
    "GQA": heads_cell(2, 3),
    "MQA": heads_cell(1, 4),
}
BAD_BLOCKS = tuple(
    (f"b = {value}", "b", lambda a, value=value: value) for value in (0, 2.5, None, True)
)
BAD_HEADS = (
    ("more queries than keys", "q", _more_queries),
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
)
BAD_VALUES = (
    ("v with fewer tokens than k", "v", lambda a: a["v"][..., :-1, :]),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)

CONTRACTS = (
    Contract(
        operation="seer_attention.block_sparse_attend",
        sizes=SIZES,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, Array("M", make=make_block_mask)),
        outputs=RESULT,
        parameters=attend_parameters,
        linear_in=("v",),
        causal=lambda case: True,
        poison=poison_unread,
        split=two_masks,
        cells=CELLS,
        bad_inputs=(
            ("a mask of numbers", "M", lambda a: a["M"].astype(np.int64)),
            ("a mask of more blocks", "M", lambda a: a["M"].repeat(2, axis=-1)),
            ("a mask without heads", "M", lambda a: a["M"][:, 0]),
            ("a mask of more heads", "M", lambda a: a["M"].repeat(2, axis=1)),
            ("no mask", "M", lambda a: None),
            *BAD_HEADS,
            *BAD_VALUES,
            *BAD_BLOCKS,
        ),
    ),
    Contract(
        operation="seer_attention.attend",
        sizes={**SIZES, "tokens": (1, 48), "half_gate": (1, 12)},
        fix=even,
        queries="tokens",
        keys="tokens",
        arrays=(
            Q,
            K,
            V,
            Array("Wq", make=make_Wq),
            Array("Wk", make=make_Wk),
        ),
        outputs=(*RESULT, Output("M", kind="selection")),
        parameters=lambda sizes: {**gate_parameters(sizes), "scale": SCALE},
        linear_in=("v",),
        ranking=_rank,
        follow=follow_mask,
        cells=CELLS,
        bad_inputs=(*BAD_HEADS, *BAD_VALUES, *BAD_BLOCKS, *BAD_RULES),
    ),
)
