"""Contracts of MoA's rules: spans, sizes, masks, layouts and what they hide."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.patterns.moa import bad_plans, one_a_head
from attnspec.conformance.contracts.patterns.moa_influence import poison_above
from attnspec.conformance.values import bad_integers
from attnspec.reference.patterns.moa_rules import layout

HEADS = {"kv_heads": (1, 4)}
PLAN = (Array("s", make=one_a_head(0, 4)), Array("c", make=one_a_head(1, 9)))


def make_numbers(values: tuple[float, ...]) -> Any:
    """One of `values` for each head."""
    return lambda rng, case: tuple(float(x) for x in rng.choice(values, case.sizes["kv_heads"]))


def whole_blocks(least: int, most: int) -> Any:
    """From `least` to `most` blocks for each head, as tokens."""
    blocks = one_a_head(least, most)
    return lambda rng, case: tuple(n * case.sizes["b"] for n in blocks(rng, case))


def make_layouts(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Layouts of rules, and some that no rule gives."""
    R, nb = case.shape("rules nb")
    grids = []
    for _ in range(R):
        rule = (float(rng.integers(-nb, nb + 1)), float(rng.integers(0, 5)) / 4)
        kept = layout(rule, nb, 1)
        grids.append(kept if rng.integers(2) else kept & (rng.random((nb, nb)) < 0.7))
    return np.stack(grids) if R else np.zeros((0, nb, nb), bool)


RULE = (
    Array("alpha", make=make_numbers((-1024.0, -130.5, 0.0, 64.0, 300.0, 2048.0))),
    Array("beta", make=make_numbers((0.0, 0.125, 0.3, 0.5, 1.0))),
)
BAD_RULES = (
    ("a rule that is text", "alpha", lambda a: "x"),
    ("an infinite rule", "alpha", lambda a: (np.inf,) * len(a["alpha"])),
    ("rules of fewer heads", "beta", lambda a: a["beta"][:-1]),
)
CONTRACTS = (
    Contract(
        operation="moa.span",
        sizes=HEADS,
        arrays=RULE,
        outputs=(Output("S", "exact"),),
        parameters=lambda sizes: {"N": st.sampled_from([0, 1, 100, 1037, 4096])},
        bad_inputs=(*BAD_RULES, *bad_integers("N", 0)),
    ),
    Contract(
        operation="moa.cache_sizes",
        sizes=HEADS,
        arrays=RULE,
        outputs=(Output("C", "exact"), Output("s", "exact"), Output("c", "exact")),
        parameters=lambda sizes: {
            "prompt": st.sampled_from([0, 37, 1000, 4096]),
            "max_new": st.sampled_from([0, 5, 1024]),
            "sink": st.sampled_from([64, 0, 16]),
            "minimum": st.sampled_from([128, 96]),
            "split": st.sampled_from([64, 32, 1]),
        },
        bad_inputs=(
            *BAD_RULES,
            ("sinks that leave no room", "sink", lambda a: 4096),
            *bad_integers("prompt", 0),
            *bad_integers("max_new", 0),
            *bad_integers("minimum"),
            *bad_integers("split"),
        ),
    ),
    Contract(
        operation="moa.moa_token_mask",
        sizes=HEADS,
        arrays=PLAN,
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {"T": st.integers(0, 20)},
        bad_inputs=(*bad_integers("T", 0), *bad_plans()),
    ),
    Contract(
        operation="moa.moa_block_mask",
        sizes={**HEADS, "b": (1, 4)},
        arrays=(Array("s", make=whole_blocks(0, 4)), Array("c", make=whole_blocks(1, 9))),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {"T": st.integers(0, 20), "block": st.just(sizes["b"])},
        bad_inputs=(
            *bad_integers("T", 0),
            *bad_integers("block"),
            ("half a block", "s", lambda a: (97 * a["block"] + 1 if a["block"] > 1 else -1,)),
            *bad_plans(),
        ),
    ),
    Contract(
        operation="moa.rule_space",
        sizes={},
        arrays=(),
        outputs=tuple(Output(name, dtype="float64") for name in ("alphas", "betas", "rules")),
        parameters=lambda sizes: {
            "N_min": st.sampled_from([2048, 64, 100]),
            "N_prof_max": st.sampled_from([8192, 4096]),
            "N_max": st.sampled_from([16384, 8192]),
            "n_alpha": st.sampled_from([None, 7, 1]),
            "n_beta": st.sampled_from([9, 4, 1]),
        },
        bad_inputs=(
            *bad_integers("N_min"),
            *bad_integers("n_beta"),
            ("profiles below the shortest", "N_prof_max", lambda a: 1),
            ("a longest length below the profiles", "N_max", lambda a: a["N_prof_max"] - 1),
            ("no value of alpha", "n_alpha", lambda a: 0),
        ),
    ),
    Contract(
        operation="moa.layout",
        sizes={},
        arrays=(Array("rule", make=lambda rng, case: (
            float(rng.choice([-130.0, -1.0, 63.0, 0.0, 200.0])),
            float(rng.choice([0.3, 0.07, 0.62, 0.0, 1.0])),
        )),),
        outputs=(Output("kept", "exact"),),
        parameters=lambda sizes: {
            "N": st.sampled_from([512, 1024, 64, 0]),
            "b": st.sampled_from([64, 32]),
        },
        bad_inputs=(
            ("a rule of one number", "rule", lambda a: (1.0,)),
            ("a length of half a block", "N", lambda a: 48),
            *bad_integers("b"),
        ),
    ),
    Contract(
        operation="moa.predicted_loss",
        sizes={"heads_of_it": (1, 3), "rules": (1, 4), "nb": (1, 8)},
        arrays=(
            Array("I", "heads_of_it nb nb"),
            Array("layouts", make=make_layouts),
        ),
        outputs=(Output("loss"),),
        linear_in=("I",),
        poison=poison_above("I"),
        bad_inputs=(
            ("layouts of integers", "layouts", lambda a: a["layouts"].astype(np.int64)),
            ("larger layouts", "layouts",
             lambda a: np.ones((2, a["I"].shape[1] + 1, a["I"].shape[1] + 1), bool)),
        ),
    ),
    Contract(
        operation="moa.density",
        sizes={"rules": (1, 4), "nb": (1, 8)},
        arrays=(Array("layout", make=make_layouts),),
        outputs=(Output("density", dtype="float64", row_axes=0),),
        bad_inputs=(
            ("a layout of integers", "layout", lambda a: a["layout"].astype(np.int64)),
            ("more rows than columns", "layout", lambda a: np.ones((1, 3, 2), bool)),
        ),
    ),
)  # fmt: skip
