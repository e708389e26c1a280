"""Wrong kernels of dense attention on packed sequences and step by step."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import ATTEND, BLOCK, no_lse_gradient
from attnspec.conformance.mutants.packing import multiplied_by_zero
from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense import attention
from attnspec.reference.dense.attention_gradient import attend_packed_backward

PACKED = right("attention.attend_packed")
STEP = right("attention.step")


def first_sequence_only(arguments: dict[str, Any]) -> None:
    """Keys of the last sequence are counted to the end of the longest one."""
    offsets = arguments["k_offsets"].copy()
    offsets[1:-1] = np.minimum(offsets[1:-1] + 1, offsets[-1])
    arguments["k_offsets"] = offsets


def causal_across(q: Any, k: Any, v: Any, q_offsets: Any, k_offsets: Any, *,
                  causal: bool = False, scale: Any = None) -> Any:  # fmt: skip
    """The causal rule is aligned at the end of everything, not of each sequence."""
    result = PACKED(q, k, v, q_offsets, k_offsets, causal=causal, scale=scale)
    if not causal:
        return result
    q_entry, k_entry = (
        np.searchsorted(ends[1:], np.arange(x.shape[-2]), side="right")
        for x, ends in ((q, q_offsets), (k, k_offsets))
    )
    mask = (q_entry[:, None] == k_entry) & causal_mask(len(q_entry), len(k_entry))
    return ATTEND(q, k, v, mask=mask, scale=scale)


def not_causal(*args: Any, causal: bool = False, **options: Any) -> Any:
    return ATTEND(*args, **options)


def forgets_the_oldest(result: Any) -> Any:
    out, state = result
    if state.k.shape[-2] > BLOCK:
        state = attention.State(state.k[..., 1:, :], state.v[..., 1:, :])
    return out, state


MUTANTS = (
    Mutant("attention.packed-overlap", "attention.attend_packed", "agreement",
           "key ranges of packed sequences are shifted by one",
           altering(PACKED, first_sequence_only)),
    Mutant("attention.packed-leaks", "attention.attend_packed", "alone",
           "values of other sequences are multiplied by 0", multiplied_by_zero(PACKED)),
    Mutant("attention.packed-causal", "attention.attend_packed", "agreement",
           "the causal rule of packed sequences is aligned at the end of the last", causal_across),
    Mutant("attention.packed-no-dlse", "attention.attend_packed", "gradient",
           "the gradient through lse is dropped", PACKED,
           backward=altering(attend_packed_backward, no_lse_gradient)),
    Mutant("attention.short-state", "attention.step", "stream",
           "the oldest token falls out of the state", spoiling(STEP, forgets_the_oldest)),
    Mutant("attention.step-future", "attention.step", "agreement",
           "tokens of a step see those behind them", replacing(STEP, attend=not_causal)),
)  # fmt: skip
