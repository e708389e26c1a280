"""Contracts of TransNormerLLM's layers: the token mixer alone, packed and padded, and the block.

Its steps are in `lightning_attention_1_steps`, its own laws in `lightning_attention_1_laws`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, BadValue, Contract, Output, Stream
from attnspec.conformance.contracts.linear import lightning_attention_1_forms as forms
from attnspec.conformance.contracts.linear.lightning_attention_1_steps import (
    Drawn,
    make_slopes,
    not_two_channels,
)
from attnspec.conformance.packing import Packed, cut_rows
from attnspec.reference.linear.lightning_attention_1 import tnl_block, tnl_gla

OPTIONS = ("v_activation", "gate", "norm", "eps")
SIZES = {"batch": (1, 2), "tokens": (1, 24), "kv_heads": (1, 3), "d": (1, 12)}
BLOCK = {**SIZES, "F": (1, 16)}


def padded_on(side: str) -> Any:
    return lambda case: case.with_(options=tuple({*case.options, side}))


def layers(sizes: Mapping[str, int]) -> Drawn:
    """Options of a layer, where it starts, and whether it has LRPE."""
    return {
        "offset": st.sampled_from([0, 1, 17, 400]),
        "v_activation": st.booleans(),
        "gate": st.sampled_from(["linear", "linear", "sigmoid"]),
        "norm": st.sampled_from(["srms", "srms", "layer"]),
        "eps": st.sampled_from([1e-6, 1e-2]),
    }


def batches(sizes: Mapping[str, int]) -> Drawn:
    return {name: strategy for name, strategy in layers(sizes).items() if name != "offset"}


def lifted(case: Case) -> bool:
    """Two layers in three have LRPE; the state's width follows."""
    return case.seed % 3 != 0


def weights_of(rng: np.random.Generator, case: Case, *, block: bool) -> dict[str, Any]:
    H, d = case.heads, case.sizes["d"]
    D = H * d
    shapes = {"Wqkvu": (D, 4 * D), "Wo": (D, D)}
    if block:
        F = case.sizes["F"]
        shapes |= {"Wv": (D, F), "Wu": (D, F), "Wd": (F, D)}
    made: dict[str, Any] = {
        name: rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in shapes.items()
    }
    made["slopes"] = make_slopes(rng, case)
    made["theta"] = rng.uniform(0.0, 1.0, (H, d)) if lifted(case) else None
    return made


def _gla_weights(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    return weights_of(rng, case, block=False)


def _block_weights(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    return weights_of(rng, case, block=True)


def _state(axes: str) -> Any:
    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        width = "2*d" if lifted(case) else "d"
        return rng.standard_normal(case.shape(f"{axes} heads {width} d"))

    return make


def _zero_state(case: Case) -> np.ndarray:
    return 0.0 * _state("batch")(np.random.default_rng(0), case)


def _sequences(rng: np.random.Generator, case: Case) -> np.ndarray:
    cuts = np.sort(rng.integers(0, case.sizes["tokens"] + 1, case.sizes["sequences"] - 1))
    return np.array([0, *cuts, case.sizes["tokens"]])


def _starts(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.integers(0, 50, case.sizes["sequences"])


def _valid(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on the left, on the right, in between, or everywhere in a row."""
    batch, tokens = case.sizes["batch"], case.sizes["tokens"]
    place, lengths = np.arange(tokens), rng.integers(0, tokens + 1, (batch, 1))
    sides = {"left", "right"} & set(case.options) or {"left", "right", "between"}
    side = rng.choice(sorted(sides))
    if side == "between":
        return rng.random((batch, tokens)) < 0.6
    return place >= lengths if side == "left" else place < lengths


def poison_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    x = arguments["x"].copy()
    x[~arguments["valid"]] = np.nan
    return {**arguments, "x": x}


def _start(whole: Mapping[str, Any]) -> np.ndarray:
    x, params = whole["x"], whole["params"]
    H = params["slopes"].shape[0]
    d = x.shape[-1] // H
    return np.zeros((*x.shape[:-2], H, d if params["theta"] is None else 2 * d, d))


def _feed(whole: Mapping[str, Any], state: Any, first: int, last: int) -> dict[str, Any]:
    return {
        **whole,
        "x": whole["x"][..., first:last, :],
        "state": state,
        "offset": whole["offset"] + first,
    }


def stream(params: Array, layer: Any) -> Stream:
    """A layer fed with its own state, at the position where it has arrived."""
    return Stream(
        arrays=(X, params),
        start=_start,
        feed=_feed,
        whole=lambda whole: layer(
            whole["x"], whole["params"], None, whole["offset"],
            **{name: whole[name] for name in OPTIONS},
        )[0],
    )  # fmt: skip


def changed(name: str, change: Any) -> Any:
    """`params` with one weight changed."""
    return lambda a: {**a["params"], name: change(a["params"][name])}


X = Array("x", "batch tokens heads*d")
GLA = Array("params", make=_gla_weights)
WHOLE_BLOCK = Array("params", make=_block_weights)
STATE = Output("state", dtype="float32", by_query=False)
BAD_OPTIONS = (
    ("an unknown gate", "gate", lambda a: "tanh"),
    ("an unknown norm", "norm", lambda a: "batch"),
    ("a number for a flag", "v_activation", lambda a: 2),
    ("a negative eps", "eps", lambda a: -1e-6),
    ("an eps that is NaN", "eps", lambda a: float("nan")),
)
BAD_PARAMS = (
    ("no weights", "params", lambda a: None),
    ("weights without names", "params", lambda a: tuple(a["params"].values())),
    ("weights without slopes", "params", lambda a: {"Wo": a["params"]["Wo"]}),
)
BAD_START = (
    ("a negative offset", "offset", lambda a: -1),
    ("an offset that is no integer", "offset", lambda a: 1.5),
    ("a state of another width", "state", lambda a: np.zeros((*_start(a).shape[:-1], 99))),
    ("a state without a batch", "state", lambda a: _start(a)[0]),
)


def _handed(results: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The states, and where the sequences have come to."""
    offsets, starts = arguments["offsets"], arguments.get("starts")
    lengths = offsets[1:] - offsets[:-1]
    return {"states": results[1], "starts": lengths if starts is None else starts + lengths}


CONTRACTS = (
    Contract(
        operation="lightning_attention_1.tnl_gla",
        sizes=SIZES,
        queries="tokens",
        keys="tokens",
        arrays=(X, GLA, Array("state", make=_state("batch"), optional=True)),
        form=forms.gla,
        outputs=(Output("y"), STATE),
        parameters=layers,
        fix=not_two_channels,
        causal=lambda case: True,
        cancelling=("dparams",),
        neutral={"state": _zero_state},
        stream=stream(GLA, tnl_gla),
        cells={"causal self": lambda case: case, "MHA": heads_cell(3, 1)},
        bad_inputs=(*BAD_PARAMS, *BAD_OPTIONS, *BAD_START),
    ),
    Contract(
        operation="lightning_attention_1.tnl_gla_packed",
        sizes={**{a: s for a, s in SIZES.items() if a != "batch"}, "sequences": (1, 4)},
        least={"sequences": 1},
        arrays=(
            Array("x", "tokens heads*d"),
            GLA,
            Array("offsets", make=_sequences),
            Array("states", make=_state("sequences"), optional=True),
            Array("starts", make=_starts, optional=True),
        ),
        form=forms.packed,
        outputs=(Output("y"), Output("states", dtype="float32", by_query=False)),
        parameters=batches,
        queries="tokens",
        keys="tokens",
        fix=not_two_channels,
        cancelling=("dparams",),
        packed=Packed(cut_rows("x"), ("states", "starts"), {"starts": None}, _handed),
        cells={"packed": lambda case: case.with_(sizes={"sequences": 3})},
        bad_inputs=(
            *BAD_PARAMS,
            *BAD_OPTIONS,
            ("fractional offsets", "offsets", lambda a: a["offsets"] + 0.5),
            ("offsets of two axes", "offsets", lambda a: a["offsets"][None]),
            BadValue("offsets short of the end", "offsets", lambda a: a["offsets"] * 0),
            ("starts of too many sequences", "starts", lambda a: np.zeros(99, int)),
            ("states of too many sequences", "states", lambda a: np.zeros((99, 1, 1, 1))),
        ),
    ),
    Contract(
        operation="lightning_attention_1.tnl_gla_padded",
        sizes=SIZES,
        queries="tokens",
        keys="tokens",
        arrays=(
            X,
            GLA,
            Array("valid", make=_valid),
            Array("state", make=_state("batch"), optional=True),
        ),
        form=forms.padded,
        outputs=(Output("y"), STATE),
        parameters=layers,
        poison=poison_padding,
        cancelling=("dparams",),
        neutral={"state": _zero_state},
        fix=not_two_channels,
        cells={side: padded_on(side) for side in ("left", "right")},
        bad_inputs=(
            *BAD_PARAMS,
            *BAD_OPTIONS,
            *BAD_START,
            ("a mask of numbers", "valid", lambda a: a["valid"].astype(float)),
            ("a mask of too many tokens", "valid", lambda a: np.repeat(a["valid"], 2, axis=-1)),
        ),
    ),
    Contract(
        operation="lightning_attention_1.tnl_block",
        sizes=BLOCK,
        queries="tokens",
        keys="tokens",
        arrays=(X, WHOLE_BLOCK, Array("state", make=_state("batch"), optional=True)),
        form=forms.block,
        outputs=(Output("y"), STATE),
        parameters=layers,
        fix=not_two_channels,
        causal=lambda case: True,
        cancelling=("dparams",),
        neutral={"state": _zero_state},
        stream=stream(WHOLE_BLOCK, tnl_block),
        bad_inputs=(
            *BAD_PARAMS,
            *BAD_OPTIONS,
            *BAD_START,
            ("a mixer of another width", "params", lambda a: {
                name: a["params"][name] for name in ("Wqkvu", "Wo", "slopes", "Wv")}),
        ),
    ),
)  # fmt: skip
