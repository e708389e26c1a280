"""Contracts of Titans' steps: the memory, its gradient, coefficients, decoding, granular chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.linear.titans import (
    BAD_RATES,
    BAD_SCALES,
    DEEP,
    RATES,
    STATES,
    Drawn,
    K,
    Q,
    V,
    chunks,
    layers_of,
    make_layers,
    rates_of,
    wrong_integers,
)
from attnspec.reference.linear.titans_sequential import MemoryState, titans_sequential


def _rate(place: int) -> Any:
    return lambda rng, case: rates_of(rng, case.shape("batch C"), case)[place]


def _state(rng: np.random.Generator, case: Case) -> MemoryState:
    layers = [make_layers(rng, case) for _ in range(3)]
    pos = int(rng.integers(0, case.parameters["b"] + 1))
    return MemoryState(layers[0], layers[1], layers[2], pos)


def _one_token(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    return rates_of(rng, (*case.shape("batch kv_heads"), 1), case)


def _start(whole: Mapping[str, Any]) -> MemoryState:
    return MemoryState(whole["W0"], whole["W0"], tuple(0 * w for w in whole["W0"]))


def _feed(whole: Mapping[str, Any], state: Any, first: int, last: int) -> dict[str, Any]:
    rows = slice(first, last)
    return {
        "state": state,
        **{name: whole[name][..., rows, :] for name in ("q", "k", "v")},
        "rates": tuple(x[..., rows] for x in whole["rates"]),
        **{name: whole[name] for name in ("b", "loss_scale", "read")},
    }


def _whole(whole: Mapping[str, Any]) -> np.ndarray:
    return titans_sequential(
        whole["W0"], None, *(whole[name] for name in ("k", "v", "q", "rates", "b")),
        loss_scale=whole["loss_scale"], read=whole["read"],
    )[0]  # fmt: skip


def _granular_rates(place: int) -> Any:
    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        many = case.sizes["tokens"] // (1 if place == 0 else case.parameters["c"])
        rates = rates_of(rng, (*case.shape("batch kv_heads"), many), case)
        return rates[place]

    return make


def _granules(sizes: Mapping[str, int]) -> Drawn:
    c = st.shared(st.sampled_from([1, 2, 3, 4, 16, 5]), key="granule")
    return {
        "c": c,
        "batch_size": c.flatmap(lambda c: st.sampled_from([None, 240, c, 2 * c, 3 * c])),
        "loss_scale": st.sampled_from([2.0, 0.5]),
    }


def _matrix(width: str) -> Any:
    return lambda rng, case: (
        rng.standard_normal(case.shape(f"D {width}")) / np.sqrt(case.sizes["D"])
    )


def _layers(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    return layers_of(rng, case.shape("batch"), case.shape("d hidden dv"))


ROWS = {"batch": (1, 3), "tokens": (1, 24), "d": (1, 16), "hidden": (1, 12), "dv": (1, 16)}
LAYERS = Array("W", make=_layers)
BAD_W = (
    ("no layers", "W", lambda a: ()),
    ("one matrix", "W", lambda a: a["W"][0]),
    ("layers that do not fit", "W", lambda a: a["W"][::-1] if a["W"][0].shape[-2] !=
     a["W"][1].shape[-2] else (a["W"][0][..., :0, :],)),
    ("integer layers", "W", lambda a: tuple(np.zeros(w.shape, np.int64) for w in a["W"])),
)  # fmt: skip
INPUTS = {"batch": (1, 2), "tokens": (1, 24), "D": (1, 16), "d": (1, 16)}
X = Array("x", "batch tokens D")

CONTRACTS = (
    Contract(
        operation="titans.mlp_memory",
        sizes=ROWS,
        queries="tokens",
        keys="tokens",
        arrays=(LAYERS, Array("x", "batch tokens d")),
        outputs=(Output("y"),),
        causal=lambda case: True,
        bad_inputs=BAD_W,
    ),
    Contract(
        operation="titans.memory_grad",
        sizes=ROWS,
        queries="tokens",
        keys="tokens",
        arrays=(LAYERS, Array("k", "batch tokens d"), Array("v", "batch tokens dv")),
        outputs=(Output("H1"), Output("H2"), Output("Delta1"), Output("Delta2")),
        parameters=lambda sizes: {"loss_scale": st.sampled_from([2.0, 1.0, 0.25])},
        causal=lambda case: True,
        bad_inputs=(
            *BAD_W,
            *BAD_SCALES,
            ("more values than keys", "v", lambda a: np.repeat(a["v"], 2, axis=-2)),
            ("wider values", "v", lambda a: np.repeat(a["v"], 2, axis=-1)),
        ),
    ),
    Contract(
        operation="titans.titans_coefficients",
        sizes={"batch": (1, 3), "C": (1, 24)},
        queries="C",
        keys="C",
        arrays=tuple(
            Array(name, "batch C", make=_rate(i))
            for i, name in enumerate(("theta", "eta", "alpha"))
        ),
        outputs=(
            Output("beta", row_axes=0),
            Output("m", row_axes=0),
            Output("f", row_axes=0),
            Output("n"),
            Output("G"),
        ),
        causal=None,
        cancelling=("dtheta", "deta", "dalpha"),
        bad_inputs=(
            ("negative steps", "theta", lambda a: -1.0 - a["theta"]),
            ("steps that are NaN", "theta", lambda a: a["theta"] + np.nan),
            ("momentum above 1", "eta", lambda a: 1.5 + a["eta"]),
            ("forgetting below 0", "alpha", lambda a: -0.5 - a["alpha"]),
            ("rates of more tokens", "alpha", lambda a: np.ones((99, 7))),
            ("integer rates", "eta", lambda a: np.zeros(a["eta"].shape, np.int64)),
            ("a number", "theta", lambda a: 0.5),
        ),
    ),
    Contract(
        operation="titans.decode_step",
        sizes=DEEP,
        least={"tokens": 1},
        arrays=(
            Array("state", make=_state),
            Array("q", "batch heads 1 d", role="query"),
            Array("k", "batch kv_heads 1 d"),
            Array("v", "batch kv_heads 1 dv", role="value"),
            Array("rates", make=_one_token),
        ),
        outputs=(
            Output("y"),
            *(Output(name, dtype="float32", by_query=False) for name in ("base1", "base2")),
            *STATES,
            Output("pos", kind="exact", plain=True),
        ),
        parameters=chunks,
        stream=Stream(
            arrays=(Array("W0", make=make_layers), K, V, Q, RATES),
            start=_start,
            feed=_feed,
            whole=_whole,
            chunked=False,
        ),
        bad_inputs=(
            ("two tokens", "q", lambda a: np.repeat(a["q"], 2, axis=-2)),
            ("no state", "state", lambda a: None),
            (
                "more tokens in the chunk than it holds",
                "state",
                lambda a: a["state"]._replace(pos=a["b"] + 1),
            ),
            ("a state of one layer", "state", lambda a: a["state"]._replace(S=a["state"].S[:1])),
            *wrong_integers("b"),
            *BAD_SCALES,
            *BAD_RATES,
        ),
    ),
    Contract(
        operation="titans.titans_chunk_granular",
        sizes=DEEP,
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("W0", make=make_layers),
            Array("S0", make=make_layers, optional=True),
            K,
            V,
            Q,
            *(
                Array(name, make=_granular_rates(i))
                for i, name in enumerate(("theta", "eta", "alpha"))
            ),
        ),
        outputs=(
            Output("y"),
            *STATES,
            *(Output(name, dtype="float32", by_query=False) for name in ("path1", "path2")),
        ),
        parameters=_granules,
        cancelling=("dtheta", "deta", "dalpha"),
        causal=lambda case: True,
        bad_inputs=(
            *wrong_integers("c"),
            ("a period that is no multiple", "batch_size", lambda a: 240 * a["c"] + 0.5),
            *BAD_SCALES,
            ("a rate for more chunks", "eta", lambda a: np.ones((*a["k"].shape[:2], 99))),
            ("forgetting above 1", "alpha", lambda a: a["alpha"] + 1.5),
            ("negative steps", "theta", lambda a: -1.0 - a["theta"]),
            ("no layers", "W0", lambda a: ()),
        ),
    ),
    Contract(
        operation="titans.token_inputs",
        sizes={**INPUTS, "width": (1, 5)},
        queries="tokens",
        keys="tokens",
        arrays=(X, Array("W", make=_matrix("d")), Array("filters", "width d", optional=True)),
        outputs=(Output("y"),),
        parameters=lambda sizes: {"normalise": st.booleans()},
        causal=lambda case: True,
        bad_inputs=(
            ("a matrix of another width", "W", lambda a: np.repeat(a["W"], 2, axis=0)),
            ("filters of another width", "filters", lambda a: np.ones((2, a["W"].shape[1] + 1))),
            ("no filter", "filters", lambda a: np.ones((0, a["W"].shape[1]))),
            ("filters by batch", "filters", lambda a: np.ones((1, 2, a["W"].shape[1]))),
        ),
    ),
    Contract(
        operation="titans.token_step_sizes",
        sizes=INPUTS,
        queries="tokens",
        keys="tokens",
        arrays=(X, *(Array(name, make=_matrix("d")) for name in ("W_theta", "W_eta", "W_alpha"))),
        outputs=tuple(Output(name, row_axes=0) for name in ("theta", "eta", "alpha")),
        parameters=lambda sizes: {"theta_max": st.sampled_from([1.0, 0.1])},
        causal=lambda case: True,
        bad_inputs=(
            ("a matrix of another width", "W_eta", lambda a: np.repeat(a["W_eta"], 2, axis=0)),
            ("steps up to 0", "theta_max", lambda a: 0.0),
            ("steps without a bound", "theta_max", lambda a: float("inf")),
        ),
    ),
)
