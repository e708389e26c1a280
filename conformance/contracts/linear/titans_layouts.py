"""Contracts of Titans beside attention: prefix, masks, gate, MAC, MAG and MAL."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.titans import (
    BAD_SCALES,
    STATES,
    layers_of,
    one_rate,
    rates_of,
    wrong_integers,
)

SIZES = {"batch": (1, 2), "tokens": (1, 20), "prefix": (0, 4), "D": (1, 16), "d": (1, 12),
         "hidden": (1, 8)}  # fmt: skip


def _layers(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    return layers_of(rng, case.shape("batch"), case.shape("d hidden D"))


def _three(widths: str) -> Any:
    """Matrices for queries, keys and values from D to the named widths."""

    def make(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
        D = case.sizes["D"]
        return tuple(rng.standard_normal((D, width)) / np.sqrt(D) for width in case.shape(widths))

    return make


def _rates(prefixed: bool) -> Any:
    def make(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
        batch, tokens, prefix = case.shape("batch tokens prefix")
        theta, eta, alpha = rates_of(rng, (batch, tokens + prefix * prefixed), case)
        # A deep memory behind projections of its own grows from token to token: over long sequences
        # full steps overflow float64.
        return theta / max(1.0, tokens / 16), eta, alpha

    return make


def _gains(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    return tuple(1 + 0.2 * rng.standard_normal(case.sizes["D"]) for _ in range(2))


P = Array("P", "prefix D")
X = Array("x", "batch tokens D")
MEMORY = (Array("W", make=_layers), Array("S", make=_layers, optional=True))
ATTN, MEM = Array("attn", make=_three("d d D")), Array("mem", make=_three("d d D"))
GAINS = Array("gains", make=_gains)
OUTPUTS = (Output("o"), *STATES)
BAD_GAINS = (
    ("one gain", "gains", lambda a: a["gains"][:1]),
    ("no gains", "gains", lambda a: None),
    ("wider gains", "gains", lambda a: tuple(np.repeat(g, 2) for g in a["gains"])),
)
BAD = (
    ("a prefix of another width", "P", lambda a: np.repeat(a["P"], 2, axis=-1)),
    ("two matrices", "attn", lambda a: a["attn"][:2]),
    ("no matrices", "mem", lambda a: None),
    (
        "matrices of another width",
        "mem",
        lambda a: tuple(np.repeat(m, 2, axis=0) for m in a["mem"]),
    ),
    ("no layers", "W", lambda a: ()),
    ("two rates", "rates", lambda a: a["rates"][:2]),
    ("rates of more rows", "rates", one_rate(0, lambda x: np.repeat(x, 2, axis=-1))),
    ("momentum above 1", "rates", one_rate(1, lambda x: 1.5 + x)),
    *wrong_integers("b"),
    *BAD_SCALES,
)


def _chunks(sizes: Any) -> dict[str, Any]:
    return {
        "b": st.sampled_from([1, 2, 4, 16, 64]),
        "loss_scale": st.sampled_from([2.0, 0.5]),
        "normalise": st.booleans(),
    }


def _windows(sizes: Any) -> dict[str, Any]:
    return {"w": st.integers(1, 12), **_chunks(sizes)}


def _contract(name: str, arrays: tuple[Array, ...], **rest: Any) -> Contract:
    return Contract(
        operation=f"titans.{name}", sizes=SIZES, queries="tokens", keys="tokens", arrays=arrays,
        outputs=OUTPUTS, cancelling=("drates",), **rest,
    )  # fmt: skip


CONTRACTS = (
    Contract(
        operation="titans.persistent_prefix",
        sizes={axis: SIZES[axis] for axis in ("batch", "tokens", "prefix", "D")},
        arrays=(P, X),
        outputs=(Output("xt", kind="copy"),),
        bad_inputs=BAD[:1],
    ),
    Contract(
        operation="titans.titans_mask_mac",
        sizes={},
        arrays=(),
        outputs=(Output("mask", kind="exact"),),
        parameters=lambda sizes: {
            "T": st.integers(0, 20),
            "C": st.integers(1, 8),
            "N_p": st.integers(0, 4),
            "tokenwise": st.booleans(),
        },
        bad_inputs=(
            *wrong_integers("C"),
            ("a negative length", "T", lambda a: -1),
            ("a negative prefix", "N_p", lambda a: -1),
        ),
    ),
    Contract(
        operation="titans.titans_mask_mag",
        sizes={},
        arrays=(),
        outputs=(Output("mask", kind="exact"),),
        parameters=lambda sizes: {
            "T": st.integers(0, 20),
            "w": st.integers(1, 24),
            "N_p": st.integers(0, 4),
        },
        bad_inputs=(
            *wrong_integers("w"),
            ("a fractional length", "T", lambda a: 2.5),
            ("a negative prefix", "N_p", lambda a: -1),
        ),
    ),
    Contract(
        operation="titans.gate",
        sizes={axis: SIZES[axis] for axis in ("batch", "tokens", "D")},
        queries="tokens",
        keys="tokens",
        arrays=(Array("y", "batch tokens D"), Array("h", "batch tokens D"), GAINS),
        outputs=(Output("o"),),
        causal=lambda case: True,
        bad_inputs=(*BAD_GAINS, ("more rows", "h", lambda a: np.repeat(a["h"], 2, axis=-2))),
    ),
    _contract(
        "mac_segment",
        (Array("seg", "batch tokens D"), P, *MEMORY, ATTN, MEM, Array("rates", make=_rates(False)),
         GAINS),
        parameters=lambda sizes: {**_chunks(sizes), "tokenwise": st.booleans()},
        causal=lambda case: bool(case.parameters["tokenwise"]),
        bad_inputs=(*BAD, *BAD_GAINS),
    ),
    _contract(
        "mag",
        (X, P, *MEMORY, ATTN, MEM, Array("rates", make=_rates(True)), GAINS),
        parameters=_windows,
        causal=lambda case: True,
        bad_inputs=(*BAD, *BAD_GAINS, *wrong_integers("w")),
    ),
    _contract(
        "mal",
        (X, P, *MEMORY, ATTN, MEM, Array("rates", make=_rates(True))),
        parameters=_windows,
        causal=lambda case: True,
        bad_inputs=(*BAD, *wrong_integers("w")),
    ),
)  # fmt: skip
