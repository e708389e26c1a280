"""Wrong kernels of S2-Attention: phases of the wrong head, short windows, blurred borders."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.dense.attention import attend, attend_backward
from attnspec.reference.patterns import (
    s2_attention_blocks,
    s2_attention_decoding,
    s2_attention_patterns,
)

ATTEND = right("s2_attention.s2_attend")
BLOCKS = right("s2_attention.block_sparse_attend")
BACKWARD = s2_attention_blocks.block_sparse_attend_backward
CSR = right("s2_attention.to_csr")
DECODE = right("s2_attention.decode_step")
EFFICIENT = right("s2_attention.is_kv_efficient")
LIVE = right("s2_attention.live_blocks")
MERGE = right("s2_attention.merge_partitions")
MERGE_Q = right("s2_attention.merge_q")
PATTERN = right("s2_attention.block_pattern")
TOKENS = right("s2_attention.token_mask")
KEEP = s2_attention_decoding._keep
TILE = 8


def phases_of_query_heads(M: int, N: int, H: int, Hk: int, *rest: Any) -> np.ndarray:
    """Each query head has a phase of its own, also inside a group."""
    local, v, dense = rest[:3]
    return PATTERN(M, N, H, H, local, v, dense * (H // Hk), *rest[3:])


def phases_of_rank(arguments: dict[str, Any]) -> None:
    """A rank counts its own heads from 0."""
    if arguments["active_head_range"] is not None:
        first, last = arguments["active_head_range"]
        arguments["active_head_range"] = (0, last - first)


def short_window(arguments: dict[str, Any]) -> None:
    """The window does not count the diagonal."""
    if isinstance(arguments["local"], int):
        arguments["local"] += 1


def long_right(M: int, N: int, H: int, Hk: int, local: Any, *rest: Any, **options: Any) -> Any:
    """The noncausal window counts the current block on the left only."""
    if isinstance(local, int) and local >= 0:
        both = PATTERN(M, N, H, Hk, (local, local + 1), *rest, **{**options, "causal": False})
        causal = rest[5] if len(rest) > 5 else options.get("causal", True)
        return both if not causal else PATTERN(M, N, H, Hk, local, *rest, **options)
    return PATTERN(M, N, H, Hk, local, *rest, **options)


def step_of_kv_heads(arguments: dict[str, Any]) -> None:
    """The default step counts kv heads."""
    if arguments["step"] is None and isinstance(arguments["v"], int):
        arguments["step"] = max(1, arguments["v"] // max(1, arguments["Hk"]))


def dense_heads_first(pattern: np.ndarray) -> np.ndarray:
    return pattern[::-1]


def relative_blocks(arguments: dict[str, Any]) -> None:
    """Strides are counted from the first key of the chunk."""
    arguments["kv_block"] = 0


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
    own = s2_attention_patterns.pattern_of_heads(pattern, heads, kv_heads)
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


def padding_is_block_zero(result: Any) -> Any:
    """What fills a list up is block 0."""
    return (result[0], np.maximum(result[1], 0), *result[2:])


def micro_of_tile(pattern: Any, b: int, bm: int, bn: int, causal: bool = True) -> Any:
    """All queries of a tile use all blocks of it."""
    crow, col, micro = MERGE_Q(pattern, b, bm, bn, causal)
    return crow, col, np.where(micro > 0, bm, 0)


def on_the_diagonal(arguments: dict[str, Any]) -> None:
    """A block counts as behind the diagonal one row too late."""
    arguments["bn"] = arguments["bn"] + 1


def live_in_window(arguments: dict[str, Any]) -> None:
    arguments["local"] = arguments["local"] + 1


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
    of("block_pattern", "rank-phases", "agreement", "a rank counts its heads from 0",
       altering(PATTERN, phases_of_rank)),
    of("block_pattern", "short-window", "agreement", "the window does not count the diagonal",
       altering(PATTERN, short_window)),
    of("block_pattern", "long-right", "agreement", "the right of the window is a block too long",
       long_right),
    of("block_pattern", "kv-step", "agreement", "the default step counts kv heads",
       altering(PATTERN, step_of_kv_heads)),
    of("block_pattern", "dense-first", "agreement", "the first heads are dense, not the last",
       spoiling(PATTERN, dense_heads_first)),
    of("block_pattern", "relative-blocks", "agreement", "strides count from the chunk's first key",
       altering(PATTERN, relative_blocks)),
    of("token_mask", "last-tile", "agreement", "only the last half block is masked causally",
       causal_in_last_tile),
    free("large-negative", "agreement", "rows that see nothing have a finite score",
         replacing(BLOCKS, attend=large_negative)),
    free("leak", "poison", "hidden values are multiplied by 0", replacing(BLOCKS, attend=leaks)),
    of("s2_attend", "first-padding", "batch", "every entry of the batch uses the first's padding",
       altering(ATTEND, first_padding)),
    free("one-bound", "agreement", "heads share one loop bound",
         replacing(BLOCKS, pattern_of_heads=one_bound)),
    free("first-of-group", "gradient", "dk and dv are those of the first head of a group", BLOCKS,
         backward=replacing(BACKWARD, attend_backward=first_of_group)),
    free("no-dlse", "gradient", "the gradient through lse is dropped", BLOCKS,
         backward=altering(BACKWARD, no_lse_gradient)),
    of("merge_partitions", "base-two", "agreement", "lse is taken for a binary logarithm",
       base_two),
    of("merge_partitions", "plain-mean", "agreement", "parts have equal weights", plain_mean),
    of("merge_partitions", "empty-parts", "poison", "parts without keys are read",
       reads_empty_parts),
    of("to_csr", "padding", "agreement", "what fills a list up is block 0",
       spoiling(CSR, padding_is_block_zero)),
    of("merge_q", "micro", "agreement", "all queries of a tile use its blocks", micro_of_tile),
    of("merge_q", "merge-padding", "agreement", "what fills a list up is block 0",
       spoiling(MERGE_Q, padding_is_block_zero)),
    of("is_kv_efficient", "late-diagonal", "agreement", "the diagonal is a row too low",
       altering(EFFICIENT, on_the_diagonal)),
    of("live_blocks", "long-window", "agreement", "the window is a block too long",
       altering(LIVE, live_in_window)),
    of("decode_step", "never-frees", "agreement", "blocks outside the window stay", never_frees),
    of("decode_step", "frees-early", "stream", "rows go that a later query reads",
       replacing(DECODE, _keep=frees_early)),
)  # fmt: skip
