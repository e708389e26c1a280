"""Wrong kernels of SeerAttention's attention: masks misread, gates fed with the wrong thing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import (
    eleven_bits,
    first_of_group,
    leaks_masked_values,
    nan_when_empty,
    no_lse_gradient,
    read_as_contiguous,
    wrap_32_bits,
)
from attnspec.reference.dense import attention as dense
from attnspec.reference.primitives.rope import rope
from attnspec.reference.selection import seer_attention as seer

SPARSE = right("seer_attention.block_sparse_attend")
BACKWARD = seer.block_sparse_attend_backward
ATTEND = right("seer_attention.attend")
BLOCK = 8
token_mask, select_blocks = seer._token_mask, seer.select_blocks


def with_dense(**steps: Any) -> Any:
    """The sparse attention on a dense one with wrong steps."""
    return replacing(SPARSE, dense=SimpleNamespace(attend=replacing(dense.attend, **steps)))


def with_gradient(**steps: Any) -> Any:
    backward = replacing(dense.attend_backward, **steps)
    return replacing(BACKWARD, dense=SimpleNamespace(attend_backward=backward))


def not_causal_inside(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, causal: bool,
                      mask: np.ndarray, scale: Any) -> Any:  # fmt: skip
    """The block on the diagonal is treated as full: every query sees the next token too."""
    T = mask.shape[-1]
    return dense.attend(q, k, v, mask=mask & np.tri(T, T, 1, dtype=bool), scale=scale)


def causal_in_the_last(q: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray, b: int, *,
                       scale: Any = None) -> Any:  # fmt: skip
    """Only the last selected block of a row is causal, be it the diagonal or not."""
    mask = token_mask(q, k, v, M, b)
    T, nb = mask.shape[-1], M.shape[-1]
    last = np.max(np.where(M, np.arange(nb), -1), axis=-1, initial=-1).repeat(b, axis=-1)
    in_last = np.arange(T) // b == last[..., :T, None]
    return dense.attend(q, k, v, mask=mask & (np.tri(T, dtype=bool) | ~in_last), scale=scale)


def next_block_too(q: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray, b: int) -> Any:
    """A query sees the block behind each block that was selected."""
    mask = token_mask(q, k, v, M, b)
    return mask | np.roll(mask, b, axis=-1)


def one_mask_a_group(q: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray, b: int) -> Any:
    """The heads of a group share the mask of the first."""
    mask = token_mask(q, k, v, M, b)
    group = q.shape[-3] // k.shape[-3]
    return mask[..., np.arange(q.shape[-3]) // group * group, :, :]


def whole_blocks_only(q: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray, b: int) -> Any:
    """Keys of a short last block are skipped."""
    mask = token_mask(q, k, v, M, b).copy()
    if mask.shape[-1] > b:
        mask[..., mask.shape[-1] // b * b :] = False
    return mask


def first_entry_mask(arguments: dict[str, Any]) -> None:
    M = arguments["M"]
    if isinstance(M, np.ndarray) and M.ndim == 4:
        arguments["M"] = np.repeat(M[:1], len(M), axis=0)


def mask_that_fits(arguments: dict[str, Any]) -> None:
    """A mask of more blocks or more heads is cut to fit."""
    M, q, b = arguments["M"], arguments["q"], arguments["b"]
    if all(getattr(x, "ndim", 0) == 4 for x in (q, M)) and isinstance(b, int) and b > 0:
        nb = -(-q.shape[-2] // b)
        arguments["M"] = M[:, : q.shape[-3], :nb, :nb]


def clipped(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["v"], np.ndarray) and arguments["v"].dtype.kind == "f":
        arguments["v"] = np.clip(arguments["v"], -2, 2)


def whole_lse(result: Any) -> Any:
    return result[0], np.floor(result[1])


class CachedList:
    """The list of selected blocks is built once for a shape."""

    def __init__(self) -> None:
        self.masks: dict[Any, np.ndarray] = {}

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray, b: int,
                 **options: Any) -> Any:  # fmt: skip
        if not isinstance(M, np.ndarray) or M.dtype != bool:
            return SPARSE(q, k, v, M, b, **options)
        old = self.masks.get(M.shape, M)
        self.masks[M.shape] = M.copy()
        return SPARSE(q, k, v, old, b, **options)


class Racing:
    """The last bits depend on the order in which blocks are merged."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        out, lse = SPARSE(*args, **options)
        self.calls += 1
        return out * out.dtype.type(1 + 2**-23 * (self.calls % 2)), lse


def gradient_everywhere(q: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray,
                        b: int) -> Any:  # fmt: skip
    """The backward pass runs over all blocks of the past."""
    return np.ones_like(token_mask(q, k, v, M, b))


def not_rotated(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    return x


def from_one(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Queries, which have more heads than keys, stand one token further on."""
    return rope(x, positions + (x.shape[-3] > 1), base)


def gate_after_rotation(q: np.ndarray, k: np.ndarray, *weights: Any, **options: Any) -> Any:
    """The gate reads queries and keys that are rotated already."""
    positions = np.arange(q.shape[-2])
    return select_blocks(rope(q, positions), rope(k, positions), *weights, **options)


def diagonal_always(*arguments: Any, **options: Any) -> Any:
    return select_blocks(*arguments, **{**options, "force_diagonal": True})


def dense_after_all(q: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray, b: int,
                    **options: Any) -> Any:  # fmt: skip
    """The mask is returned, and not used."""
    return SPARSE(q, k, v, np.ones_like(M), b, **options)


def one_head_only(arguments: dict[str, Any]) -> None:
    q, k = arguments["q"], arguments["k"]
    if getattr(q, "ndim", 0) == 4 and getattr(k, "ndim", 0) == 4 and q.shape[1] > k.shape[1]:
        raise ValueError("k: got grouped heads, expected as many as in q")


def mutant(name: str, law: str, bug: str, call: Any, operation: str = "block_sparse_attend",
           **rest: Any) -> Mutant:  # fmt: skip
    return Mutant(f"seer_attention.{name}", f"seer_attention.{operation}", law, bug, call, **rest)


MUTANTS = (
    mutant("nan-empty-row", "agreement", "a row without a block is NaN",
           with_dense(softmax_lse=nan_when_empty)),
    mutant("full-diagonal", "prefix", "the block on the diagonal is not causal",
           replacing(SPARSE, dense=SimpleNamespace(attend=not_causal_inside))),
    mutant("causal-in-the-last", "prefix", "only the last selected block of a row is causal",
           causal_in_the_last),
    mutant("next-block", "agreement", "the block behind a selected one is read as well",
           replacing(SPARSE, _token_mask=next_block_too)),
    mutant("group-mask", "heads", "a group shares the mask of its first head",
           replacing(SPARSE, _token_mask=one_mask_a_group)),
    mutant("skip-tail", "ragged", "a short last block is skipped",
           replacing(SPARSE, _token_mask=whole_blocks_only)),
    mutant("leak", "poison", "values that nobody sees are multiplied by 0",
           with_dense(combine=leaks_masked_values)),
    mutant("first-mask", "agreement", "every entry of the batch uses the first one's mask",
           altering(SPARSE, first_entry_mask)),
    mutant("crop", "refusal", "a mask of another shape is cut to fit",
           altering(SPARSE, mask_that_fits)),
    mutant("clipped", "linearity", "values are clipped", altering(SPARSE, clipped)),
    mutant("whole-lse", "split", "lse is rounded down", spoiling(SPARSE, whole_lse)),
    mutant("cached-list", "stateless", "the list of blocks of the last call is used",
           CachedList()),
    mutant("racing", "repeatable", "the last bits depend on who finishes first", Racing()),
    mutant("contiguous", "layout", "strides are made up from the shape",
           altering(SPARSE, read_as_contiguous)),
    mutant("wrap-32", "far", "offsets are computed in 32 bits", altering(SPARSE, wrap_32_bits)),
    mutant("tf32", "precision", "float32 operands are rounded to TF32",
           altering(SPARSE, eleven_bits)),
    mutant("one-head-only", "cells", "grouped heads are refused", altering(SPARSE, one_head_only)),
    mutant("dense-gradient", "gradient", "the backward pass runs over all blocks", SPARSE,
           backward=replacing(BACKWARD, _token_mask=gradient_everywhere)),
    mutant("first-of-group", "gradient", "dk and dv are those of the first head of the group",
           SPARSE, backward=with_gradient(sum_groups=first_of_group)),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", SPARSE,
           backward=altering(BACKWARD, no_lse_gradient)),
    mutant("not-rotated", "agreement", "queries and keys are not rotated for the attention",
           replacing(ATTEND, rope=not_rotated), "attend"),
    mutant("from-one", "heads", "queries stand one token further on than keys",
           replacing(ATTEND, rope=from_one), "attend"),
    mutant("rotated-gate", "agreement", "the gate reads rotated queries and keys",
           replacing(ATTEND, select_blocks=gate_after_rotation), "attend"),
    mutant("diagonal-always", "agreement", "the diagonal is forced unasked",
           replacing(ATTEND, select_blocks=diagonal_always), "attend"),
    mutant("unused-mask", "agreement", "the mask is returned and not used",
           replacing(ATTEND, block_sparse_attend=dense_after_all), "attend"),
)  # fmt: skip
