"""Contracts of SeerAttention's self-distillation: the target, the loss and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.selection.seer_attention import (
    BAD_BLOCKS,
    BAD_HEADS,
    BAD_VALUES,
    SIZES,
    K,
    Q,
    V,
)
from attnspec.conformance.contracts.selection.seer_attention_selection import (
    BLOCKS,
    bad_square,
    make_scores,
)
from attnspec.reference.selection.seer_attention_training import normalise_gt


def make_largest(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Largest weights of pairs of blocks, none in the future; one row in ten is zero."""
    shape = case.shape("batch heads blocks blocks")
    A = np.tri(shape[-1]) * rng.random(shape) ** 3
    return np.where(rng.random((*shape[:-1], 1)) < 0.1, 0.0, A)


def make_target(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows that sum to one, or are zero; a few pairs have no weight."""
    A = make_largest(rng, case)
    return normalise_gt(np.where(rng.random(A.shape) < 0.1, 0.0, A))


def _parameters(sizes: Any) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "b": st.sampled_from([1, 2, 3, 8, 16, 64]),
        "scale": st.sampled_from([None, 0.5]),
    }


CONTRACTS = (
    Contract(
        operation="seer_attention.attend_with_block_max",
        sizes=SIZES,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V),
        outputs=(Output("out"), Output("A", wide=True, by_query=False)),
        parameters=_parameters,
        linear_in=("v",),
        causal=lambda case: True,
        bad_inputs=(*BAD_HEADS, *BAD_VALUES, *BAD_BLOCKS),
    ),
    Contract(
        operation="seer_attention.normalise_gt",
        sizes=BLOCKS,
        queries="blocks",
        keys="blocks",
        arrays=(Array("A", "batch heads blocks blocks", make=make_largest),),
        outputs=(Output("GT", wide=True),),
        bad_inputs=tuple(
            bad for bad in bad_square("A") if "rows" not in bad[0] and "heads" not in bad[0]
        ),
    ),
    Contract(
        operation="seer_attention.distill_loss",
        sizes=BLOCKS,
        queries="blocks",
        keys="blocks",
        least={"blocks": 1},
        arrays=(
            Array("G", "batch heads blocks blocks", make=make_scores),
            Array("GT", "batch heads blocks blocks", make=make_target),
        ),
        outputs=(Output("loss", wide=True, row_axes=0, cancels=True),),
        bad_inputs=(
            ("a target of another shape", "GT", lambda a: a["GT"].repeat(2, axis=-1)),
            ("a target without a batch", "GT", lambda a: a["GT"][0]),
            ("no target", "GT", lambda a: None),
            ("scores as a list", "G", lambda a: a["G"].tolist()),
            ("scores as integers", "G", lambda a: np.zeros(a["G"].shape, np.int64)),
            ("no scores", "G", lambda a: None),
        ),
    ),
    Contract(
        operation="seer_attention.decode_target",
        sizes={axis: ends for axis, ends in SIZES.items() if axis != "dv"},
        queries="tokens",
        keys="tokens",
        arrays=(Q, K),
        outputs=(Output("target", wide=True),),
        parameters=_parameters,
        causal=lambda case: True,
        bad_inputs=(*BAD_HEADS, *BAD_BLOCKS),
    ),
)
