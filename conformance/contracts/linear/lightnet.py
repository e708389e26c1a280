"""Contracts of LightNet's recurrences: gates, the general rule, the scan, the mechanism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.linear.lightnet_forms import causal_in_chunks, decay_in_chunks
from attnspec.conformance.values import feed_tokens, longer, make_values
from attnspec.reference.linear.lightnet import lightnet_causal

GROUPED = {"batch": (1, 2), "kv_heads": (1, 2), "group": (1, 3), "d": (1, 24), "dv": (1, 24)}
PLAIN = {"batch": (1, 2), "kv_heads": (1, 3), "tokens": (1, 24), "d": (1, 24), "dv": (1, 24)}
Drawn = dict[str, st.SearchStrategy[Any]]
SCALE = st.sampled_from([1.0, 0.5])


def padding(case: Case, tokens: int) -> np.ndarray:
    """bool (batch, tokens), True = no token: on the side an option names, else now and then."""
    rng = case.generator("padding")
    batch = case.sizes["batch"]
    if {"left", "right"} & set(case.options):
        padded = np.arange(tokens) < rng.integers(0, tokens + 1, (batch, 1))
        return padded if "left" in case.options else padded[:, ::-1]
    scattered = rng.random((batch, tokens)) < 0.3
    return np.asarray(scattered & (rng.random((batch, 1)) < 0.3))


def _padded(axes: str, role: str, fill: float) -> Any:
    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        shape = case.shape(axes)
        x = make_values(case.values, rng, shape, role)
        return np.where(padding(case, shape[2])[:, None, :, None], fill, x)

    return make


def make_log_decays(rng: np.random.Generator, case: Case) -> np.ndarray:
    """A rate of its own for every token and channel, resets and none at all among them."""
    shape = case.shape("batch kv_heads tokens d")
    g = -rng.exponential(0.3, shape)
    strong = rng.random((*shape[:2], 1, shape[3])) < 0.15
    return np.where(rng.random(shape) < 0.2, 0.0, np.where(strong, -50.0, g))


def make_z(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Logs of sums; some channels have seen nothing."""
    z = 2 * rng.standard_normal(case.shape("batch kv_heads d"))
    return np.where(rng.random(z.shape) < 0.2, -np.inf, z)


def make_state(leading: str) -> Any:
    """(S, z); where a channel has seen nothing its S is 0."""

    def make(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, np.ndarray]:
        z = 2 * rng.standard_normal(case.shape(f"{leading} d"))
        z = np.where(rng.random(z.shape) < 0.2, -np.inf, z)
        S = rng.standard_normal(case.shape(f"{leading} d dv"))
        return np.where(np.isneginf(z)[..., None], 0.0, S), z

    return make


def make_rule_state(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    """(s, Delta, m) as a prefix leaves it: Delta is at least 1 where there was a token."""
    m = rng.standard_normal(case.shape("batch kv_heads d"))
    m = np.where(rng.random(m.shape) < 0.2, -np.inf, m)
    Delta = np.where(np.isneginf(m), 0.0, 1 + rng.exponential(2.0, m.shape))
    s = rng.standard_normal(case.shape("batch kv_heads d dv")) * Delta[..., None]
    return s, Delta, m


def empty_state(whole: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    shape = (*whole["q"].shape[:-2], whole["q"].shape[-1])
    return np.zeros((*shape, whole["v"].shape[-1])), np.full(shape, -np.inf)


def _whole(whole: Mapping[str, Any]) -> np.ndarray:
    kept = {name: value for name, value in whole.items() if name != "state"}
    return lightnet_causal(**kept)[0]


def _side(side: str) -> Any:
    return lambda case: case.with_(options=(side,))


def _more_keys(extra: int) -> Any:
    return lambda case: case.with_(sizes={"keys": case.sizes["queries"] + extra})


CELLS = {
    "left": _side("left"),
    "right": _side("right"),
    "MHA": heads_cell(2, 1),
    "GQA": heads_cell(2, 3),
    "MQA": heads_cell(1, 4),
}
Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d", make=_padded("batch kv_heads tokens d", "key", -np.inf))
V = Array("v", "batch kv_heads tokens dv", make=_padded("batch kv_heads tokens dv", "value", 0.0))
STEP = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch kv_heads tokens d", role="key"),
    Array("v", "batch kv_heads tokens dv", role="value"),
)
STATE = (
    Output("S", dtype="float32", by_query=False),
    Output("z", dtype="float32", by_query=False),
)
OWN = (
    Array("q", "batch kv_heads tokens d", role="query"),
    Array("kbar", "batch kv_heads tokens d", role="key"),
    Array("v", "batch kv_heads tokens dv", role="value"),
)

BAD_HEADS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
    ("other kv heads in v", "v", lambda a: a["v"].repeat(2, axis=-3)),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)
BAD_SCALE = (
    ("a scale of 0", "scale", lambda a: 0.0),
    ("a scale that is a string", "scale", lambda a: "1"),
    ("a scale that is true", "scale", lambda a: True),
)
BAD_STATE = (
    ("a state that is S alone", "state", lambda a: empty_state(a)[0]),
    ("a state of three", "state", lambda a: (*empty_state(a), empty_state(a)[1])),
    ("a state of another width", "state", lambda a: tuple(x[..., :0] for x in empty_state(a))),
)


CONTRACTS = (
    Contract(
        operation="lightnet.additive_gates",
        sizes={axis: span for axis, span in PLAIN.items() if axis != "dv"},
        queries="tokens",
        keys="tokens",
        arrays=(K, Array("z0", make=make_z, optional=True)),
        outputs=(
            Output("kbar"),
            Output("log_decay", dtype="float32"),
            Output("z", dtype="float32", by_query=False),
        ),
        causal=lambda case: True,
        neutral={"z0": lambda case: np.full(case.shape("batch kv_heads d"), -np.inf)},
        bad_inputs=(
            ("z0 of another width", "z0", lambda a: np.zeros((*a["k"].shape[:-2], 99))),
            ("z0 with tokens", "z0", lambda a: np.zeros(a["k"].shape)),
            ("an integer z0", "z0", lambda a: np.zeros(a["k"][..., 0, :].shape, np.int64)),
        ),
    ),
    Contract(
        operation="lightnet.additive_rule",
        sizes=PLAIN,
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("q", "batch kv_heads tokens d", role="query"),
            Array("k", "batch kv_heads tokens d", role="value"),
            V,
            Array("g", make=_padded("batch kv_heads tokens d", "key", -np.inf)),
            Array("state", make=make_rule_state, optional=True),
        ),
        outputs=(
            Output("o", cancels=True),
            Output("s", dtype="float32", by_query=False, cancels=True),
            Output("Delta", dtype="float32", by_query=False),
            Output("m", dtype="float32", by_query=False),
        ),
        linear_in=("q",),
        causal=lambda case: True,
        cancelling=("dg", "dstate"),
        bad_inputs=(
            ("gates of other tokens", "g", lambda a: longer(a["g"])),
            ("no gates", "g", lambda a: None),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("grouped heads", "k", lambda a: a["k"].repeat(2, axis=-3)),
            ("a state of two", "state", lambda a: empty_state(a)),
        ),
    ),
    Contract(
        operation="lightnet.vector_decay_attend",
        sizes=PLAIN,
        queries="tokens",
        keys="tokens",
        arrays=(
            *OWN,
            Array("log_decay", make=make_log_decays),
            Array("S0", "batch kv_heads d dv", optional=True),
        ),
        outputs=(Output("o"), STATE[0]),
        parameters=lambda sizes: {"scale": SCALE},
        linear_in=("q", "v S0", "kbar S0"),
        causal=lambda case: True,
        form=decay_in_chunks,
        cancelling=("dlog_decay",),
        neutral={"S0": lambda case: np.zeros(case.shape("batch kv_heads d dv"))},
        bad_inputs=(
            ("a log decay above 0", "log_decay", lambda a: 1.0 - a["log_decay"]),
            ("a log decay that is NaN", "log_decay", lambda a: a["log_decay"] + np.nan),
            ("log decays of other tokens", "log_decay", lambda a: longer(a["log_decay"])),
            ("a log decay a head", "log_decay", lambda a: a["log_decay"][..., 0]),
            ("more values than keys", "v", lambda a: longer(a["v"])),
            ("a state of another width", "S0", lambda a: empty_state(a)[0][..., :0]),
            *BAD_SCALE,
        ),
    ),
    Contract(
        operation="lightnet.lightnet_causal",
        sizes={**GROUPED, "tokens": (1, 24)},
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, Array("state", make=make_state("batch heads"), optional=True)),
        outputs=(Output("o"), *STATE),
        parameters=lambda sizes: {"scale": SCALE},
        linear_in=("q",),
        causal=lambda case: True,
        form=causal_in_chunks,
        cancelling=("dk",),
        stream=Stream(
            arrays=STEP,
            start=empty_state,
            feed=feed_tokens,
            whole=_whole,
        ),
        cells={"causal self": lambda case: case, **CELLS},
        bad_inputs=(
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            *BAD_HEADS,
            *BAD_STATE,
            *BAD_SCALE,
        ),
    ),
    Contract(
        operation="lightnet.lightnet_noncausal",
        sizes={**GROUPED, "queries": (1, 24), "keys": (1, 24)},
        arrays=(
            Array("q", "batch heads queries d", role="query"),
            Array(
                "k", "batch kv_heads keys d", make=_padded("batch kv_heads keys d", "key", -np.inf)
            ),
            Array(
                "v", "batch kv_heads keys dv", make=_padded("batch kv_heads keys dv", "value", 0.0)
            ),
        ),
        outputs=(Output("o"),),
        parameters=lambda sizes: {"scale": SCALE},
        linear_in=("q", "v"),
        key_arrays=("k", "v"),
        cancelling=("dk",),
        cells={"noncausal self": _more_keys(0), "noncausal cross": _more_keys(5), **CELLS},
        bad_inputs=(*BAD_HEADS, *BAD_SCALE),
    ),
    Contract(
        operation="lightnet.decode_step",
        sizes={**GROUPED, "tokens": (1, 6)},
        least={"tokens": 1},
        arrays=(
            Array("state", make=make_state("batch heads")),
            Array("q", "batch heads 1 d", role="query"),
            Array("k", "batch kv_heads 1 d", role="key"),
            Array("v", "batch kv_heads 1 dv", role="value"),
        ),
        outputs=(Output("o"), *STATE),
        parameters=lambda sizes: {"scale": SCALE},
        linear_in=("q",),
        stream=Stream(
            arrays=STEP, start=empty_state, feed=feed_tokens, whole=_whole, chunked=False
        ),
        bad_inputs=(
            ("two tokens in q", "q", lambda a: longer(a["q"])),
            ("no state", "state", lambda a: None),
            *BAD_HEADS,
            *BAD_STATE,
            *BAD_SCALE,
        ),
    ),
)
