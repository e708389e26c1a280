"""Wrong kernels of SnapKV, continued: windows, pools and selections that miss their rule."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.cache.snapkv import prefix_only
from attnspec.conformance.mutants.dense.attention import BLOCK, no_maximum
from attnspec.reference.cache.snapkv_selection import POOLS, key_mask, pool_scores
from attnspec.reference.dense.attention import score, visible
from attnspec.reference.primitives.softmax import softmax

WINDOW = right("snapkv.window_attention")
SUM = right("snapkv.prefix_scores")
SCORES = right("snapkv.window_scores")
POOL = right("snapkv.pool_scores")
REDUCE = right("snapkv.reduce_groups")
SELECT = right("snapkv.select")


def window_at_top_left(w: int, T: int, *, causal: bool, mask: Any = None) -> np.ndarray:
    seen = np.arange(T)[None, :] <= np.arange(w)[:, None]
    return seen if mask is None else seen & mask


def all_of_the_window(w: int, T: int, *, causal: bool, mask: Any = None) -> np.ndarray:
    return visible(w, T, mask=mask)


def interleaved(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    """Query head h is scored against kv head h % kv_heads."""
    WINDOW(q, k, w, mask)
    keys = k[..., np.arange(q.shape[-3]) % k.shape[-3], :, :]
    allowed = visible(w, k.shape[-2], causal=True, mask=key_mask(mask, k))
    return softmax(score(q[..., q.shape[-2] - w :, :], keys), allowed)


def first_queries(arguments: dict[str, Any]) -> None:
    if arguments["q"].ndim > 2 and isinstance(arguments["w"], int):
        q, w = arguments["q"], arguments["w"]
        arguments["q"] = q[..., :w, :] if 0 < w <= q.shape[-2] else q


def tail_of_keys_skipped(A: np.ndarray) -> np.ndarray:
    whole = A.shape[-1] // BLOCK * BLOCK
    return A if whole == 0 else np.where(np.arange(A.shape[-1]) < whole, A, 0).astype(A.dtype)


def padding_leaks(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    A = WINDOW(q, k, w, mask)
    return A + 0 * k.sum(axis=(-3, -2, -1))[..., None, None, None]


def padding_on_the_right(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape[-1] == k.shape[-2]:
        mask = np.sort(mask, axis=-1)
    return WINDOW(q, k, w, mask)


def mask_shifted(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    """With a mask the first key is taken for padding."""
    WINDOW(q, k, w, mask)
    if mask is not None:
        mask = mask & (np.arange(mask.shape[-1]) > 0)
    return WINDOW(q, k, w, mask)


def summed_in_half(A: np.ndarray, w: int = 32) -> np.ndarray:
    SUM(A, w)
    return A[..., :-w].sum(axis=-2, dtype=np.float16).astype(A.dtype)


def mean_of_queries(s: np.ndarray) -> np.ndarray:
    return s / np.float32(3)


def floored(A: np.ndarray, w: int = 32) -> np.ndarray:
    """Adds a floor, as if against a division by 0 later."""
    s = SUM(A, w)
    return (s + s.dtype.type(1e-6)).astype(A.dtype)


def window_kept(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    """The last weights of the prefix are those of the window's own first keys."""
    s, own = SCORES(q, k, w, mask), min(w, k.shape[-2] - w)
    s[..., s.shape[-1] - own :] = WINDOW(q, k, w, mask).sum(axis=-2)[..., -w:][..., :own]
    return s


def first_row_only(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    """One row of the window is counted, as often as there are rows."""
    SCORES(q, k, w, mask)
    return WINDOW(q, k, w, mask)[..., 0, : k.shape[-2] - w] * q.dtype.type(w)


def prefix_normalised(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    """The pass for the norms stops where the sums stop."""
    s = SCORES(q, k, w, mask)
    kept = WINDOW(q, k, w, mask)[..., : k.shape[-2] - w]
    total = kept.sum(axis=-1, keepdims=True)
    return (kept / np.where(total == 0, 1, total)).sum(axis=-2).astype(s.dtype)


def interleaved_scores(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    SCORES(q, k, w, mask)
    return SUM(interleaved(q, k, w, mask), w)


def leaking_scores(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    return SCORES(q, k, w, mask) + 0 * k.sum(axis=(-3, -2, -1))[..., None, None]


def valid_taps(s: np.ndarray, p: int = 5, mode: str = "avg") -> np.ndarray:
    pooled = POOL(s, p, mode)
    if mode != "avg":
        return pooled
    return pooled / pool_scores(np.ones_like(s), p, "avg")


def zero_padded_maximum(s: np.ndarray, p: int = 5, mode: str = "avg") -> np.ndarray:
    pooled = POOL(s, p, mode)
    if mode != "max":
        return pooled
    edge = np.minimum(np.arange(s.shape[-1]), np.arange(s.shape[-1])[::-1]) < p // 2
    return np.where(edge, np.maximum(pooled, 0), pooled)


def other_pool(arguments: dict[str, Any]) -> None:
    if arguments["mode"] in POOLS:
        arguments["mode"] = "avg"


def even_width(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["p"], int) and arguments["p"] > 0:
        arguments["p"] |= 1


def strided_groups(m: np.ndarray, Hk: int, mode: str = "group_mean") -> np.ndarray:
    result = REDUCE(m, Hk, mode)
    if mode == "per_query_head":
        return result
    order = np.arange(m.shape[-2]).reshape(-1, Hk).T.ravel()
    return REDUCE(m[..., order, :], Hk, mode)


def sum_of_group(m: np.ndarray, Hk: int, mode: str = "group_mean") -> np.ndarray:
    result = REDUCE(m, Hk, mode)
    return result * np.float32(m.shape[-2] // Hk) if mode == "group_mean" else result


def high_index_first(m: np.ndarray, n: int, mask: Any = None) -> np.ndarray:
    SELECT(m, n, mask)
    hidden = m if mask is None else np.where(mask, m, -np.inf)
    flipped = SELECT(np.ascontiguousarray(hidden[..., ::-1]), n)
    return np.sort(m.shape[-1] - 1 - flipped, axis=-1)


def by_score(m: np.ndarray, n: int, mask: Any = None) -> np.ndarray:
    idx = SELECT(m, n, mask)
    order = np.argsort(-np.take_along_axis(m, idx, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(idx, order, axis=-1)


def mask_after_selection(m: np.ndarray, n: int, mask: Any = None) -> np.ndarray:
    """Hidden scores are pushed down by a large number, which a NaN does not feel."""
    SELECT(m, n, mask)
    pushed = m if mask is None else m - np.where(mask, 0, m.dtype.type(1e9))
    ascending = np.argsort(pushed[..., ::-1], axis=-1, kind="stable")
    return np.sort(m.shape[-1] - 1 - ascending[..., -n:], axis=-1)


def one_fewer(idx: np.ndarray) -> np.ndarray:
    return idx[..., :-1]


def mask_reversed(m: np.ndarray, n: int, mask: Any = None) -> np.ndarray:
    """True is read as hidden."""
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = ~mask & (np.arange(m.shape[-1]) % 2 == 0)
    return SELECT(m, n, mask)


def mutant(operation: str, name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"snapkv.{name}", f"snapkv.{operation}", law, bug, call)


def window(name: str, law: str, bug: str, call: Any) -> Mutant:
    return mutant("window_attention", name, law, bug, call)


MUTANTS = (
    window("weights-of-prefix", "agreement", "the softmax runs over the prefix only", prefix_only),
    window("window-top-left", "agreement", "window query i sees the keys up to i only",
           replacing(WINDOW, visible=window_at_top_left)),
    window("window-not-causal", "agreement", "the window's queries see one another's future",
           replacing(WINDOW, visible=all_of_the_window)),
    window("first-queries", "agreement", "the window is at the start of the prompt",
           altering(WINDOW, first_queries)),
    window("interleaved-window", "heads", "query head h looks at kv head h % kv_heads",
           interleaved),
    window("skipped-keys", "ragged", "keys after the last whole block get no weight",
           spoiling(WINDOW, tail_of_keys_skipped)),
    window("window-no-maximum", "magnitude", "exp without its maximum overflows",
           replacing(WINDOW, softmax_lse=no_maximum)),
    window("padding-leaks", "poison", "padding keys are multiplied by 0", padding_leaks),
    window("right-padded-window", "cells", "padding on the right is moved to the left",
           padding_on_the_right),
    window("mask-shifted", "neutral", "with a mask the first key is always hidden", mask_shifted),
    mutant("window_scores", "window-kept", "agreement", "the window's own columns are kept",
           window_kept),
    mutant("window_scores", "first-row", "agreement", "one row of the window stands for all",
           first_row_only),
    mutant("window_scores", "prefix-norms", "agreement",
           "denominators are summed over the prefix only", prefix_normalised),
    mutant("window_scores", "interleaved-scores", "heads",
           "query head h is scored against kv head h % kv_heads", interleaved_scores),
    mutant("window_scores", "skipped-columns", "ragged",
           "keys after the last whole block receive nothing",
           spoiling(SCORES, tail_of_keys_skipped)),
    mutant("window_scores", "leaking-scores", "poison", "padding keys are multiplied by 0",
           leaking_scores),
    mutant("prefix_scores", "half-sums", "agreement", "votes are added in float16",
           summed_in_half),
    mutant("prefix_scores", "mean-votes", "agreement", "votes are divided by a constant",
           spoiling(SUM, mean_of_queries)),
    mutant("prefix_scores", "vote-floor", "linearity", "a floor is added to every vote", floored),
    mutant("pool_scores", "valid-taps", "agreement", "the average divides by the taps that exist",
           valid_taps),
    mutant("pool_scores", "zero-padded-maximum", "agreement",
           "the maximum sees zeros beyond the ends", zero_padded_maximum),
    mutant("pool_scores", "always-average", "agreement", "max pooling averages",
           altering(POOL, other_pool)),
    mutant("pool_scores", "even-width", "refusal", "an even width is rounded up",
           altering(POOL, even_width)),
    mutant("reduce_groups", "strided-groups", "agreement", "a group is every Hk-th head",
           strided_groups),
    mutant("reduce_groups", "sum-of-group", "agreement", "the mean is not divided", sum_of_group),
    mutant("select", "high-index", "ties", "ties go to the higher index", high_index_first),
    mutant("select", "score-ordered", "agreement", "positions come in the order of scores",
           by_score),
    mutant("select", "one-fewer", "agreement", "the last place is not filled",
           spoiling(SELECT, one_fewer)),
    mutant("select", "late-mask", "poison", "hidden scores are read and pushed down",
           mask_after_selection),
    mutant("select", "reversed-mask", "neutral", "the mask is read the wrong way round",
           mask_reversed),
)  # fmt: skip
