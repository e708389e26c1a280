"""Contracts of LightNet's position encodings, and the laws that say what they may tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.lightnet_forms import chunk_state
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.linear.lightnet_positions import tpe

GRIDS = ((3, 4), (5,), (2, 3, 2), (1, 6))
LEADING = st.sampled_from([0, 1, 3])
Drawn = dict[str, st.SearchStrategy[Any]]


def _channels(case: Case, d: int) -> int:
    axes = len(case.parameters["shape"])
    return -(-d // axes)


def make_theta(rng: np.random.Generator, case: Case) -> np.ndarray:
    d = case.parameters.get("d", case.sizes.get("d", 1))
    width = d // 2 if case.parameters.get("lrpe_type") == "rotary" else d
    return rng.uniform(0.0, 1.0, (case.heads, _channels(case, width)))


def make_grid_tokens(rng: np.random.Generator, case: Case) -> np.ndarray:
    tokens = case.parameters["l"] + int(np.prod(case.parameters["shape"]))
    return rng.standard_normal((case.sizes["batch"], case.heads, tokens, case.sizes["d"]))


def make_decays(rng: np.random.Generator, case: Case) -> np.ndarray:
    """As models have them; some forget nothing."""
    lam = rng.uniform(0.05, 0.99, case.heads)
    return np.where(rng.random(case.heads) < 0.2, 1.0, lam)


def make_filters(rng: np.random.Generator, case: Case) -> tuple[Any, ...]:
    made = []
    for _ in case.parameters["axes"]:
        heads = int(rng.integers(1, 3))
        m = int(rng.integers(1, 4))
        made.append((*rng.standard_normal((2, heads, m)), rng.uniform(0.1, 0.9, heads)))
    return tuple(made)


def _grids(sizes: Mapping[str, int]) -> Drawn:
    return {"shape": st.sampled_from(GRIDS), "l": LEADING}


def check_leading(trial: Trial) -> None:
    """Tokens without a position keep their entries; the second half of a lift is 0 there."""
    arguments = trial.arguments()
    got = trial.run(arguments)["out"]
    leading, d = arguments["l"], arguments["x"].shape[-1]
    x = arguments["x"][..., :leading, :]
    exact = np.array_equal(got[..., :leading, :d], x.astype(got.dtype))
    if not exact or np.any(got[..., :leading, d:]):
        raise Violation("leading", "a token without a position was changed")


def _leads(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype)


BAD_GRID = (
    ("a grid without axes", "shape", lambda a: ()),
    ("an empty axis", "shape", lambda a: (3, 0)),
    ("a grid that is a number", "shape", lambda a: 12),
)
BAD_FILTER = (
    ("qp of other heads", "qp", lambda a: a["qp"].repeat(3, axis=0)),
    ("kp of another order", "kp", lambda a: a["kp"].repeat(2, axis=1)),
    ("a decay above 1", "lam", lambda a: a["lam"] + 1),
    ("a decay of 0", "lam", lambda a: 0 * a["lam"]),
    ("a decay that is NaN", "lam", lambda a: np.nan * a["lam"]),
    ("decays of two axes", "lam", lambda a: a["lam"][None]),
)


def tpe_in_chunks(
    x: np.ndarray, qp: np.ndarray, kp: np.ndarray, lam: np.ndarray, state: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    y, _ = tpe(x, qp, kp, lam, state)
    keys = np.ones_like(x[..., :1]) * kp[:, None, :]
    return y, chunk_state(keys, x, np.log(lam)[:, None, None] * np.ones_like(keys), state)


CONTRACTS = (
    Contract(
        operation="lightnet.md_angles",
        sizes={"kv_heads": (1, 3)},
        arrays=(Array("theta", make=make_theta),),
        outputs=(Output("angles", by_query=False),),
        parameters=lambda sizes: {**_grids(sizes), "d": st.integers(1, 9)},
        linear_in=("theta",),
        bad_inputs=(
            ("theta of too few channels", "theta", lambda a: a["theta"][:, :0]),
            ("a negative l", "l", lambda a: -1),
            ("d = 0", "d", lambda a: 0),
            *BAD_GRID,
        ),
    ),
    Contract(
        operation="lightnet.md_lrpe",
        sizes={"batch": (1, 2), "kv_heads": (1, 3), "d": (2, 24)},
        fix=lambda sizes: {**sizes, "d": sizes["d"] // 2 * 2} if "d" in sizes else sizes,
        arrays=(Array("x", make=make_grid_tokens), Array("theta", make=make_theta)),
        outputs=(Output("out"),),
        parameters=lambda sizes: {
            **_grids(sizes),
            "lrpe_type": st.sampled_from(["cosine", "rotary"]),
        },
        linear_in=("x",),
        bad_inputs=(
            ("tokens that fill no grid", "x", lambda a: a["x"][..., 1:, :]),
            ("theta of other heads", "theta", lambda a: a["theta"].repeat(2, axis=0)),
            ("an unknown form", "lrpe_type", lambda a: "sine"),
            *BAD_GRID,
        ),
    ),
    Contract(
        operation="lightnet.tpe",
        sizes={"batch": (1, 2), "kv_heads": (1, 3), "tokens": (1, 24), "m": (1, 6), "dv": (1, 24)},
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("x", "batch heads tokens dv", role="value"),
            Array("qp", "heads m"),
            Array("kp", "heads m"),
            Array("lam", make=make_decays),
            Array("state", "batch heads m dv", optional=True),
        ),
        outputs=(Output("y", cancels=True), Output("state", dtype="float32", by_query=False)),
        form=tpe_in_chunks,
        cancelling=("dlam",),
        linear_in=("x state", "qp"),
        causal=lambda case: True,
        neutral={"state": lambda case: np.zeros(case.shape("batch heads m dv"))},
        bad_inputs=(
            *BAD_FILTER,
            ("a state of another order", "state", lambda a: np.zeros((*a["x"].shape[:2], 99, 1))),
        ),
    ),
    Contract(
        operation="lightnet.md_tpe",
        sizes={"batch": (1, 2), "rows": (1, 5), "columns": (1, 5), "width": (2, 8)},
        fix=lambda sizes: {**sizes, "width": sizes["width"] // 2 * 2},
        arrays=(
            Array("x", "batch rows columns width", role="value"),
            Array("params", make=make_filters),
        ),
        outputs=(Output("y", cancels=True, by_query=False),),
        cancelling=("dparams",),
        parameters=lambda sizes: {
            "axes": st.sampled_from([(0,), (1,), (0, 1), (1, 0)]),
        },
        bad_inputs=(
            ("no axes", "axes", lambda a: ()),
            ("an axis that is not there", "axes", lambda a: (9,) * len(a["axes"])),
            ("parameters for one axis more", "params", lambda a: (*a["params"], a["params"][0])),
            ("parameters that are arrays", "params", lambda a: tuple(x[0] for x in a["params"])),
        ),
    ),
)

LAWS = (
    Law(
        "leading",
        "Tokens without a position are not changed.",
        ("K13",),
        _leads,
        check_leading,
        applies=lambda contract, kernel: contract.operation == "lightnet.md_lrpe",
        examples=0.3,
    ),
)
