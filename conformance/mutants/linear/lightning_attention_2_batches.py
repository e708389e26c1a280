"""Wrong kernels of Lightning Attention-2's blocks and unequal sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import read_as_contiguous, wrap_32_bits
from attnspec.conformance.mutants.packing import multiplied_by_zero, over_the_boundary
from attnspec.reference.linear import lightning_attention_2_batches as batches
from attnspec.reference.linear import lightning_attention_2_chunks as chunks
from attnspec.reference.linear.lightning_attention_2 import attend_backward

ATTEND = right("lightning_attention_2.attend")
PACKED = right("lightning_attention_2.attend_packed")
PADDED = right("lightning_attention_2.attend_padded")
STATES = right("lightning_attention_2.chunk_states")
BACKWARD = right("lightning_attention_2.backward_chunk")
# A name that mutants replace while they run is kept here as it is.
sum_groups = chunks.sum_groups


def not_reset(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, offsets: np.ndarray,
              S0: Any = None, **options: Any) -> Any:  # fmt: skip
    """The state runs on from one sequence to the next."""
    o, S = PACKED(q, k, v, s, offsets, S0, **options)
    if S0 is not None:
        return o, S
    return ATTEND(q, k, v, s, **options)[0], S


def boundary(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, offsets: np.ndarray,
             S0: Any = None, **options: Any) -> Any:  # fmt: skip
    """A sequence starts with the block that holds its first token."""

    def packed(q: Any, k: Any, v: Any, offsets: Any, S0: Any, **options: Any) -> Any:
        return PACKED(q, k, v, s, offsets, S0, **options)

    def alone(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return ATTEND(q, k, v, s, **options)

    return over_the_boundary(packed, alone)(q, k, v, offsets, S0, **options)


def padding_ages(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, valid: np.ndarray,
                 S0: Any = None, **options: Any) -> Any:  # fmt: skip
    """Padded values are zero, and that is all."""
    PADDED(q, k, v, s, valid, S0, **options)
    real = valid[:, None, :, None]
    k, v = np.where(real, k, 0).astype(k.dtype), np.where(real, v, 0).astype(v.dtype)
    o, S = ATTEND(q, k, v, s, S0, **options)
    return np.where(real, o, 0).astype(o.dtype), S


def padding_times_zero(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray,
                       valid: np.ndarray, S0: Any = None, **options: Any) -> Any:  # fmt: skip
    """What is padded is multiplied by 0, which leaves NaN as it is."""
    o, S = PADDED(q, k, v, s, valid, S0, **options)
    padded = ~valid[:, None, :, None]
    return o, S + 0 * np.sum(np.where(padded, v, 0)).astype(S.dtype)


def padding_sees(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, valid: np.ndarray,
                 S0: Any = None, **options: Any) -> Any:  # fmt: skip
    """Outputs of padded tokens are what the state gives."""
    o, S = PADDED(q, k, v, s, valid, S0, **options)
    return np.where(valid[:, None, :, None], o, S[:, :, :1, :]).astype(o.dtype), S


def padding_ages_backward(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray,
                          valid: np.ndarray, S0: Any, do: np.ndarray, dS: Any = None,
                          **options: Any) -> Any:  # fmt: skip
    """The gradient of the state is decayed at padded tokens too."""
    real = valid[:, None, :, None]
    q, k, v, do = (np.where(real, x, 0).astype(x.dtype) for x in (q, k, v, do))
    return attend_backward(q, k, v, s, S0, do, dS, **options)


def refuses_nothing_to_do(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any,
                          **options: Any) -> Any:  # fmt: skip
    if isinstance(k, np.ndarray) and k.ndim == 4 and k.shape[-2] == 0:
        raise ValueError("k: got no tokens, expected some")
    return ATTEND(q, k, v, *rest, **options)


def self_only(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any, **options: Any) -> Any:
    queries, keys = (x.shape[-2] if getattr(x, "ndim", 0) == 4 else 0 for x in (q, k))
    if queries < keys:
        raise ValueError(f"k: got {keys} tokens, expected {queries}, as in q")
    return ATTEND(q, k, v, *rest, **options)


def crops_to_fit(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any, **options: Any) -> Any:
    if all(isinstance(x, np.ndarray) and x.ndim == 4 for x in (k, v)):
        tokens = min(k.shape[-2], v.shape[-2])
        k, v = k[..., :tokens, :], v[..., :tokens, :]
    return ATTEND(q, k, v, *rest, **options)


def clamped(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any, **options: Any) -> Any:
    """Sums are held in a number that ends at 65504."""
    o, S = ATTEND(q, k, v, *rest, **options)
    return np.clip(o, -65504, 65504), S


class Racing:
    """One of two roundings of the last state, call by call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        o, S = ATTEND(*args, **options)
        self.calls += 1
        return o, S * S.dtype.type(1 + 2**-23 * (self.calls % 2))


def last_block_skipped(k: np.ndarray, v: np.ndarray, g: np.ndarray, block: int,
                       S0: Any = None) -> Any:  # fmt: skip
    """The last state is the one that enters the last block, if that is short."""
    S_entering, S = STATES(k, v, g, block, S0)
    short = g.shape[-1] % block and S_entering.shape[-3] > 1
    return S_entering, S_entering[..., -1, :, :] if short else S


def first_of_group(x: np.ndarray, kv_heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // kv_heads, :, :]


def averaged_over_group(x: np.ndarray, kv_heads: int) -> np.ndarray:
    return sum_groups(x, kv_heads) * x.dtype.type(kv_heads / x.shape[-3])


def replace_gradient(place: int, change: Any) -> Any:
    """`backward_chunk` with one of its results changed."""

    def spoil(result: Any) -> Any:
        gradients = list(result)
        gradients[place] = change(gradients[place])
        return tuple(gradients)

    return spoiling(BACKWARD, spoil)


def without_last_state(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, do: np.ndarray,
                       dS_final: Any = None, block: int = 64, S0: Any = None) -> Any:  # fmt: skip
    """dg lacks the term of the last state, which every token has decayed."""
    *others, dg, dS0 = BACKWARD(q, k, v, g, do, dS_final, block, S0)
    if dS_final is not None:
        S = STATES(k, v, g, block, S0)[1]
        dg = dg - np.sum(S * dS_final, axis=(-1, -2))[..., None]
    return (*others, dg.astype(g.dtype), dS0)


def mutant(name: str, operation: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(
        f"lightning_attention_2.{name}", f"lightning_attention_2.{operation}", law, bug, call,
        **rest,
    )  # fmt: skip


MUTANTS = (
    mutant("contiguous", "attend", "layout", "strides are made up from the shape",
           altering(ATTEND, read_as_contiguous)),
    mutant("wrap-32", "attend", "far", "offsets are computed in 32 bits",
           altering(ATTEND, wrap_32_bits)),
    mutant("nothing-to-do", "attend", "tiny", "a sequence without a token is refused",
           refuses_nothing_to_do),
    mutant("self-only", "attend", "cells", "more keys than queries are refused", self_only),
    mutant("crop", "attend", "refusal", "keys and values of different lengths are cropped to fit",
           crops_to_fit),
    mutant("clamped", "attend", "magnitude", "outputs end at the largest 16-bit number", clamped),
    mutant("racing", "attend", "repeatable", "the last state depends on who finishes first",
           Racing()),
    mutant("not-reset", "attend_packed", "agreement", "the state runs on into the next sequence",
           not_reset),
    mutant("over-the-boundary", "attend_packed", "agreement",
           "a block holds the end of one sequence and the start of the next",
           boundary),
    mutant("packed-leaks", "attend_packed", "alone",
           "values of other sequences are multiplied by 0", multiplied_by_zero(PACKED)),
    mutant("packed-first-of-group", "attend_packed", "gradient",
           "dk and dv are those of the first head of the group", PACKED,
           backward=replacing(batches.attend_packed_backward, backward_chunk=replacing(
               BACKWARD, sum_groups=first_of_group))),
    mutant("padding-ages", "attend_padded", "agreement", "padded tokens decay the state",
           padding_ages),
    mutant("padding-leaks", "attend_padded", "poison", "padded rows are multiplied by 0",
           padding_times_zero),
    mutant("padding-sees", "attend_padded", "agreement", "padded tokens have an output",
           padding_sees),
    mutant("padding-ages-backward", "attend_padded", "gradient",
           "padded tokens decay the gradient of the state", PADDED,
           backward=padding_ages_backward),
    mutant("short-block", "chunk_states", "agreement", "a short last block is left out",
           last_block_skipped),
    mutant("group-average", "backward_chunk", "heads", "dk and dv are averaged over the group",
           replacing(BACKWARD, sum_groups=averaged_over_group)),
    mutant("dg-of-the-past", "backward_chunk", "agreement",
           "dg sums the tokens before, not those behind",
           replace_gradient(3, lambda dg: np.flip(dg, axis=-1))),
    mutant("dg-without-state", "backward_chunk", "agreement",
           "dg lacks the term of the last state", without_last_state),
    mutant("upstream-on-a-grid", "backward_chunk", "linearity",
           "the upstream gradient is rounded to a fixed grid",
           altering(BACKWARD, lambda a: a.update(do=np.round(a["do"] * 64) / 64)
                    if isinstance(a["do"], np.ndarray) and a["do"].dtype.kind == "f" else None)),
)  # fmt: skip
