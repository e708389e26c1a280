"""Wrong kernels of StreamingLLM: caches that keep, number or rotate the wrong rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import (
    eleven_bits,
    read_as_contiguous,
    top_left,
    wrap_32_bits,
)
from attnspec.reference.cache import streaming_llm, streaming_llm_rows
from attnspec.reference.cache.streaming_llm import State
from attnspec.reference.cache.streaming_llm_gradient import streaming_attend_backward
from attnspec.reference.conventions import repeat_heads

EVICT = right("streaming_llm.evict_rows")
SPACE = right("streaming_llm.evict_rows_for_space")
STEP = right("streaming_llm.step")
STREAM = right("streaming_llm.streaming_attend")
BACKWARD = streaming_attend_backward


def no_sinks(T: int, S: int = 4, R: int = 512) -> np.ndarray:
    return EVICT(T, 0, S + R)


def last_in_ring(T: int, S: int = 4, R: int = 512) -> np.ndarray:
    """Rows in the order of their slots: the newest has overwritten the oldest of the window."""
    rows = EVICT(T, S, R)
    if len(rows) == T or R == 0:
        return rows
    window = np.arange(T - R, T)
    return np.concatenate([rows[:S], np.roll(window, (T - S) % R)])


def evict_first(
    state: State, q: np.ndarray, k: np.ndarray, v: np.ndarray, S: int = 4, R: int = 512, **rest: Any
) -> Any:
    w, n = q.shape[-2], len(state.pos)
    if w == 1 and n + w > S + R > 0:
        state = streaming_llm.keep_rows(state, SPACE(n, w, S, R))
    return STEP(state, q, k, v, S, R, **rest)


def text_positions(state: State, *args: Any, **rest: Any) -> Any:
    """Rotates to the tokens' places in the text: sinks move away for ever."""

    def places(n: int, w: int) -> tuple[np.ndarray, np.ndarray]:
        new = state.seen + np.arange(w)
        return new, np.concatenate([state.pos, new])

    return replacing(STEP, cache_positions=places)(state, *args, **rest)


def query_in_the_text(state: State, *args: Any, **rest: Any) -> Any:
    """Rows stand at their numbers, but the query at its place in the text."""

    def places(n: int, w: int) -> tuple[np.ndarray, np.ndarray]:
        return state.seen + np.arange(w), np.arange(n + w)

    return replacing(STEP, cache_positions=places)(state, *args, **rest)


def new_rows_rotated(state: State, *args: Any, **rest: Any) -> Any:
    """Cached keys are left as they are; only those of the call are rotated."""
    old = len(state.pos)

    def rope(x: np.ndarray, pos: np.ndarray, *more: Any) -> np.ndarray:
        turned = streaming_llm_rows.rope(x, pos, *more)
        if len(pos) and pos[0] == 0:
            turned[..., :old, :] = x[..., :old, :]
        return turned

    return replacing(STEP, rope=rope)(state, *args, **rest)


def rotated_twice(state: State, *args: Any, **rest: Any) -> Any:
    out, after = STEP(state, *args, **rest)
    base = rest.get("rope_base")
    if base is not None:
        rows = np.arange(len(after.pos))
        after = after._replace(k=streaming_llm_rows.rope(after.k, rows, base))
    return out, after


def rows_as_tokens(result: Any) -> Any:
    out, state = result
    return out, state._replace(seen=len(state.pos))


def interleaved(q: np.ndarray, k: np.ndarray, v: np.ndarray, *args: Any, **rest: Any) -> Any:
    """Query head h reads kv head h % kv_heads."""
    if not all(isinstance(x, np.ndarray) and x.ndim > 2 for x in (q, k)):
        return STREAM(q, k, v, *args, **rest)
    heads, kv_heads = q.shape[-3], k.shape[-3]
    order = np.argsort(np.arange(heads) % kv_heads, kind="stable")
    out, trace = STREAM(q[..., order, :, :], k, v, *args, **rest)
    return out[..., np.argsort(order), :, :], trace


def token_by_token(arguments: dict[str, Any]) -> None:
    if not isinstance(arguments["chunk"], int):
        arguments["chunk"] = 1


def reads_evicted(q: Any, k: Any, v: Any, *args: Any, **rest: Any) -> Any:
    """Rescales by a maximum over all values so far, evicted ones too: right up to rounding."""
    out, trace = STREAM(q, k, v, *args, **rest)
    top = repeat_heads(np.maximum.accumulate(np.abs(v), axis=-2), q.shape[-3])
    return (out - top) + top, trace


def maximum_of_all(q: Any, k: Any, v: Any, *args: Any, **rest: Any) -> Any:
    """Rescales by a maximum over later tokens too: right up to rounding."""
    out, trace = STREAM(q, k, v, *args, **rest)
    top = np.max(np.abs(k), initial=0.0)
    return (out - top) + top, trace


def saturated(arguments: dict[str, Any]) -> None:
    arguments["v"] = np.clip(arguments["v"], -3, 3)


def no_multi_query(q: Any, k: Any, v: Any, *args: Any, **rest: Any) -> Any:
    result = STREAM(q, k, v, *args, **rest)
    if q.shape[-3] > k.shape[-3] == 1:
        raise ValueError("k: got 1 kv head, expected at least 2")
    return result


def crop_to_fit(q: Any, k: Any, v: Any, *args: Any, **rest: Any) -> Any:
    if not all(isinstance(x, np.ndarray) and x.ndim > 2 for x in (q, k, v)):
        return STREAM(q, k, v, *args, **rest)
    tokens = min(x.shape[-2] for x in (q, k, v))
    return STREAM(*(x[..., :tokens, :] for x in (q, k, v)), *args, **rest)


def first_entry(arguments: dict[str, Any]) -> None:
    k = arguments["k"]
    if isinstance(k, np.ndarray) and k.ndim == 4 and np.shape(arguments["q"])[:1] == k.shape[:1]:
        arguments["k"] = np.repeat(k[:1], k.shape[0], axis=0)


def last_call_lost(result: Any) -> Any:
    out, trace = result
    written = out.shape[-2] // 8 * 8 or out.shape[-2]
    unwritten = np.empty_like(out)
    unwritten[..., :written, :] = out[..., :written, :]
    return unwritten, trace


def not_turned_back(x: np.ndarray, pos: np.ndarray, *more: Any) -> np.ndarray:
    return x if np.any(pos < 0) else streaming_llm_rows.rope(x, pos, *more)


def sinks_without_gradient(*, S: int = 4, **given: Any) -> Any:
    """The pass over the sinks has no backward."""
    dq, dk, dv = BACKWARD(S=S, **given)
    dk[..., :S, :] = 0
    return dq, dk, dv


class KeepsTheFirstKeys:
    """Reads the keys of the first call of each shape again, as a buffer that is never refilled."""

    def __init__(self) -> None:
        self.keys: dict[Any, np.ndarray] = {}

    def __call__(self, q: Any, k: Any, v: Any, *args: Any, **rest: Any) -> Any:
        result = STREAM(q, k, v, *args, **rest)
        old = self.keys.get(k.shape, k)
        self.keys[k.shape] = k.copy()
        return result if np.array_equal(old, k) else STREAM(q, old, v, *args, **rest)


def mutant(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"streaming_llm.{name}", f"streaming_llm.{operation}", law, bug, call, **rest)


MUTANTS = (
    mutant("step", "evict-first", "stream", "a decoded token sees S + R rows, not one more",
           evict_first),
    mutant("step", "text-positions", "stream", "positions count tokens of the text",
           text_positions),
    mutant("step", "query-in-text", "stream", "the query stands at its place in the text",
           query_in_the_text),
    mutant("step", "new-rows-rotated", "agreement", "cached keys are not rotated",
           new_rows_rotated),
    mutant("step", "rotated-cache", "stream", "keys are cached rotated and rotated again",
           rotated_twice),
    mutant("step", "top-left", "agreement", "a call of several tokens is masked as if n were 0",
           replacing(STEP, causal_mask=lambda w, rows: top_left(w, rows))),
    mutant("step", "sinks-fall-out", "stream", "a plain window of S + R rows is kept",
           replacing(STEP, evict_rows=no_sinks)),
    mutant("step", "ring-order", "stream", "rows are numbered by their slot in a ring",
           replacing(STEP, evict_rows=last_in_ring)),
    mutant("step", "seen-rows", "agreement", "tokens are counted by the rows that are left",
           spoiling(STEP, rows_as_tokens)),
    mutant("streaming_attend", "interleaved-heads", "heads",
           "query head h reads kv head h % kv_heads", interleaved),
    mutant("streaming_attend", "streamed-prompt", "agreement",
           "a long prompt is cut while it is read", altering(STREAM, token_by_token)),
    mutant("streaming_attend", "reads-evicted", "evicted", "rounding depends on evicted values",
           reads_evicted),
    mutant("streaming_attend", "maximum-of-all", "prefix", "rounding depends on later tokens",
           maximum_of_all),
    mutant("streaming_attend", "saturated", "linearity", "large values are clipped",
           altering(STREAM, saturated)),
    mutant("streaming_attend", "no-mqa", "cells", "one kv head for all is refused",
           no_multi_query),
    mutant("streaming_attend", "crop", "refusal", "q, k and v are cropped to the shortest",
           crop_to_fit),
    mutant("streaming_attend", "first-entry", "batch", "every sequence reads the first one's keys",
           altering(STREAM, first_entry)),
    mutant("streaming_attend", "ragged-end", "ragged", "the last rows are never written",
           spoiling(STREAM, last_call_lost)),
    mutant("streaming_attend", "old-keys", "stateless", "keys of the call before are read",
           KeepsTheFirstKeys()),
    mutant("streaming_attend", "contiguous", "layout", "strides are made up from the shape",
           altering(STREAM, read_as_contiguous)),
    mutant("streaming_attend", "tf32", "precision", "float32 operands are rounded to TF32",
           altering(STREAM, eleven_bits)),
    mutant("streaming_attend", "wrap-32", "far", "offsets are computed in 32 bits",
           altering(STREAM, wrap_32_bits)),
    mutant("streaming_attend", "not-turned-back", "gradient",
           "gradients of rotated queries and keys are not turned back", STREAM,
           backward=replacing(BACKWARD, rope=not_turned_back)),
    mutant("streaming_attend", "sinks-without-gradient", "gradient",
           "keys of the sinks get no gradient", STREAM, backward=sinks_without_gradient),
)  # fmt: skip
