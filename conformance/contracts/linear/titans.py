"""Contracts of Titans: the rule token by token and its two chunk forms.

The steps are in `titans_steps`, the layouts beside attention in `titans_layouts`, and the
mechanism's own laws in `titans_laws`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output

SIZES = {
    "batch": (1, 2), "kv_heads": (1, 2), "group": (1, 3), "tokens": (1, 24), "d": (1, 16),
    "dv": (1, 16),
}  # fmt: skip
DEEP = {**SIZES, "hidden": (1, 12)}
Drawn = dict[str, st.SearchStrategy[Any]]


def make_rates(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    """Steps that keep the memory stable; some tokens forget all, keep all, or are not learned."""
    return rates_of(rng, case.shape("batch kv_heads tokens"), case)


def rates_of(
    rng: np.random.Generator, shape: tuple[int, ...], case: Case
) -> tuple[np.ndarray, ...]:
    width = max(case.sizes.get(axis, 1) for axis in ("d", "hidden", "D"))
    # The gradients of a chunk add up before any of them is felt.
    together = max(1, min(shape[-1], case.parameters.get("b") or case.parameters.get("c") or 1))
    theta = rng.exponential(0.2, shape) / (width * together**0.75)
    theta = np.where(rng.random(shape) < 0.1, 0.0, theta)
    eta = np.where(rng.random(shape) < 0.2, rng.integers(0, 2, shape), rng.random(shape))
    alpha = np.where(rng.random(shape) < 0.2, rng.integers(0, 2, shape), 0.5 * rng.random(shape))
    return theta, eta, alpha


def make_layers(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    """Two layers, of the size that keeps what passes through them."""
    return layers_of(rng, case.shape("batch kv_heads"), case.shape("d hidden dv"))


def layers_of(
    rng: np.random.Generator, leading: tuple[int, ...], widths: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    return tuple(
        rng.standard_normal((*leading, inputs, outputs)) / np.sqrt(inputs)
        for inputs, outputs in itertools.pairwise(widths)
    )


def make_valid(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on the left, on the right, in between, or everywhere."""
    batch, tokens = case.shape("batch tokens")
    place = np.arange(tokens)
    first = rng.integers(0, tokens + 1, (batch, 1))
    kinds = [place >= first, place < first, rng.random((batch, tokens)) < 0.7]
    return np.asarray(kinds[int(rng.integers(0, 3))])


def poison_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in every row and rate of a padded token."""
    valid = arguments.get("valid")
    if valid is not None:
        padded = ~valid[:, None]
        for name in ("q", "k", "v"):
            arguments[name] = np.where(padded[..., None], np.nan, arguments[name])
        arguments["rates"] = tuple(np.where(padded, np.nan, x) for x in arguments["rates"])
    return arguments


def chunks(sizes: Mapping[str, int]) -> Drawn:
    # Where there are tokens for them, most chunks are larger than a kernel's pieces.
    large = [64, 100] * (6 if sizes.get("tokens", 0) > 32 else 0)
    return {
        "b": st.sampled_from([1, 2, 3, 5, 8, 16, 20, 64, 100, *large]),
        "loss_scale": st.sampled_from([2.0, 1.0, 0.5]),
        "read": st.sampled_from(["inclusive", "exclusive"]),
    }


def wrong_integers(name: str) -> tuple[tuple[str, str, Any], ...]:
    """Values that are no integer of at least 1."""
    return tuple(
        (f"{name} = {value}", name, lambda a, value=value: value) for value in (0, 2.5, None, True)
    )


def one_rate(place: int, change: Any) -> Any:
    """Rates with one of the three changed."""
    return lambda a: tuple(change(x) if i == place else x for i, x in enumerate(a["rates"]))


def _padded(case: Case) -> Case:
    return case.with_(options=tuple({*case.options, "valid"}))


Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d")
V = Array("v", "batch kv_heads tokens dv", role="value")
RATES = Array("rates", make=make_rates)
VALID = Array("valid", "batch tokens", make=make_valid, optional=True)
STATES = tuple(Output(name, dtype="float32", by_query=False) for name in ("W1", "W2", "S1", "S2"))
CELLS = {
    "causal self": lambda case: case,
    "left": _padded,
    "right": _padded,
    "MHA": heads_cell(2, 1),
    "GQA": heads_cell(2, 3),
    "MQA": heads_cell(1, 4),
}
BAD_SCALES = (
    ("a loss scale of 0", "loss_scale", lambda a: 0.0),
    ("a loss scale that is NaN", "loss_scale", lambda a: float("nan")),
    ("a loss scale by name", "loss_scale", lambda a: "mean"),
)
BAD_RATES = (
    ("no rates", "rates", lambda a: None),
    ("two rates", "rates", lambda a: a["rates"][:2]),
    ("a negative step", "rates", one_rate(0, lambda x: -1.0 - x)),
    ("a step that is NaN", "rates", one_rate(0, lambda x: x + np.nan)),
    ("momentum above 1", "rates", one_rate(1, lambda x: 1.5 + x)),
    ("forgetting below 0", "rates", one_rate(2, lambda x: -0.5 - x)),
    ("rates of more tokens", "rates", one_rate(2, lambda x: np.repeat(x, 2, axis=-1))),
    ("rates by batch", "rates", one_rate(1, lambda x: x[:, 0])),
    ("integer rates", "rates", one_rate(0, lambda x: np.zeros(x.shape, np.int64))),
)
BAD_TOKENS = (
    ("q of another width", "k", lambda a: np.repeat(a["k"], 2, axis=-1)),
    ("more queries than keys", "q", lambda a: np.repeat(a["q"], 2, axis=-2)),
    ("more values than keys", "v", lambda a: np.repeat(a["v"], 2, axis=-2)),
    ("heads that do not divide", "k", lambda a: np.repeat(a["k"], 7, axis=-3)),
    ("another batch in v", "v", lambda a: np.repeat(a["v"], 2, axis=0)),
    ("values wider than the memory", "v", lambda a: np.repeat(a["v"], 2, axis=-1)),
    ("valid as numbers", "valid", lambda a: np.ones(a["k"].shape[::2], np.int64)),
    ("valid with an axis of heads", "valid", lambda a: np.ones(a["k"].shape[:3], bool)),
    ("an unknown read", "read", lambda a: "before"),
    *wrong_integers("b"),
    *BAD_SCALES,
    *BAD_RATES,
)
BAD_LAYERS = (
    ("no layers", "W0", lambda a: ()),
    ("one matrix for all layers", "W0", lambda a: a["W0"][0]),
    ("layers that do not fit", "W0", lambda a: (a["W0"][0], np.repeat(a["W0"][1], 2, axis=-2))),
    ("layers for another batch", "W0", lambda a: tuple(np.repeat(w, 3, axis=0) for w in a["W0"])),
    ("integer layers", "W0", lambda a: tuple(np.zeros(w.shape, np.int64) for w in a["W0"])),
    ("momentum of one layer", "S0", lambda a: a["W0"][:1]),
)
DEEP_ARRAYS = (
    Array("W0", make=make_layers),
    Array("S0", make=make_layers, optional=True),
    K,
    V,
    Q,
    RATES,
    VALID,
)


def _no_momentum(case: Case) -> Any:
    widths = case.shape("d hidden dv")
    leading = case.shape("batch kv_heads")
    return tuple(np.zeros((*leading, a, b)) for a, b in itertools.pairwise(widths))


CONTRACTS = (
    Contract(
        operation="titans.titans_chunk_linear",
        sizes=SIZES,
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("W0", "batch kv_heads d dv"),
            Array("S0", "batch kv_heads d dv", optional=True),
            K,
            V,
            Q,
            RATES,
            VALID,
        ),
        outputs=(
            Output("y"),
            Output("W", dtype="float32", by_query=False),
            Output("S", dtype="float32", by_query=False),
        ),
        parameters=chunks,
        linear_in=("q", "v W0 S0"),
        causal=lambda case: True,
        poison=poison_padding,
        neutral={
            "S0": lambda case: np.zeros(case.shape("batch kv_heads d dv")),
            "valid": lambda case: np.ones(case.shape("batch tokens"), bool),
        },
        cancelling=("drates",),
        cells=CELLS,
        bad_inputs=(
            ("a memory of another width", "W0", lambda a: np.repeat(a["W0"], 2, axis=-2)),
            ("a memory without heads", "W0", lambda a: a["W0"][:, 0]),
            ("a tuple as memory", "W0", lambda a: (a["W0"],)),
            ("momentum of another width", "S0", lambda a: np.repeat(a["W0"], 2, axis=-1)),
            *BAD_TOKENS,
        ),
    ),
    Contract(
        operation="titans.titans_chunk_mlp",
        sizes=DEEP,
        queries="tokens",
        keys="tokens",
        arrays=DEEP_ARRAYS,
        outputs=(Output("y"), *STATES),
        parameters=chunks,
        causal=lambda case: True,
        poison=poison_padding,
        neutral={
            "S0": _no_momentum,
            "valid": lambda case: np.ones(case.shape("batch tokens"), bool),
        },
        cancelling=("drates",),
        cells=CELLS,
        bad_inputs=(*BAD_LAYERS, *BAD_TOKENS),
    ),
    Contract(
        operation="titans.titans_sequential",
        sizes=DEEP,
        queries="tokens",
        keys="tokens",
        arrays=DEEP_ARRAYS,
        outputs=(Output("y"), *STATES),
        parameters=chunks,
        causal=lambda case: True,
        poison=poison_padding,
        neutral={"S0": _no_momentum},
        cells=CELLS,
        bad_inputs=(*BAD_LAYERS, *BAD_TOKENS),
    ),
)
