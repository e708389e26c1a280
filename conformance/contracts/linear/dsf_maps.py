"""Contracts of the maps of `dsf`: a mixer written as a system."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.dsf import BATCH, MADE, VALUES, positive
from attnspec.conformance.values import longer

MAPS = {"batch": (1, 2), "tokens": (1, 8), "n": (1, 6)}
DV = {"dv": st.integers(1, 4)}
BAD_DV = (("dv = 0", "dv", lambda a: 0), ("dv that is a float", "dv", lambda a: 1.0))

CONTRACTS = (
    Contract(
        operation="dsf.from_attention",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("phi_q", f"{BATCH} n"),
            Array("psi_k", f"{BATCH} n"),
            Array("eta", make=positive(BATCH, low=0.1, size=2.0)),
        ),
        outputs=MADE,
        parameters=lambda sizes: {**DV, "form": st.sampled_from([1, 2])},
        bad_inputs=(
            *BAD_DV,
            ("a third form", "form", lambda a: 3),
            ("a normaliser of 0", "eta", lambda a: 0 * a["eta"]),
            ("a normaliser a channel", "eta", lambda a: a["phi_q"]),
            ("other features of keys", "psi_k", lambda a: a["psi_k"].repeat(2, axis=-1)),
        ),
    ),
    Contract(
        operation="dsf.from_normalised_attention",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(Array("q", f"{BATCH} n"), Array("k", f"{BATCH} n"), Array("n", BATCH)),
        outputs=MADE,
        parameters=lambda sizes: DV,
        bad_inputs=(*BAD_DV, ("n a channel", "n", lambda a: a["q"])),
    ),
    Contract(
        operation="dsf.from_s6",
        sizes={**MAPS, "dv": (1, 4)},
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("Delta", make=positive(f"{BATCH} dv")),
            Array("A", make=positive("dv n", size=2.0)),
            Array("b", f"{BATCH} n"),
            Array("c", f"{BATCH} n"),
            Array("D", "dv", optional=True),
        ),
        outputs=MADE,
        bad_inputs=(
            ("a negative step", "Delta", lambda a: -1 - a["Delta"]),
            ("A stored negative", "A", lambda a: -1 - a["A"]),
            ("b of other numbers", "b", lambda a: a["b"].repeat(2, axis=-1)),
            ("D of another width", "D", lambda a: np.ones(99)),
        ),
    ),
    Contract(
        operation="dsf.from_ssd",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("Delta", make=positive(BATCH)),
            Array("a", make=positive("batch", size=1.0)),
            Array("b", f"{BATCH} n"),
            Array("c", f"{BATCH} n"),
        ),
        outputs=MADE,
        parameters=lambda sizes: DV,
        bad_inputs=(
            *BAD_DV,
            ("a negative rate", "a", lambda a: -1 - a["a"]),
            ("a rate a token", "a", lambda a: a["Delta"]),
        ),
    ),
    Contract(
        operation="dsf.from_qlstm",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        arrays=tuple(Array(name, f"{BATCH} n") for name in ("f", "i", "o")),
        outputs=MADE,
        parameters=lambda sizes: {
            "alpha": st.sampled_from([1.0, 2.5, 0.0, -1.0]),
            "reversed": st.booleans(),
        },
        bad_inputs=(
            ("alpha as text", "alpha", lambda a: "1"),
            ("reversed = 1", "reversed", lambda a: 1),
            ("o of other tokens", "o", lambda a: longer(a["o"])),
        ),
    ),
    Contract(
        operation="dsf.from_rg_lru",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        arrays=(Array("r", f"{BATCH} n"), Array("g", f"{BATCH} n"), Array("lam", "n")),
        outputs=MADE,
        parameters=lambda sizes: {"c": st.sampled_from([8.0, 1.0])},
        bad_inputs=(("c = 0", "c", lambda a: 0.0), ("lam a token", "lam", lambda a: a["r"])),
    ),
    Contract(
        operation="dsf.taylor_features",
        sizes={"batch": (1, 2), "tokens": (1, 6), "n": (1, 4)},
        queries="tokens",
        keys="tokens",
        arrays=(Array("x", f"{BATCH} n"),),
        outputs=(Output("features"),),
        parameters=lambda sizes: {"P": st.integers(0, 4), "packed": st.booleans()},
        bad_inputs=(
            ("a negative order", "P", lambda a: -1),
            ("packed = 1", "packed", lambda a: 1),
        ),
    ),
)  # fmt: skip
