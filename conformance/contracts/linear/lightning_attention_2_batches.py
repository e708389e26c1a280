"""Contracts of Lightning Attention-2 over batches of unequal sequences, packed and padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.lightning_attention_2 import (
    BAD_HEADS,
    BAD_SLOPES,
    BAD_STATE,
    S0,
    SELF,
    SLOPES,
    STATE,
    K,
    Q,
    V,
    blocks,
    in_chunks,
    wrong_integers,
)
from attnspec.conformance.packing import (
    BAD_OFFSETS,
    OFFSETS,
    PACKED,
    Packed,
    cut_rows,
    last_as,
    packed_sizes,
)
from attnspec.conformance.values import longer
from attnspec.reference.linear.lightning_attention_2_batches import attend_packed, attend_padded


def make_valid(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on the left, on the right, in between, or everywhere."""
    batch, tokens = case.shape("batch tokens")
    place = np.arange(tokens)
    first = rng.integers(0, tokens + 1, (batch, 1))
    kinds = [place >= first, place < first, rng.random((batch, tokens)) < 0.7]
    return np.asarray(kinds[int(rng.integers(0, 3))])


def poison_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in every row of a padded token."""
    padded = ~arguments["valid"][:, None, :, None]
    for name in ("q", "k", "v"):
        arguments[name] = np.where(padded, np.nan, arguments[name])
    return arguments


def _packed_state(a: Mapping[str, Any]) -> tuple[int, ...]:
    heads, _, d = a["q"].shape
    return (len(a["offsets"]) - 1, heads, d, a["v"].shape[-1])


BAD_TOKENS = (("more queries than keys", "q", lambda a: longer(a["q"])),)

CONTRACTS = (
    Contract(
        operation="lightning_attention_2.attend_packed",
        sizes=packed_sizes(SELF),
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("q", "heads tokens d", role="query"),
            Array("k", "kv_heads tokens d", role="key"),
            Array("v", "kv_heads tokens dv", role="value"),
            SLOPES,
            OFFSETS,
            Array("S0", "sequences heads d dv", optional=True),
        ),
        outputs=(Output("o"), STATE),
        parameters=blocks,
        linear_in=("q", "v S0", "k S0"),
        cancelling=("ds",),
        form=in_chunks(attend_packed),
        causal=lambda case: True,
        neutral={"S0": lambda case: np.zeros(case.shape("sequences heads d dv"))},
        packed=Packed(cut_rows("q", "k", "v"), ("S0",), handed=last_as("S0")),
        cells=PACKED,
        bad_inputs=(
            *BAD_OFFSETS,
            ("a state for another sequence", "S0", lambda a: np.zeros((9, *_packed_state(a)[1:]))),
            ("a state of another width", "S0", lambda a: np.zeros((*_packed_state(a)[:-1], 99))),
            *(bad for bad in BAD_HEADS if bad[0] != "another batch in v"),
            *BAD_TOKENS,
            *BAD_SLOPES,
            *wrong_integers("block"),
        ),
    ),
    Contract(
        operation="lightning_attention_2.attend_padded",
        sizes=SELF,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, SLOPES, Array("valid", "batch tokens", make=make_valid), S0),
        outputs=(Output("o"), STATE),
        parameters=blocks,
        linear_in=("q", "v S0", "k S0"),
        cancelling=("ds",),
        form=in_chunks(attend_padded),
        causal=lambda case: True,
        poison=poison_padding,
        neutral={"S0": lambda case: np.zeros(case.shape("batch heads d dv"))},
        cells={"left": lambda case: case, "right": lambda case: case},
        bad_inputs=(
            ("valid as numbers", "valid", lambda a: a["valid"].astype(np.int64)),
            ("valid for more tokens", "valid", lambda a: a["valid"].repeat(2, axis=-1)),
            ("valid with an axis of heads", "valid", lambda a: a["valid"][:, None]),
            ("no valid", "valid", lambda a: None),
            *BAD_TOKENS,
            *BAD_HEADS,
            *BAD_SLOPES,
            *BAD_STATE,
            *wrong_integers("block"),
        ),
    ),
)
