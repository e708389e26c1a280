"""Contracts of EE-MLLM's composite attention, and the laws of what its tokens depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import padded_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.laws.base import Law, draw_anywhere
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.patterns.ee_mllm_attention import composite_attention, composite_mask

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "queries": (1, 24),
    "images": (0, 24),
    "past": (0, 3),
    "d": (1, 24),
    "dv": (1, 24),
}


def count_tokens(sizes: dict[str, int]) -> dict[str, int]:
    """All tokens: images, text that has no queries any more, and text that has."""
    return {**sizes, "keys": sizes["images"] + sizes["past"] + sizes["queries"]}


def make_kinds(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Which tokens are visual: in runs, as images are, or anywhere."""
    tokens, images = case.sizes["keys"], case.sizes["images"]
    visual = np.arange(tokens) < images
    if rng.integers(2):
        return rng.permutation(visual)
    return np.roll(visual, int(rng.integers(0, tokens + 1)))


def make_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Positions with gaps, in order or in none."""
    tokens = case.sizes["keys"]
    positions = rng.choice(2 * tokens + 1, tokens, replace=False)
    return np.sort(positions) if rng.integers(2) else positions


def make_key_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on one side, up to all of a batch entry's keys; or three keys of four at random."""
    batch, keys = case.shape("batch keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return np.logical_and(rng.random((batch, keys)) < 0.75, rng.random((batch, 1)) < 0.8)


def rows_of(a: Mapping[str, Any]) -> np.ndarray:
    """Where the queries' tokens are stored."""
    text = np.flatnonzero(np.logical_not(a["is_visual"]))
    return text[len(text) - a["qt"].shape[2] :]


def positions_of(a: Mapping[str, Any]) -> np.ndarray:
    given: np.ndarray | None = a.get("pos")
    return np.arange(len(a["is_visual"])) if given is None else given


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no text token sees."""
    mask = composite_mask(
        arguments["is_visual"], positions_of(arguments), arguments["image_visible"]
    )
    read = mask[rows_of(arguments)].any(axis=0)[None, :]
    if "key_mask" in arguments:
        read = read & arguments["key_mask"]
    unread = np.logical_not(np.broadcast_to(read, case.shape("batch keys")))
    for name in ("k", "v"):
        x: np.ndarray = arguments[name].copy()
        x[np.broadcast_to(unread[:, None], x.shape[:-1])] = np.nan
        arguments[name] = x
    return arguments


def images_and_text(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
    """Attention to images alone and to text alone: one softmax is their merge."""
    real = arguments.get("key_mask")
    real = np.ones(case.shape("batch keys"), bool) if real is None else real
    visual = arguments["is_visual"]
    return [{**arguments, "key_mask": real & kind} for kind in (visual, np.logical_not(visual))]


def _parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "image_visible": st.sampled_from(["causal", "all"]),
        "scale": st.sampled_from([None, 0.5]),
    }


def _sized(**sizes: int) -> Any:
    def move(case: Case) -> Case:
        return case.with_(sizes=count_tokens({**case.sizes, **sizes}))

    return move


def check_storage(trial: Trial) -> None:
    """Tokens stored in another order, with their positions, change no text token's output."""
    arguments = trial.arguments()
    order = trial.case.generator("storage").permutation(trial.case.sizes["keys"])
    old = {"pos": positions_of(arguments)}
    moved = {**arguments, "is_visual": arguments["is_visual"][order], "pos": old["pos"][order]}
    for name in ("k", "v"):
        moved[name] = arguments[name][:, :, order]
    if "key_mask" in arguments:
        moved["key_mask"] = arguments["key_mask"][:, order]
    # Rows of queries follow their own tokens; only a full set of text tokens can be moved so.
    if trial.case.sizes["past"]:
        return
    before, after = rows_of(arguments), rows_of(moved)
    place = {int(token): row for row, token in enumerate(before)}
    moved["qt"] = arguments["qt"][:, :, [place[int(order[token])] for token in after]]
    trial.check(moved)


def check_future(trial: Trial) -> None:
    """What stands behind a text token changes nothing in its row, not by one bit."""
    arguments = {**trial.arguments(), "image_visible": "causal"}
    pos = positions_of(arguments)
    rows = pos[rows_of(arguments)]
    if not len(rows):
        return
    cut = int(trial.case.generator("future").choice(rows))
    changed = dict(arguments)
    for name in ("k", "v"):
        changed[name] = np.where((pos > cut)[:, None], -3.0 * arguments[name], arguments[name])
    before, after = trial.run(arguments), trial.run(changed)
    for name, x in before.items():
        earlier = (slice(None), slice(None), np.flatnonzero(rows <= cut))
        if not np.array_equal(x[earlier], after[name][earlier]):
            raise Violation(name, f"a row at or before position {cut} depends on later tokens")


ARRAYS = (
    Array("qt", "batch heads queries d", role="query"),
    Array("k", "batch kv_heads keys d", role="key"),
    Array("v", "batch kv_heads keys dv", role="value"),
    Array("is_visual", "keys", make=make_kinds),
    Array("pos", "keys", make=make_positions, optional=True),
    Array("key_mask", "batch keys", make=make_key_mask, optional=True),
)
BAD_TOKENS = (
    ("kinds of other tokens", "is_visual", lambda a: np.append(a["is_visual"], True)),
    ("kinds as integers", "is_visual", lambda a: a["is_visual"].astype(np.int64)),
    ("kinds of a batch", "is_visual", lambda a: a["is_visual"][None]),
    ("a third way to see images", "image_visible", lambda a: "none"),
)
CONTRACTS = (
    Contract(
        operation="ee_mllm.composite_attention",
        sizes=SIZES,
        keys="images",
        fix=count_tokens,
        arrays=ARRAYS,
        outputs=(Output("out", cancels=True), Output("lse", dtype="float32", row_axes=0)),
        parameters=_parameters,
        linear_in=("v",),
        cancelling=("dqt", "dk"),
        poison=poison_hidden,
        split=images_and_text,
        neutral={
            "key_mask": lambda case: np.ones(case.shape("batch keys"), bool),
            "pos": lambda case: np.arange(case.sizes["keys"]),
        },
        cells={
            "causal self": _sized(past=0),
            "causal cross": _sized(past=3),
            "left": padded_cell("left"),
            "right": padded_cell("right"),
            "MHA": _sized(kv_heads=2, group=1),
            "GQA": _sized(kv_heads=2, group=3),
            "MQA": _sized(kv_heads=1, group=4),
        },
        bad_inputs=(
            *BAD_TOKENS,
            ("more rows than text", "qt", lambda a: a["qt"].repeat(50, axis=2)
             if a["qt"].shape[2] else np.zeros((*a["qt"].shape[:2], 99, a["qt"].shape[3]))),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
            ("positions of other tokens", "pos", lambda a: np.arange(len(a["is_visual"]) + 1)),
            ("positions that are floats", "pos", lambda a: np.arange(len(a["is_visual"])) * 1.0),
            ("an integer key_mask", "key_mask", lambda a: np.ones(a["k"].shape[::2], np.int64)),
            ("a key_mask of one axis", "key_mask", lambda a: np.ones(a["k"].shape[2], bool)),
        ),
    ),
    Contract(
        operation="ee_mllm.composite_mask",
        sizes={"queries": (0, 12), "images": (0, 12), "past": (0, 2)},
        fix=count_tokens,
        arrays=(
            Array("is_visual", "keys", make=make_kinds),
            Array("positions", "keys", make=make_positions),
        ),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {"image_visible": st.sampled_from(["causal", "all"])},
        bad_inputs=(
            *BAD_TOKENS,
            ("positions as floats", "positions", lambda a: a["positions"] * 1.0),
            ("positions that are no array", "positions", lambda a: 3),
        ),
    ),
)  # fmt: skip
LAWS = (
    Law(
        "composite-storage",
        "Text attends to tokens by their positions, wherever they are stored.",
        ("K13",),
        draw_anywhere,
        check_storage,
        applies=lambda contract, kernel: contract.spec.function is composite_attention,
        examples=0.3,
    ),
    Law(
        "composite-future",
        "Tokens behind a text token change no bit of its row.",
        ("K3",),
        draw_anywhere,
        check_future,
        applies=lambda contract, kernel: contract.spec.function is composite_attention,
        examples=0.3,
    ),
)
