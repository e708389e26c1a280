"""Wrong kernels of NTK-Attention on packed sequences: keys that are shared as the prefix is."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right
from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense.attention import attend
from attnspec.reference.linear import ntk_attention_batches as batches

MERGE = right("ntk_attention.merge_prefix")
PACKED = right("ntk_attention.ntk_packed")
TERMS = right("ntk_attention.prefix_terms")
BLOCK = 8


def one_sequence(arguments: dict[str, Any]) -> None:
    for name in ("q_offsets", "k_offsets"):
        arguments[name] = arguments[name][[0, -1]]


def causal_across(
    q: Any, K: Any, V: Any, Z: Any, k: Any, q_offsets: Any, k_offsets: Any, *,
    causal: bool = False, scale: Any = None, positivity: str = "abs",
) -> Any:  # fmt: skip
    """The causal rule is aligned at the end of everything, not of each sequence."""
    out = PACKED(
        q, K, V, Z, k, q_offsets, k_offsets, causal=causal, scale=scale, positivity=positivity
    )
    if not causal:
        return out
    own, theirs = (
        np.searchsorted(ends[1:], np.arange(x.shape[-2]), side="right")
        for x, ends in ((q, q_offsets), (K, k_offsets))
    )
    mask = (own[:, None] == theirs) & causal_mask(len(own), len(theirs))
    soft, lse = attend(q, K, V, mask=mask, scale=scale)
    return MERGE(soft, lse, *TERMS(q, Z, k, positivity=positivity))


def by_blocks(arguments: dict[str, Any]) -> None:
    """Keys begin at the last whole block before their sequence does."""
    ends = arguments["k_offsets"].copy()
    ends[1:-1] = ends[1:-1] // BLOCK * BLOCK
    arguments["k_offsets"] = ends


def shared_by_blocks(*args: Any, **options: Any) -> Any:
    """A block that two sequences share is read by both, its hidden rows times 0."""
    _, K, V, *_, q_offsets, k_offsets = args
    out = PACKED(*args, **options)
    bad = ~np.isfinite(V).all(axis=(0, 2)) | ~np.isfinite(K).all(axis=(0, 2))
    for n in range(len(q_offsets) - 1):
        first, last = k_offsets[n] // BLOCK * BLOCK, -(-k_offsets[n + 1] // BLOCK) * BLOCK
        if k_offsets[n] < k_offsets[n + 1] and bad[first:last].any():
            out[..., q_offsets[n] : q_offsets[n + 1], :] = np.nan
    return out


def last_sequence_only(q: Any, K: Any, V: Any, Z: Any, k: Any, q_offsets: Any, k_offsets: Any,
                       dout: Any, **options: Any) -> Any:  # fmt: skip
    """dZ and dk are those of the last sequence: each writes over those before it."""
    dq, dK, dV, *_ = batches.ntk_packed_backward(
        q, K, V, Z, k, q_offsets, k_offsets, dout, **options
    )
    rows, keys = (slice(ends[-2], None) for ends in (q_offsets, k_offsets))
    own = batches.ntk_backward(
        q[..., rows, :], K[..., keys, :], V[..., keys, :], Z, k, dout[..., rows, :], **options
    )
    return dq, dK, dV, *own[3:]


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"ntk_attention.{name}", "ntk_attention.ntk_packed", law, bug, call, **rest)


MUTANTS = (
    mutant("packed-as-one", "agreement", "sequences see one another",
           altering(PACKED, one_sequence)),
    mutant("packed-causal", "agreement", "the causal rule is aligned at the end of the last",
           causal_across),
    mutant("packed-by-blocks", "agreement", "a sequence begins at the last whole block of keys",
           altering(PACKED, by_blocks)),
    mutant("packed-shared-block", "alone", "rows of a neighbour are multiplied by 0",
           shared_by_blocks),
    mutant("packed-last-only", "gradient", "dZ and dk are those of the last sequence", PACKED,
           backward=last_sequence_only),
)  # fmt: skip
