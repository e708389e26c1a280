"""Contracts of LightNet over sequences laid end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.lightnet import (
    BAD_HEADS,
    BAD_SCALE,
    GROUPED,
    SCALE,
    STATE,
    make_log_decays,
    make_state,
)
from attnspec.conformance.contracts.linear.lightnet_forms import (
    causal_in_sequences,
    decay_in_sequences,
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
from attnspec.conformance.values import longer, make_values

SIZES = packed_sizes({**GROUPED, "tokens": (1, 24)})


def absent(case: Case) -> np.ndarray:
    """bool (tokens,): which tokens are none, now and then; some sequences have no other."""
    rng = case.generator("absent")
    share = float(rng.choice([0.0, 0.2, 0.7]))
    return rng.random(case.sizes["tokens"]) < share


def _masked(axes: str, role: str, fill: float) -> Any:
    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        x = make_values(case.values, rng, case.shape(axes), role)
        return np.where(absent(case)[:, None], fill, x)

    return make


def make_packed_decays(rng: np.random.Generator, case: Case) -> np.ndarray:
    return make_log_decays(rng, case.with_(sizes={**case.sizes, "batch": 1}))[0]


def no_states(a: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    heads, _, d = a["q"].shape
    shape = (len(a["offsets"]) - 1, heads, d)
    return np.zeros((*shape, a["v"].shape[-1])), np.full(shape, -np.inf)


CONTRACTS = (
    Contract(
        operation="lightnet.vector_decay_packed",
        sizes={axis: span for axis, span in SIZES.items() if axis != "group"},
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("q", "kv_heads tokens d", role="query"),
            Array("kbar", "kv_heads tokens d", role="key"),
            Array("v", "kv_heads tokens dv", role="value"),
            Array("log_decay", make=make_packed_decays),
            OFFSETS,
            Array("S0", "sequences kv_heads d dv", optional=True),
        ),
        outputs=(Output("o"), STATE[0]),
        parameters=lambda sizes: {"scale": SCALE},
        linear_in=("q", "v S0", "kbar S0"),
        causal=lambda case: True,
        form=decay_in_sequences,
        cancelling=("dlog_decay",),
        neutral={"S0": lambda case: np.zeros(case.shape("sequences kv_heads d dv"))},
        packed=Packed(
            cut_rows("q", "kbar", "v", "log_decay"), ("S0",), {"log_decay": 0.0}, last_as("S0")
        ),
        cells=PACKED,
        bad_inputs=(
            ("log decays of other tokens", "log_decay", lambda a: longer(a["log_decay"])),
            ("a log decay a head", "log_decay", lambda a: a["log_decay"][..., 0]),
            ("more values than keys", "v", lambda a: longer(a["v"])),
            ("a state for another sequence", "S0", lambda a: no_states(a)[0].repeat(9, axis=0)),
            ("a state of another width", "S0", lambda a: no_states(a)[0][..., :0]),
            *BAD_OFFSETS,
            *BAD_SCALE,
        ),
    ),
    Contract(
        operation="lightnet.lightnet_packed",
        sizes=SIZES,
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("q", "heads tokens d", role="query"),
            Array("k", make=_masked("kv_heads tokens d", "key", -np.inf)),
            Array("v", make=_masked("kv_heads tokens dv", "value", 0.0)),
            OFFSETS,
            Array("state", make=make_state("sequences heads"), optional=True),
        ),
        outputs=(Output("o"), *STATE),
        parameters=lambda sizes: {"scale": SCALE},
        linear_in=("q",),
        causal=lambda case: True,
        form=causal_in_sequences,
        cancelling=("dk",),
        packed=Packed(
            cut_rows("q", "k", "v"), ("state",), {"k": 1e4, "state": 1e4}, last_as("state")
        ),
        cells=PACKED,
        bad_inputs=(
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            ("a state that is S alone", "state", lambda a: no_states(a)[0]),
            ("a state for another sequence", "state", lambda a: tuple(
                x.repeat(9, axis=0) for x in no_states(a))),
            *(bad for bad in BAD_HEADS if bad[0] != "another batch in v"),
            *BAD_OFFSETS,
            *BAD_SCALE,
        ),
    ),
)  # fmt: skip
