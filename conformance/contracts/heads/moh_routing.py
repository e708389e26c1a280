"""Contracts of MoH's routers: gates that are learned, gates by norms, and the balance loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Ranking
from attnspec.reference.heads.moh_routing import routed_probs, topk_mask

SIZES = {"batch": (1, 2), "queries": (1, 24), "D": (1, 24), "hr": (1, 12), "hs": (1, 6)}
ROUTED = {axis: SIZES[axis] for axis in ("batch", "queries", "hr")}


def make_probs(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows of a softmax, some of them nearly certain; equal ones for ties."""
    shape = case.shape("batch queries hr")
    if case.values == "ties":
        return rng.integers(1, 4, shape) / 8.0
    logits = np.exp(rng.standard_normal(shape) * rng.choice([0.3, 1.0, 2.0]))
    return logits / np.sum(logits, axis=-1, keepdims=True)


def make_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """The choice that belongs to the case's probabilities."""
    k = case.parameters.get("k", max(case.sizes["hr"] // 2, 1))
    return topk_mask(make_probs(case.generator("p"), case), k)


def make_valid(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Real tokens: seven of ten, or none at all."""
    return (rng.random(case.shape("batch queries")) < 0.7) & (rng.random() < 0.9)


def make_normal(axes: str) -> Any:
    """For arguments that may be None, where that is no wrong call."""
    return lambda rng, case: rng.standard_normal(case.shape(axes))


def count(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """From 1 on: nothing is launched to choose nothing."""
    return {"k": st.integers(1, sizes["hr"])}


def rescaled(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"rescale": st.sampled_from([True, True, False])}


def counted(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {**count(sizes), **rescaled(sizes)}


def counted_from_none(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"k": st.integers(0, sizes["hr"]), **rescaled(sizes)}


def norm_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"hs": st.integers(0, sizes["heads_q"] - 1)}


def rank_probs(a: Mapping[str, Any]) -> Ranking:
    return Ranking(a["p"], k=a["k"], exact="always")


def rank_logits(a: Mapping[str, Any]) -> Ranking:
    """What hides in the gates of `route`."""
    return Ranking(routed_probs(a["x"], a["Wr"]), k=a["k"])


def rank_norms(a: Mapping[str, Any]) -> Ranking:
    """Squared norms, exact on integers; shared heads are forced, and do not compete."""
    squares = np.swapaxes(np.sum(a["q_unrot"] * a["q_unrot"], axis=-1), -1, -2)
    forced = np.zeros(squares.shape, bool)
    forced[..., : a["hs"]] = True
    return Ranking(squares, k=a["hs"] + a["k"], forced=forced, exact="integers")


def poison_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the probabilities of padded tokens."""
    if "valid" in arguments:
        p = arguments["p"].copy()
        p[np.logical_not(arguments["valid"])] = np.nan
        arguments["p"] = p
    return arguments


def bad_router(name: str) -> tuple[tuple[str, str, Any], ...]:
    return (
        ("a router of another width", name, lambda a: a[name].repeat(2, axis=1)),
        ("a router for each entry", name, lambda a: a[name][None]),
    )


def bad_count(name: str, top: Any) -> tuple[tuple[str, str, Any], ...]:
    return (
        (f"{name} too large", name, lambda a: top(a) + 1),
        *(
            (f"{name} = {value}", name, lambda a, value=value: value)
            for value in (-1, 1.5, None, True)
        ),
    )


X = Array("x", "batch queries D")
WR, WS, W0 = Array("Wr", "hr D"), Array("Ws", "hs D"), Array("W0", "2 D")
P = Array("p", "batch queries hr", make=make_probs)
CHOICE = Array("mask", "batch queries hr", make=make_mask)
Q_UNROT = Array("q_unrot", "batch heads_q queries d")
NORMS = {"batch": (1, 2), "heads_q": (1, 9), "queries": (1, 24), "d": (1, 24)}
BAD_CHOICE = (
    ("a mask of floats", "mask", lambda a: a["mask"] * 1.0),
    ("a mask of other heads", "mask", lambda a: a["mask"].repeat(2, axis=2)),
)
BAD_K = bad_count("k", lambda a: a["p"].shape[-1])
BAD_HS = bad_count("hs", lambda a: a["q_unrot"].shape[1] - 1)


def thin(*axes: str) -> dict[str, tuple[int, int]]:
    return {axis: SIZES[axis] for axis in ("batch", "queries", *axes)}


CONTRACTS = (
    Contract(
        operation="moh.routed_probs",
        sizes=thin("D", "hr"),
        arrays=(X, WR),
        outputs=(Output("p", wide=True),),
        bad_inputs=bad_router("Wr"),
    ),
    Contract(
        operation="moh.topk_mask",
        sizes=ROUTED,
        arrays=(P,),
        outputs=(Output("mask", "selection"),),
        parameters=count,
        ranking=rank_probs,
        bad_inputs=BAD_K,
    ),
    Contract(
        operation="moh.routed_gates",
        sizes=ROUTED,
        arrays=(P, CHOICE),
        outputs=(Output("gr", wide=True),),
        parameters=counted_from_none,
        bad_inputs=(*BAD_CHOICE, *BAD_K),
    ),
    Contract(
        operation="moh.shared_gates",
        sizes=thin("D", "hs"),
        arrays=(X, WS),
        outputs=(Output("gs", wide=True),),
        parameters=rescaled,
        bad_inputs=bad_router("Ws"),
    ),
    Contract(
        operation="moh.group_weights",
        sizes=thin("D"),
        arrays=(X, W0),
        outputs=(Output("a", wide=True),),
        parameters=rescaled,
        bad_inputs=(*bad_router("W0"), ("three groups", "W0", lambda a: a["W0"][[0, 1, 1]])),
    ),
    Contract(
        operation="moh.combine_gates",
        sizes=thin("hs", "hr"),
        arrays=(
            Array("gs", "batch queries hs", make=make_normal("batch queries hs")),
            Array("gr", "batch queries hr", make=make_normal("batch queries hr")),
            Array("a", "batch queries 2"),
        ),
        outputs=(Output("gates"),),
        linear_in=("gs gr", "a"),
        bad_inputs=(
            ("routed gates of other tokens", "gr", lambda a: a["gr"].repeat(2, axis=1)),
            ("three weights", "a", lambda a: a["a"][..., [0, 1, 1]]),
            ("no weights", "a", lambda a: None),
        ),
    ),
    Contract(
        operation="moh.route",
        sizes=SIZES,
        arrays=(
            X,
            *(
                Array(name, axes, make=make_normal(axes))
                for name, axes in (("Wr", "hr D"), ("Ws", "hs D"), ("W0", "2 D"))
            ),
        ),
        outputs=(Output("gates", wide=True),),
        parameters=counted,
        hidden=rank_logits,
        bad_inputs=(
            *bad_router("Wr"),
            *bad_router("Ws"),
            *bad_router("W0"),
            ("no weights for two groups", "W0", lambda a: None),
            ("more than there are", "k", lambda a: a["Wr"].shape[0] + 1),
            ("a negative count", "k", lambda a: -1),
        ),
    ),
    Contract(
        operation="moh.norm_probs",
        sizes=NORMS,
        arrays=(Q_UNROT,),
        outputs=(Output("g", wide=True),),
        parameters=norm_parameters,
        values=("normal", "structured"),
        bad_inputs=BAD_HS,
    ),
    Contract(
        operation="moh.norm_router",
        sizes=NORMS,
        arrays=(Q_UNROT,),
        outputs=(Output("gates", "selection", chosen=lambda got, a: got != 0),),
        parameters=lambda sizes: {
            "hs": st.integers(0, (sizes["heads_q"] - 1) // 2),
            "k": st.integers(1, max(sizes["heads_q"] // 2, 1)),
        },
        ranking=rank_norms,
        follow=lambda a, chosen: chosen.astype(np.float64),
        bad_inputs=(*BAD_HS, *bad_count("k", lambda a: a["q_unrot"].shape[1] - a["hs"])),
    ),
    Contract(
        operation="moh.straight_through",
        sizes=ROUTED,
        arrays=(P, CHOICE),
        outputs=(Output("gates"),),
        bad_inputs=BAD_CHOICE,
    ),
    Contract(
        operation="moh.load_balance_loss",
        sizes=ROUTED,
        arrays=(P, CHOICE, Array("valid", "batch queries", make=make_valid, optional=True)),
        outputs=(Output("loss", wide=True, row_axes=0, by_query=False),),
        parameters=rescaled,
        poison=poison_padding,
        neutral={"valid": lambda case: np.ones(case.shape("batch queries"), bool)},
        bad_inputs=(
            *BAD_CHOICE,
            ("padding of floats", "valid", lambda a: np.ones(a["p"].shape[:2])),
            ("padding of one axis", "valid", lambda a: np.ones(a["p"].shape[1], bool)),
        ),
    ),
)
