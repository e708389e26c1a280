"""Contracts of what LongLoRA trains: adapters, norms, embeddings; and of its positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.values import bad_integers

WEIGHTS = {"n_out": (2, 12), "n_in": (1, 12), "r": (1, 4)}
ALPHA = st.sampled_from([16.0, 1.0, 3])


def make_weights(axes: str) -> Any:
    """Weights that keep the size of what they are multiplied with; one adapter in four is 0."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        shape = case.shape(axes)
        weights = rng.standard_normal(shape) / np.sqrt(shape[1])
        return weights * 0.0 if axes == "n_out r" and rng.integers(4) == 0 else weights

    return make


def make_keep(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.random(case.shape("batch tokens n_in")) < 0.7


def make_ids(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Few tokens, many times, or all alike."""
    return rng.integers(0, rng.integers(1, case.sizes["vocab"] + 1), case.shape("batch tokens"))


def make_gain(rng: np.random.Generator, case: Case) -> np.ndarray:
    return 1 + 0.3 * rng.standard_normal(case.sizes["D"])


def make_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.integers(0, int(rng.choice([3, 5000, 200000])), case.shape("batch tokens"))


def bad_numbers(name: str) -> tuple[tuple[str, str, Any], ...]:
    """Values that are no number above 0."""
    return tuple(
        (f"{name} = {value!r}", name, lambda a, value=value: value)
        for value in (0.0, -1.0, float("inf"), "2", None)
    )


ADAPTER = (
    Array("W", "n_out n_in", make=make_weights("n_out n_in")),
    Array("A", "r n_in", make=make_weights("r n_in")),
    Array("B", "n_out r", make=make_weights("n_out r")),
)
BAD_ADAPTER: tuple[tuple[str, str, Any], ...] = (
    ("W of three axes", "W", lambda a: a["W"][None]),
    ("A of another width", "A", lambda a: a["A"].repeat(2, axis=1)),
    ("A of integers", "A", lambda a: np.zeros(a["A"].shape, np.int64)),
    ("B of another width", "B", lambda a: a["B"].repeat(2, axis=0)),
    ("B of another rank", "B", lambda a: a["B"].repeat(2, axis=1)),
    *bad_numbers("alpha"),
)
CONTRACTS = (
    Contract(
        operation="longlora.lora_forward",
        sizes={"batch": (1, 2), "tokens": (1, 12), **WEIGHTS},
        arrays=(
            Array("x", "batch tokens n_in"),
            *ADAPTER,
            Array("keep", "batch tokens n_in", make=make_keep, optional=True),
        ),
        outputs=(Output("out", cancels=True),),
        parameters=lambda sizes: {"alpha": ALPHA, "dropout": st.sampled_from([0.3, 0.0, 0.5])},
        linear_in=("x",),
        cancelling=("dx", "dA", "dB"),
        bad_inputs=(
            *BAD_ADAPTER,
            ("x of another width", "x", lambda a: a["x"].repeat(2, axis=-1)),
            ("x of one number too many", "x", lambda a: np.ones(a["x"].shape[-1] + 1)),
            ("keep as numbers", "keep", lambda a: np.ones(a["x"].shape)),
            ("keep of another shape", "keep", lambda a: np.ones(a["x"].shape[-1] + 1, bool)),
            ("nothing but dropout", "dropout", lambda a: 1.0),
            ("a negative dropout", "dropout", lambda a: -0.5),
            ("dropout in words", "dropout", lambda a: "half"),
        ),
    ),
    Contract(
        operation="longlora.lora_merge",
        sizes=WEIGHTS,
        arrays=ADAPTER,
        outputs=(Output("W", cancels=True),),
        parameters=lambda sizes: {"alpha": ALPHA},
        bad_inputs=BAD_ADAPTER,
    ),
    Contract(
        operation="longlora.rmsnorm",
        sizes={"batch": (1, 2), "tokens": (1, 12), "D": (1, 24)},
        arrays=(Array("x", "batch tokens D"), Array("w", "D", make=make_gain)),
        outputs=(Output("out"),),
        parameters=lambda sizes: {"eps": st.sampled_from([1e-6, 1e-2, 0.5])},
        linear_in=("w",),
        cancelling=("dx", "dw"),
        bad_inputs=(
            ("w of another width", "w", lambda a: a["w"].repeat(2)),
            ("w of integers", "w", lambda a: np.ones(a["w"].shape, np.int64)),
            ("a negative eps", "eps", lambda a: -1.0),
            ("eps in words", "eps", lambda a: "small"),
        ),
    ),
    Contract(
        operation="longlora.embedding_backward",
        sizes={"batch": (1, 2), "tokens": (1, 12), "vocab": (1, 6), "D": (1, 12)},
        arrays=(
            Array("ids", "batch tokens", make=make_ids),
            Array("dout", "batch tokens D"),
        ),
        outputs=(Output("dE", cancels=True, by_query=False),),
        parameters=lambda sizes: {"vocab": st.just(sizes["vocab"])},
        linear_in=("dout",),
        bad_inputs=(
            ("ids as floats", "ids", lambda a: a["ids"] * 1.0),
            ("ids of another shape", "ids", lambda a: np.zeros(29, np.int64)),
            BadValue("a token beyond the vocabulary", "ids",
                     lambda a: a["ids"] + a["vocab"] if a["ids"].size else np.zeros(29, np.int64)),
            BadValue("a negative token", "ids",
                     lambda a: a["ids"] - a["vocab"] if a["ids"].size else np.zeros(29, np.int64)),
            *bad_integers("vocab"),
        ),
    ),
    Contract(
        operation="longlora.interpolation_factor",
        sizes={},
        arrays=(),
        outputs=(Output("factor", "exact", plain=True),),
        parameters=lambda sizes: {
            "new_len": st.integers(1, 200000),
            "orig_len": st.sampled_from([4096, 2048, 1]),
            "rope_factor": st.sampled_from([1.0, 2.0, 2.5]),
        },
        bad_inputs=(
            *bad_integers("new_len"),
            *bad_integers("orig_len"),
            *bad_numbers("rope_factor"),
        ),
    ),
    Contract(
        operation="longlora.interpolate_positions",
        sizes={"batch": (1, 2), "tokens": (1, 12)},
        arrays=(Array("pos", "batch tokens", make=make_positions),),
        outputs=(Output("positions", dtype="float64"),),
        parameters=lambda sizes: {"factor": st.sampled_from([4.0, 3.0, 25, 1.0])},
        bad_inputs=(
            ("a list of positions", "pos", lambda a: a["pos"].tolist()),
            ("positions that are bool", "pos", lambda a: a["pos"] > 0),
            *bad_numbers("factor"),
        ),
    ),
)  # fmt: skip
