"""Contracts of SeerAttention's selection: by threshold, by ratio, and from queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Ranking
from attnspec.conformance.values import make_values
from attnspec.reference.selection.seer_attention_gate import gate_rope, gate_scores, pool_blocks
from attnspec.reference.selection.seer_attention_selection import ratio_to_k

BLOCKS = {"batch": (1, 2), "kv_heads": (1, 2), "group": (1, 2), "blocks": (1, 24)}
KINDS = (("max", "min", "avg"), ("min", "avg"), ("avg",), ("max", "min"), ("max",))
Drawn = dict[str, st.SearchStrategy[Any]]


def finish(nb: int, last_dense: bool, force_diagonal: bool) -> np.ndarray:
    """bool (nb, nb): the blocks that are added after the choice."""
    row = np.arange(nb)[:, None]
    added = (last_dense & (row >= nb - 2)) | (force_diagonal & np.eye(nb, dtype=bool))
    return np.asarray(added & np.tri(nb, dtype=bool))


def rank_ratio(
    G: np.ndarray,
    rho: float,
    last_dense: bool = True,
    force_diagonal: bool = False,
    exact: str = "always",
) -> Ranking:
    nb = G.shape[-1]
    return Ranking(
        G,
        ratio_to_k(rho, nb),
        exact,
        allowed=np.broadcast_to(np.tri(nb, dtype=bool), G.shape),
        extra=np.broadcast_to(finish(nb, last_dense, force_diagonal), G.shape),
    )


def rank_blocks(
    q: np.ndarray,
    k: np.ndarray,
    Wq: np.ndarray | None,
    Wk: np.ndarray,
    b: int,
    q_kinds: tuple[str, ...],
    k_kinds: tuple[str, ...],
    base: float,
    tau: float | None,
    rho: float | None,
    last_dense: bool,
    force_diagonal: bool,
) -> Ranking:
    """The gate's scores, of which a ratio or a threshold on their softmax chooses."""
    pq, pk = pool_blocks(q, b, q_kinds), pool_blocks(k, b, k_kinds)
    nb = pq.shape[-2]
    cos, sin = gate_rope(nb, b, Wk.shape[-1], base)
    G = gate_scores(pq, pk, Wq, Wk, cos, sin)
    if rho is not None:
        return rank_ratio(G, rho, last_dense, force_diagonal, exact="never")
    return Ranking(
        G,
        threshold=2e-3 if tau is None else tau,
        softmax=True,
        allowed=np.broadcast_to(np.tri(nb, dtype=bool), G.shape),
        extra=np.broadcast_to(finish(nb, last_dense, force_diagonal), G.shape),
    )


def gate_parameters(sizes: Mapping[str, int]) -> Drawn:
    """Poolings and one rule; thresholds around the weight of an average block."""
    rules: list[tuple[float | None, float | None]] = [(None, None)]
    rules += [(tau, None) for tau in (0.05, 0.2, 0.5, -1.0)]
    rules += [(None, rho) for rho in (0.1, 0.5, 0.8, 1.0)]
    rule = st.shared(st.sampled_from(rules), key="rule")
    return {
        "b": st.sampled_from([2, 1, 3, 8, 16, 32, 64]),
        "q_kinds": st.sampled_from((("avg",), ("max",), ("max", "avg"))),
        "k_kinds": st.sampled_from(KINDS),
        "base": st.sampled_from([10000.0, 100.0]),
        "tau": rule.map(lambda pair: pair[0]),
        "rho": rule.map(lambda pair: pair[1]),
        "last_dense": st.booleans(),
        "force_diagonal": st.booleans(),
    }


def projected(case: Case) -> bool:
    """Whether queries are projected: always if they are pooled in two ways, else sometimes."""
    return len(case.parameters["q_kinds"]) > 1 or case.seed % 2 == 0


def gate_width(case: Case) -> int:
    """dg: free with a projection of the queries, else the width of the heads."""
    return 2 * case.sizes["half_gate"] if projected(case) else case.sizes["d"]


def make_Wq(rng: np.random.Generator, case: Case) -> np.ndarray | None:  # noqa: N802
    if not projected(case):
        return None
    channels = len(case.parameters["q_kinds"]) * case.sizes["d"]
    return rng.standard_normal((case.heads, channels, gate_width(case))) / channels**0.5


def make_Wk(rng: np.random.Generator, case: Case) -> np.ndarray:  # noqa: N802
    channels = len(case.parameters["k_kinds"]) * case.sizes["d"]
    heads = case.sizes["kv_heads"] if projected(case) else case.heads
    return rng.standard_normal((heads, channels, gate_width(case))) / channels**0.5


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Weights in eighths, so that some are equal to a threshold; the future has none."""
    shape = case.shape("batch heads blocks blocks")
    return np.tri(shape[-1]) * rng.integers(0, 9, shape) / 8


def make_scores(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Scores of any kind, some of them nearly tied; in the future the fill of the authors."""
    shape = case.shape("batch heads blocks blocks")
    scores = make_values(case.values, rng, shape, "query")
    near = np.round(scores) + 2.0**-10 * rng.integers(0, 16, shape)
    past = np.tri(shape[-1], dtype=bool)
    return np.where(past, near if case.seed % 2 else scores, -1e9)


def poison_future(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    weights = arguments["softmaxed"]
    arguments["softmaxed"] = np.where(np.tri(weights.shape[-1], dtype=bool), weights, np.nan)
    return arguments


def _finishing(**others: st.SearchStrategy[Any]) -> Any:
    flags = {"last_dense": st.booleans(), "force_diagonal": st.booleans()}
    return lambda sizes: {**others, **flags}


def even(sizes: dict[str, int]) -> dict[str, int]:
    """Rotary positions need pairs of channels."""
    return {**sizes, "d": max(2, sizes["d"] // 2 * 2)}


BAD_RULES = (
    ("both rules", "tau", lambda a: 0.1 if a["rho"] is not None else "high"),
    ("a threshold in words", "tau", lambda a: "high"),
    ("a threshold that is NaN", "tau", lambda a: np.nan),
    ("a share in words", "rho", lambda a: "half"),
    ("queries pooled by the median", "q_kinds", lambda a: ("median",)),
    ("keys pooled twice", "k_kinds", lambda a: ("max", "max")),
)


def bad_square(name: str) -> tuple[tuple[str, str, Any], ...]:
    """What is no array of scores (batch, heads, blocks, blocks)."""
    return (
        (f"more rows than columns in {name}", name, lambda a: a[name].repeat(2, axis=-2)),
        (f"a list as {name}", name, lambda a: a[name].tolist()),
        (f"integers as {name}", name, lambda a: np.zeros(a[name].shape, np.int64)),
        (f"{name} without heads", name, lambda a: a[name][0, 0]),
        (f"no {name}", name, lambda a: None),
    )


CONTRACTS = (
    Contract(
        operation="seer_attention.select_threshold",
        sizes=BLOCKS,
        queries="blocks",
        keys="blocks",
        arrays=(Array("softmaxed", "batch heads blocks blocks", make=make_weights),),
        outputs=(Output("M", kind="exact"),),
        parameters=_finishing(tau=st.sampled_from([2e-3, 0.0, 0.125, 0.5, 1.0, -1.0])),
        poison=poison_future,
        bad_inputs=(
            ("a threshold in words", "tau", lambda a: "high"),
            ("a threshold that is NaN", "tau", lambda a: np.nan),
            ("no threshold", "tau", lambda a: None),
            *bad_square("softmaxed"),
        ),
    ),
    Contract(
        operation="seer_attention.ratio_to_k",
        sizes={},
        arrays=(),
        outputs=(Output("k", kind="exact", plain=True),),
        parameters=lambda sizes: {
            "rho": st.sampled_from([1e-6, 0.01, 0.05, 0.1, 0.19, 0.36, 0.51, 0.75, 0.99, 1.0]),
            "nb": st.integers(0, 300),
        },
        bad_inputs=(
            ("no share", "rho", lambda a: 0.0),
            ("more than all", "rho", lambda a: 1.5),
            ("a share in words", "rho", lambda a: "half"),
            ("fewer blocks than none", "nb", lambda a: -1),
            ("half a block", "nb", lambda a: 0.5),
        ),
    ),
    Contract(
        operation="seer_attention.select_ratio",
        sizes=BLOCKS,
        queries="blocks",
        keys="blocks",
        arrays=(Array("G", "batch heads blocks blocks", make=make_scores),),
        outputs=(Output("M", kind="selection"),),
        parameters=_finishing(rho=st.sampled_from([0.5, 0.05, 0.2, 0.75, 0.9, 1.0])),
        ranking=lambda arguments: rank_ratio(**arguments),
        bad_inputs=(
            ("no share", "rho", lambda a: 0.0),
            ("more than all", "rho", lambda a: 1.5),
            ("a share in words", "rho", lambda a: "half"),
            *bad_square("G"),
        ),
    ),
    Contract(
        operation="seer_attention.select_blocks",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 3),
            "tokens": (1, 72),
            "d": (1, 24),
            "half_gate": (1, 12),
        },
        fix=even,
        arrays=(
            Array("q", "batch heads tokens d", role="query"),
            Array("k", "batch kv_heads tokens d", role="key"),
            Array("Wq", make=make_Wq),
            Array("Wk", make=make_Wk),
        ),
        outputs=(Output("M", kind="selection"),),
        parameters=gate_parameters,
        ranking=lambda arguments: rank_blocks(**arguments),
        bad_inputs=(
            ("k with more tokens than q", "k", lambda a: a["k"].repeat(2, axis=-2)),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
            ("a projection of other channels", "Wk", lambda a: a["Wk"].repeat(2, axis=-2)),
            ("a projection of more heads", "Wk", lambda a: a["Wk"].repeat(9, axis=0)),
            ("a projection without heads", "Wk", lambda a: a["Wk"][0]),
            ("no projection of the keys", "Wk", lambda a: None),
            ("blocks of no token", "b", lambda a: 0),
            *BAD_RULES,
        ),
    ),
)
