"""Wrong triples of lean attention: made, merged or turned into a result in the wrong way."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, replacing, right, spoiling
from attnspec.reference.parallel.lean_attention import Triple

PARTIAL = right("lean_attention.partial")
MERGE = right("lean_attention.merge")
FINALIZE = right("lean_attention.finalize")
LOG2_E = np.float32(1 / np.log(2))


def sum_from_1(triple: Triple) -> Triple:
    """The sum of a row that sees nothing is 1: the running sum starts there."""
    return triple._replace(l=np.maximum(triple.l, 1))


def mask_from_the_start(q: np.ndarray, k: np.ndarray, v: np.ndarray, lo: int, hi: int,
                        scale: Any = None, mask: Any = None) -> Triple:  # fmt: skip
    """The mask's columns are counted from the first key read."""
    if isinstance(mask, np.ndarray) and mask.dtype == bool and isinstance(lo, int) and lo > 0:
        mask = np.roll(mask, lo, axis=-1)
    return PARTIAL(q, k, v, lo, hi, scale, mask)


def scaled_or_masked(q: np.ndarray, k: np.ndarray, v: np.ndarray, lo: int, hi: int,
                     scale: Any = None, mask: Any = None) -> Triple:  # fmt: skip
    """A mask switches the scale off."""
    return PARTIAL(q, k, v, lo, hi, scale if mask is None else 1.0, mask)


def multiplied_by_zero(q: np.ndarray, k: np.ndarray, v: np.ndarray, lo: int, hi: int,
                       scale: Any = None, mask: Any = None) -> Triple:  # fmt: skip
    """A hidden value has weight 0, and NaN times 0 is NaN."""
    m, total, o = PARTIAL(q, k, v, lo, hi, scale, mask)
    return Triple(m, total, o + 0 * v[..., lo:hi, :].sum(axis=-2, keepdims=True))


def first_maximum(a: Triple, b: Triple) -> Triple:
    """The first triple's maximum is the reference of both."""
    merged = MERGE(a, b)
    with np.errstate(all="ignore"):
        scale = np.exp(b.m - np.where(np.isneginf(a.m), b.m, a.m))
    total = a.l + scale * b.l
    return Triple(merged.m, total, a.o + scale[..., None] * b.o)


def unguarded(a: Triple, b: Triple) -> Triple:
    with np.errstate(invalid="ignore"):
        return replacing(MERGE, _finite=lambda m: m)(a, b)


def in_their_own_bits(a: Triple, b: Triple) -> Triple:
    """NumPy's arithmetic: 16-bit triples are multiplied and added in 16 bits."""
    return MERGE(a, b)


def nan_of_nothing(m: np.ndarray, l: np.ndarray, o: np.ndarray) -> Any:
    _, lse = FINALIZE(m, l, o)
    with np.errstate(invalid="ignore"):
        return o / l[..., None], lse


def mutant(name: str, law: str, bug: str, call: Any, operation: str) -> Mutant:
    return Mutant(f"lean_attention.{name}", f"lean_attention.{operation}", law, bug, call)


MUTANTS = (
    mutant("shifted-mask", "agreement", "mask columns are counted from the first key read",
           mask_from_the_start, "partial"),
    mutant("mask-unscales", "neutral", "a mask switches the scale off", scaled_or_masked,
           "partial"),
    mutant("leak", "poison", "hidden values are multiplied by 0", multiplied_by_zero, "partial"),
    mutant("sum-from-1", "agreement", "the sum of a row that sees nothing is 1",
           spoiling(PARTIAL, sum_from_1), "partial"),
    mutant("first-maximum", "monoid", "the first maximum is the reference of both",
           first_maximum, "merge"),
    mutant("nothing-plus-nothing", "agreement", "two empty triples make NaN", unguarded, "merge"),
    Mutant("lean_attention.half-merge", "lean_attention.merge", "cancelling",
           "16-bit triples are merged in 16 bits", in_their_own_bits,
           settings={"dtypes": ("float16",)}),
    mutant("nan-of-nothing", "agreement", "an empty triple gives NaN", nan_of_nothing,
           "finalize"),
    mutant("lse-base-2", "agreement", "lse is in base 2",
           spoiling(FINALIZE, lambda r: (r[0], r[1] * r[1].dtype.type(LOG2_E))), "finalize"),
)  # fmt: skip
