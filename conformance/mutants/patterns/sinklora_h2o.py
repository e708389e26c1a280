"""Wrong kernels of H2O's cache: rows that stay by mistake, scores that belong to other rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.conventions import causal_mask
from attnspec.reference.patterns.sinklora_h2o import State
from attnspec.reference.primitives.softmax import softmax, softmax_lse
from attnspec.reference.primitives.top_k import top_k, top_k_mask

ADD = right("sinklora.h2o_accumulate")
KEEP = right("sinklora.h2o_keep")
STEP = right("sinklora.h2o_step")
MASK_STEP = right("sinklora.h2o_mask_step")
LOCAL = right("sinklora.h2o_local_mask")
GLOBAL = right("sinklora.h2o_global_mask")
BUDGETS = right("sinklora.h2o_budgets")


def forgets(a: Any, P: Any, w: int, kv_heads: Any = None) -> Any:
    """What rows had received before is lost."""
    total = ADD(a, P, w, kv_heads)
    return total if a is None else ADD(None, P, w, len(a))


def group_mean(a: Any, P: Any, w: int, kv_heads: Any = None) -> Any:
    """The query heads of a group are averaged."""
    total = ADD(a, P, w, kv_heads)
    new = ADD(None, P, w, len(total))
    return total - new + new * len(total) / P.shape[-3]


def interleaved(a: Any, P: Any, w: int, kv_heads: Any = None) -> Any:
    """Query head h belongs to kv head h mod kv_heads."""
    total = ADD(a, P, w, kv_heads)
    heads = np.arange(P.shape[-3]).reshape(-1, len(total)).T.ravel()
    return ADD(a, P[:, heads], w, kv_heads)


def last_query_only(a: Any, P: Any, w: int, kv_heads: Any = None) -> Any:
    """Only the call's last query counts."""
    ADD(a, P, w, kv_heads)
    rows = np.arange(w)[:, None] == w - 1
    return ADD(a, np.where(rows, P, np.zeros_like(P)), w, kv_heads)


def half_precision(a: Any, P: Any, w: int, kv_heads: Any = None) -> Any:
    """Sums in float16."""
    return ADD(a, P, w, kv_heads).astype(np.float16).astype(P.dtype)


def all_columns(a: np.ndarray, n: int, hh: int = 4, rec: int = 512) -> np.ndarray:
    """Recent rows compete for the heavy places as well, and may stay twice."""
    idx = KEEP(a, n, hh, rec)
    if n <= hh + rec:
        return idx
    return np.sort(np.concatenate([top_k(a, hh), idx[..., hh:]], axis=-1), axis=-1)


def without_the_newest(a: np.ndarray, n: int, hh: int = 4, rec: int = 512) -> np.ndarray:
    """The recent rows end before the newest one."""
    idx = KEEP(a, n, hh, rec)
    if n <= hh + rec or rec == 0:
        return idx
    heavy = top_k(a[..., : n - rec - 1], hh)
    recent = np.broadcast_to(np.arange(n - rec - 1, n - 1), (*a.shape[:-1], rec))
    return np.concatenate([heavy, recent], axis=-1)


def later_ties(a: np.ndarray, n: int, hh: int = 4, rec: int = 512) -> np.ndarray:
    """Of equal scores the later one stays."""
    idx = KEEP(a, n, hh, rec)
    if n <= hh + rec:
        return idx
    old = n - rec
    heavy = old - 1 - top_k(a[..., :old][..., ::-1], hh)
    return np.concatenate([np.sort(heavy, axis=-1), idx[..., hh:]], axis=-1)


def best_first(a: np.ndarray, n: int, hh: int = 4, rec: int = 512) -> np.ndarray:
    """Heavy rows in the order of their scores."""
    idx = KEEP(a, n, hh, rec)
    if n <= hh + rec:
        return idx
    heavy = np.argsort(-a[..., : n - rec], axis=-1, kind="stable")[..., :hh]
    return np.concatenate([heavy, idx[..., hh:]], axis=-1)


def one_head_for_all(a: np.ndarray, n: int, hh: int = 4, rec: int = 512) -> np.ndarray:
    idx = KEEP(a, n, hh, rec)
    return np.broadcast_to(idx[:1], idx.shape).copy()


def reads_recent(a: np.ndarray, n: int, hh: int = 4, rec: int = 512) -> np.ndarray:
    """The scores of recent rows are multiplied by 0 instead of skipped."""
    return KEEP(a + 0 * np.sum(a, axis=-1, keepdims=True), n, hh, rec)


def evicts_first(arguments: dict[str, Any]) -> None:
    """A row goes before attention, so that a token sees one less."""
    state, rows = arguments["state"], arguments["hh"] + arguments["rec"]
    if state.pos.shape[-1] < rows or not rows:
        return
    stay = np.arange(state.pos.shape[-1]) != 0
    k, v = (x[..., stay, :] for x in (state.k, state.v))
    arguments["state"] = State(k, v, state.a[:, stay], state.pos[:, stay], state.seen)


def scores_stay(q: Any, k: Any, v: Any, state: State, hh: int = 4, rec: int = 512,
                *rest: Any, **options: Any) -> Any:  # fmt: skip
    """Scores are cut instead of gathered with their rows."""
    out, after = STEP(q, k, v, state, hh, rec, *rest, **options)
    whole = STEP(q, k, v, state, 0, state.pos.shape[1] + q.shape[-2], *rest, **options)[1]
    return out, after._replace(a=whole.a[:, : after.a.shape[1]])


def unnormalised(scores: np.ndarray, mask: Any = None) -> Any:
    """exp(score - maximum): the weights are not divided by their sum."""
    weights, lse = softmax_lse(scores, mask)
    return weights / np.max(weights, axis=-1, keepdims=True), lse


def sums_unnormalised(a: Any, P: Any, w: int, kv_heads: Any = None) -> Any:
    return ADD(a, P / np.max(P, axis=-1, keepdims=True), w, kv_heads)


def renumbered(result: Any) -> Any:
    """Positions count rows of the cache."""
    out, state = result
    rows = state.seen - state.pos.shape[1] + np.arange(state.pos.shape[1])
    return out, state._replace(pos=np.broadcast_to(rows, state.pos.shape).copy())


def text_positions(n: int, w: int) -> Any:
    """Rows are rotated as if a hundred tokens had gone between the last two of them."""
    rows = np.arange(n + w)
    return rows[n:] + 100, np.where(rows < n, rows, rows + 100)


def by_value(q: Any, k: Any, v: Any, state: State, *rest: Any, **options: Any) -> Any:
    """What a row has received is weighted by the size of its value."""
    out, after = STEP(q, k, v, state, *rest, **options)
    return out, after._replace(a=after.a * np.sum(np.abs(after.v[0]), axis=-1))


def kept_again(a: Any, P: Any, kept: Any, hh: int = 4, rec: int = 512) -> Any:
    """Dropped rows compete again."""
    MASK_STEP(a, P, kept, hh, rec)
    return MASK_STEP(a, P, np.ones_like(kept), hh, rec)


def dropped_scores(a: Any, P: Any, kept: Any, hh: int = 4, rec: int = 512) -> Any:
    """Dropped rows keep their scores."""
    _, staying = MASK_STEP(a, P, kept, hh, rec)
    return ADD(a, P, P.shape[-2]), staying


def local_choice(change: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """S13 with `change` in the place of the update of scores (a, P_t, kept, scores_t)."""

    def mask(scores: np.ndarray, hh: int) -> np.ndarray:
        result = LOCAL(scores, hh)
        T = scores.shape[-1]
        if not hh:
            return result
        P, u = softmax(scores, causal_mask(T, T)), np.arange(T)
        kept = np.broadcast_to(u < hh, (*P.shape[:-2], T))
        a = np.sum(P[..., :hh, :], axis=-2)
        for t in range(hh, T):
            kept = top_k_mask(np.where(kept, a, -np.inf), hh - 1) | (u == t)
            a = change(a, P[..., t, :], kept, np.where(u <= t, scores[..., t, :], 0))
            result[..., t, :] = kept
        return result

    return mask


def pruned_rows(a: Any, P: Any, kept: Any, scores: Any) -> Any:
    """The softmax is over what is kept."""
    return np.where(kept, a + softmax(scores, kept), 0)


def latest_row(a: Any, P: Any, kept: Any, scores: Any) -> Any:
    return np.where(kept, P, 0)


def whole_rows(scores: np.ndarray, hh: int) -> np.ndarray:
    """The first queries are cut causally."""
    T = scores.shape[-1]
    return LOCAL(scores, hh) & causal_mask(T, T)


def reads_later(scores: np.ndarray, hh: int) -> np.ndarray:
    LOCAL(scores, hh)
    return LOCAL(scores + 0 * np.sum(scores, axis=-1, keepdims=True), hh)


def online(P: np.ndarray, hh: int, rec: int) -> np.ndarray:
    """A query's choice is made from the queries up to it alone."""
    mask, T = GLOBAL(P, hh, rec), P.shape[-1]
    for t in range(T):
        early = np.where(np.arange(T)[:, None] <= t, P, np.zeros_like(P))
        mask[..., t, :] = GLOBAL(early, hh, rec)[..., t, :]
    return mask


def window_of(P: np.ndarray, hh: int, rec: int) -> np.ndarray:
    """The band has `rec` tokens, the query's own included."""
    right_mask = GLOBAL(P, hh, rec)
    return GLOBAL(P, hh, max(0, rec - 1)) if rec else right_mask


def not_causal(P: np.ndarray, hh: int, rec: int) -> np.ndarray:
    mask = GLOBAL(P, hh, rec)
    return mask | np.swapaxes(mask, -1, -2)


def rounded(T: Any, heavy_ratio: Any = 0.1, recent_ratio: Any = 0.1) -> Any:
    BUDGETS(T, heavy_ratio, recent_ratio)
    return round(T * heavy_ratio), round(T * recent_ratio)


def of(operation: str, name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"sinklora.{name}", f"sinklora.{operation}", law, bug, call)


MUTANTS = (
    of("h2o_accumulate", "forgets", "agreement", "scores start anew at each call", forgets),
    of("h2o_accumulate", "group-mean", "agreement", "grouped heads are averaged", group_mean),
    of("h2o_accumulate", "interleaved", "heads", "groups are interleaved", interleaved),
    of("h2o_accumulate", "last-query", "agreement", "a call's last query alone counts",
       last_query_only),
    of("h2o_keep", "all-columns", "agreement", "recent rows compete for heavy places",
       all_columns),
    of("h2o_keep", "not-the-newest", "agreement", "the newest row goes", without_the_newest),
    of("h2o_keep", "later-ties", "ties", "of equal scores the later stays", later_ties),
    of("h2o_keep", "best-first", "agreement", "rows come in the order of scores", best_first),
    of("h2o_keep", "reads-recent", "poison", "scores of recent rows are read", reads_recent),
    of("h2o_step", "evicts-first", "agreement", "rows go before attention",
       altering(STEP, evicts_first)),
    of("h2o_step", "scores-stay", "agreement", "scores are not gathered with their rows",
       scores_stay),
    of("h2o_step", "scores-reset", "agreement", "scores start anew at each call",
       replacing(STEP, h2o_accumulate=forgets)),
    of("h2o_step", "scores-in-halves", "agreement", "scores are summed in float16",
       replacing(STEP, h2o_accumulate=half_precision)),
    of("h2o_step", "unnormalised", "agreement", "scores add exp(score - maximum)",
       replacing(STEP, h2o_accumulate=sums_unnormalised)),
    of("h2o_step", "no-sum", "agreement", "weights are not divided by their sum",
       replacing(STEP, softmax_lse=unnormalised)),
    of("h2o_step", "one-choice", "heads", "all heads keep what the first keeps",
       replacing(STEP, h2o_keep=one_head_for_all)),
    of("h2o_step", "renumbered", "agreement", "positions count rows of the cache",
       spoiling(STEP, renumbered)),
    of("h2o_step", "text-positions", "stream", "cached rows are rotated far from new ones",
       replacing(STEP, cache_positions=text_positions)),
    of("h2o_step", "by-value", "choice", "scores are weighted by the size of values",
       by_value),
    of("h2o_mask_step", "kept-again", "agreement", "dropped rows return", kept_again),
    of("h2o_mask_step", "dropped-scores", "agreement", "dropped rows keep their scores",
       dropped_scores),
    of("h2o_local_mask", "pruned-rows", "agreement", "scores come from pruned rows",
       local_choice(pruned_rows)),
    of("h2o_local_mask", "latest-row", "agreement", "the last row alone counts",
       local_choice(latest_row)),
    of("h2o_local_mask", "causal-square", "agreement", "the first rows are cut", whole_rows),
    of("h2o_local_mask", "reads-later", "poison", "scores above the diagonal are read",
       reads_later),
    of("h2o_global_mask", "online", "agreement", "later queries do not count", online),
    of("h2o_global_mask", "window", "agreement", "the band counts the query's own token",
       window_of),
    of("h2o_global_mask", "not-causal", "agreement", "heavy rows see what is later", not_causal),
    of("h2o_budgets", "rounded", "agreement", "budgets are rounded to the nearest", rounded),
)  # fmt: skip
