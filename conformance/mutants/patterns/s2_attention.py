"""Wrong kernels of S2-Attention: phases of the wrong head, blurred borders, unsound merges."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.reference.dense.attention import attend, attend_backward, combine, score
from attnspec.reference.patterns import s2_attention_blocks, s2_attention_decoding
from attnspec.reference.patterns.s2_attention_blocks import pattern_of_heads
from attnspec.reference.primitives.softmax import softmax_lse

ATTEND = right("s2_attention.s2_attend")
BLOCKS = right("s2_attention.block_sparse_attend")
BACKWARD = s2_attention_blocks.block_sparse_attend_backward
DECODE = right("s2_attention.decode_step")
MERGE = right("s2_attention.merge_partitions")
PATTERN = right("s2_attention.block_pattern")
TOKENS = right("s2_attention.token_mask")
KEEP = s2_attention_decoding._keep
TILE = 8


def phases_of_query_heads(M: int, N: int, H: int, Hk: int, *rest: Any) -> np.ndarray:
    """Each query head has a phase of its own, also inside a group."""
    local, v, dense = rest[:3]
    return PATTERN(M, N, H, H, local, v, dense * (H // Hk), *rest[3:])


def causal_in_last_tile(pattern: Any, b: Any, Tq: Any, Tk: Any, causal: bool = True,
                        q_start: int = 0, kv_start: int = 0) -> np.ndarray:  # fmt: skip
    """The causal order is applied in the last half block that a row visits, and nowhere else."""
    mask = TOKENS(pattern, b, Tq, Tk, causal, q_start, kv_start)
    if not causal or b < 2:
        return mask
    free = TOKENS(pattern, b, Tq, Tk, False, q_start, kv_start)
    u = kv_start + np.arange(Tk)
    t = (q_start + np.arange(Tq))[:, None]
    last = (t // b * b + b // 2) <= u
    return np.where(last, mask, free)


def aligned_at_corner(arguments: dict[str, Any]) -> None:
    """A chunk of queries is taken for the first one."""
    arguments["q_start"] = arguments["kv_start"] = 0


def large_negative(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """A row that sees nothing has the lse of a score of -1e6, and the mean of all values."""
    out, lse = attend(q, k, v, mask=mask, scale=scale)
    empty = np.isneginf(lse)
    if not k.shape[-2]:
        return out, lse
    mean, _ = attend(q, k, v, scale=scale)
    return np.where(empty[..., None], mean, out), np.where(empty, lse.dtype.type(-1e6), lse)


def additive_mask(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """What a row hides is 1e4 less likely, which is not enough if all it sees is less likely still.

    Rows that see nothing are skipped, and what is not finite is not read.
    """
    scores = score(q, k, scale=scale)
    lowered = np.where(np.isfinite(scores), scores, 0) - 1e4
    seen = np.where(mask, scores, lowered).astype(scores.dtype)
    weights, lse = softmax_lse(seen, np.any(mask, axis=-1, keepdims=True))
    return combine(weights, v), lse


def leaks(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    out, lse = attend(q, k, v, mask=mask, scale=scale)
    return out + 0 * np.sum(v, axis=(-3, -2))[..., None, None, :], lse


def skip_tail(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """Keys behind the last whole tile are skipped."""
    whole = k.shape[-2] // TILE * TILE
    return attend(q, k, v, mask=mask & (np.arange(k.shape[-2]) < whole), scale=scale)


def first_padding(arguments: dict[str, Any]) -> None:
    mask = arguments["key_mask"]
    if mask is not None:
        arguments["key_mask"] = np.repeat(mask[:1], len(mask), axis=0)


def one_bound(pattern: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """All heads share the loop bound of the first: what longer lists hold is cut off."""
    own = pattern_of_heads(pattern, heads, kv_heads)
    kept = own[:1].sum(axis=2, keepdims=True)
    return own & (np.cumsum(own, axis=2) <= kept)


def first_of_group(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
    """dk and dv of a group are those of its first head."""
    dq, dk, dv = attend_backward(q, k, v, *rest, **options)
    group = q.shape[-3] // k.shape[-3]
    dout, dlse = rest[0].copy(), rest[1]
    for h in range(q.shape[-3]):
        if h % group:
            dout[..., h, :, :] = 0
            dlse = (
                dlse
                if dlse is None
                else np.where((np.arange(q.shape[-3]) == h)[:, None], 0, dlse).astype(dlse.dtype)
            )
    _, dk, dv = attend_backward(q, k, v, dout, dlse, **options)
    return dq, dk, dv


def merged_columns(q: Any, k: Any, v: Any, pattern: Any, *rest: Any, **options: Any) -> Any:
    """dk and dv go by the columns of merged rows: two rows read what one of them does."""
    dq, _, _ = BACKWARD(q, k, v, pattern, *rest, **options)
    merged = pattern.copy()
    for I in range(0, pattern.shape[1], 2):
        merged[:, I : I + 2] = pattern[:, I : I + 2].any(axis=1, keepdims=True)
    return dq, *BACKWARD(q, k, v, merged, *rest, **options)[1:]


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def base_two(outs: np.ndarray, lses: np.ndarray) -> Any:
    """Natural logarithms are taken for binary ones."""
    factor = lses.dtype.type(np.log(2))
    out, lse = MERGE(outs, lses * factor)
    return out, lse / factor


def plain_mean(outs: np.ndarray, lses: np.ndarray) -> Any:
    _, lse = MERGE(outs, lses)
    return MERGE(outs, np.where(np.isneginf(lses), lses, 1).astype(lses.dtype))[0], lse


def reads_empty_parts(outs: np.ndarray, lses: np.ndarray) -> Any:
    out, lse = MERGE(outs, lses)
    return out + 0 * np.sum(outs, axis=0), lse


def never_frees(q: Any, k: Any, v: Any, state: Any, *rest: Any, **options: Any) -> Any:
    """Blocks that leave the window stay in the cache."""
    out, lse, _ = DECODE(q, k, v, state, *rest, **options)
    kept = replacing(DECODE, _keep=lambda rows, _: rows)
    return out, lse, kept(q, k, v, state, *rest, **options)[2]


def frees_early(rows: Any, kept: np.ndarray) -> Any:
    """The oldest row of a head goes with every token, once there are more than a few."""
    kept = kept.copy()
    for row in kept:
        if row.sum() > TILE:
            row[np.flatnonzero(row)[0]] = False
    return KEEP(rows, kept)


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"s2_attention.{name}", f"s2_attention.{operation}", law, bug, call, **rest)


def free(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return of("block_sparse_attend", name, law, bug, call, **rest)


MUTANTS = (
    of("s2_attend", "query-head-phases", "agreement", "phases come from query heads",
       replacing(ATTEND, block_pattern=phases_of_query_heads)),
    of("s2_attend", "corner", "agreement", "a chunk of queries is taken for the first",
       altering(ATTEND, aligned_at_corner)),
    of("s2_attend", "skip-tail", "ragged", "keys after the last whole tile are skipped",
       replacing(ATTEND, block_sparse_attend=replacing(BLOCKS, attend=skip_tail))),
    of("s2_attend", "future", "prefix", "the causal order is left out inside blocks",
       replacing(ATTEND, block_sparse_attend=replacing(BLOCKS, token_mask=causal_in_last_tile))),
    of("token_mask", "last-tile", "agreement", "only the last half block is masked causally",
       causal_in_last_tile),
    free("large-negative", "agreement", "rows that see nothing have a finite score",
         replacing(BLOCKS, attend=large_negative)),
    free("additive-mask", "magnitude", "a mask is a large number, added",
         replacing(BLOCKS, attend=additive_mask)),
    free("leak", "poison", "hidden values are multiplied by 0", replacing(BLOCKS, attend=leaks)),
    of("s2_attend", "first-padding", "batch", "every entry of the batch uses the first's padding",
       altering(ATTEND, first_padding)),
    free("one-bound", "agreement", "heads share one loop bound",
         replacing(BLOCKS, pattern_of_heads=one_bound)),
    free("first-of-group", "gradient", "dk and dv are those of the first head of a group", BLOCKS,
         backward=replacing(BACKWARD, attend_backward=first_of_group)),
    free("merged-columns", "gradient", "dk and dv go by the columns of merged rows", BLOCKS,
         backward=merged_columns),
    free("no-dlse", "gradient", "the gradient through lse is dropped", BLOCKS,
         backward=altering(BACKWARD, no_lse_gradient)),
    of("merge_partitions", "base-two", "agreement", "lse is taken for a binary logarithm",
       base_two),
    of("merge_partitions", "plain-mean", "agreement", "parts have equal weights", plain_mean),
    of("merge_partitions", "empty-parts", "poison", "parts without keys are read",
       reads_empty_parts),
    of("decode_step", "never-frees", "agreement", "blocks outside the window stay", never_frees),
    of("decode_step", "frees-early", "stream", "rows go that a later query reads",
       replacing(DECODE, _keep=frees_early)),
)  # fmt: skip
