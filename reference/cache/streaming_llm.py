r"""StreamingLLM: a stream without end from a cache of constant size.

A trained decoder parks much of its attention on the first few tokens, because its weights must sum
to one and those tokens are visible to every query; a window that evicts them removes the largest
terms of the softmax denominator, and the model breaks. StreamingLLM keeps the first S tokens for
ever (the attention sinks) beside the R most recent ones, and numbers positions by the row in the
cache, so that no query meets a distance above S + R. It does not lengthen the memory of the model:
an evicted token is gone.

Definition
----------
n is the number of rows in the cache, w the number of tokens of a call. Rows keep their order, and
are the same for every head and batch row.

S1. **Keep.** Of T rows keep all if T <= S + R, else rows [0, S) and [T - R, T). S = 0 is plain
window attention; R = 0 leaves the sinks only, so that a new token is used once and dropped.

S2. **Make room.** Before m tokens come: keep all T rows if T + m <= S + R, else rows
[0, min(S, T)) and [T - R + m, T). For m >= R only the sinks stay.

S3. **Drop a range.** Rows [a, b) go, 0 <= a <= b <= T.

S4. **Store.** The cache holds keys before any rotation, and plain values.

S5. **Append.** A call attends to n + w rows: the cache, then its own keys and values.

S6. **Positions.** Query i stands at n + i and row j at j. Both are cache-relative (K13): they count
rows, not tokens of the text.

S7. **Rotate.** Queries and *all* rows are rotated to these positions (half-split pairs, angle
:math:`p\, b^{-2i/d}` for pair i and the model's base b). A model that turns only its first r
channels has r in place of d here, and leaves the others as they are. A model with ALiBi does not
rotate; it adds :math:`\sigma_h (p_k - p_q) \le 0` to the scores of head h.

S8. **Attend.** Softmax attention, scale :math:`1/\sqrt d` (K2), grouped heads (K7); query i sees
rows j <= n + i (K3).

S9. **Evict afterwards.** The un-rotated rows are stored, then S1 applies. A decoded token thus sees
up to S + R + 1 rows: in the terms of K8 the window is R + 1, R tokens before it and itself.

S10. **Static view.** Token by token, token t sees token j <= t iff j < S or t - j <= R. It sees it
at distance :math:`\min(t, S+R) - row_t(j)`, where :math:`row_t(j) = j` for a sink and
:math:`j - \max(0, t - S - R)` for the rest: true inside the window, while the distance of sink j
stops growing at S + R - j.

S11. **Calls.** A prompt of w tokens in one call is dense and causal, whatever S + R; only then is
it cut. Results therefore depend on how a stream is divided into calls.

The functions that choose and number rows (S1 to S3, S6, S7, S10, S11) are in `streaming_llm_rows`.
S12 to S15, the softmax variants that give a model a sink when it is trained, are in
`streaming_llm_sinks`; S16, the gradient of a stream, is in `streaming_llm_gradient`.

Complexity
----------
:math:`O(w (S + R + w)(d + dv))` time a call and head, S + R rows of memory, whatever the stream's
length.

Paper and code
--------------
The paper draws S + R tokens in the cache of a query; the code appends, attends and then evicts, so
that a query sees one more. We follow the code. Defaults: S = 4 and R = 512 are those of the code's
cache class; its chat demo uses 4 and 2000 and makes room for the prompt plus 1000 tokens before a
turn, its perplexity script 1 and 255. S + R should not exceed the context the model was trained
with. The paper says nothing about prompts longer than the cache; S11 is what the code does. The
code rotates all channels of Llama and only the first ones of GPT-NeoX (Pythia), as these models do.
The authors' code has no support for padding, and all sequences of a batch share n. Deeper layers
hold keys and values that were computed while evicted tokens were still visible, which the method
accepts: it is not equal to running the model again on the tokens kept. That is what the paper
compares with, a window computed anew for every token; it is not in the code and not defined here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from attnspec.reference.cache.streaming_llm_gradient import streaming_attend_backward
from attnspec.reference.cache.streaming_llm_rows import (
    alibi_bias,
    cache_positions,
    call_sizes,
    check_call,
    evict_rows,
    evict_rows_for_space,
    evict_rows_range,
    rope,
    sink_window_distances,
    sink_window_mask,
)
from attnspec.reference.cache.streaming_llm_sinks import (
    attend_with_sink_logit,
    attend_with_sink_logit_backward,
    softmax1,
    softmax1_backward,
)
from attnspec.reference.conventions import causal_mask, check_array, check_continues
from attnspec.reference.dense.attention import combine, score
from attnspec.reference.primitives.softmax import softmax_lse
from attnspec.reference.spec import PHASES, Coverage, Mechanism, Operation, Paper


class State(NamedTuple):
    """S4: the rows kept, and how many tokens have come.

    k (..., kv_heads, rows, d) before rotation, v (..., kv_heads, rows, dv), pos int (rows) the
    number of each row's token in the stream, seen the number of tokens so far.
    """

    k: np.ndarray
    v: np.ndarray
    pos: np.ndarray
    seen: int


def init_state(k: np.ndarray, v: np.ndarray) -> State:
    """S4: an empty state for tokens shaped as `k` and `v`.

    >>> init_state(np.ones((1, 5, 4)), np.ones((1, 5, 2))).k.shape
    (1, 0, 4)
    """
    check_array("k", k, ("kv_heads", "tokens", "d"))
    check_array("v", v, ("kv_heads", "tokens", "dv"))
    return State(k[..., :0, :], v[..., :0, :], np.arange(0), 0)


def keep_rows(state: State, rows: np.ndarray) -> State:
    """S1-S3: the state with only `rows`, as `evict_rows` and its siblings return them.

    >>> x = np.ones((1, 3, 2))
    >>> keep_rows(State(x, x, np.array([0, 7, 8]), 9), np.array([0, 2])).pos
    array([0, 8])
    """
    check_array("rows", rows, ("kept",), dtype="int")
    if np.any(rows < 0) or np.any(rows >= len(state.pos)):
        raise ValueError(f"rows: got {rows.tolist()}, expected rows in 0..{len(state.pos) - 1}")
    return State(state.k[..., rows, :], state.v[..., rows, :], state.pos[rows], state.seen)


def step(
    state: State,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    S: int = 4,
    R: int = 512,
    *,
    rope_base: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    rotary_dims: int | None = None,
) -> tuple[np.ndarray, State]:
    """S5-S9: one call with w new tokens: output (..., heads, w, dv) and the next state.

    q (..., heads, w, d), k (..., kv_heads, w, d), v (..., kv_heads, w, dv), none of them rotated;
    `rope_base` for a model with rotary positions, of which `rotary_dims` channels turn (all d if
    None), `alibi_slopes` (heads) for one with ALiBi, neither for no positions at all.

    >>> x = np.ones((1, 3, 2))
    >>> out, state = step(init_state(x, x), x, x, x, S=1, R=1)
    >>> state.pos, state.seen
    (array([0, 2]), 3)
    """
    check_call(q, k, v, S, R, rope_base, alibi_slopes, rotary_dims)
    check_continues(state, k, v)
    w = q.shape[-2]
    rows = State(
        np.concatenate([state.k, k], axis=-2),
        np.concatenate([state.v, v], axis=-2),
        np.concatenate([state.pos, np.arange(state.seen, state.seen + w)]),
        state.seen + w,
    )
    p_q, p_k = cache_positions(len(state.pos), w)
    if rope_base is None:
        scores = score(q, rows.k)
    else:
        turned = rope(rows.k, p_k, rope_base, rotary_dims)
        scores = score(rope(q, p_q, rope_base, rotary_dims), turned)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes.astype(q.dtype), p_q, p_k)
    weights, _ = softmax_lse(scores, causal_mask(w, len(p_k)))
    return combine(weights, rows.v), keep_rows(rows, evict_rows(len(p_k), S, R))


def streaming_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    S: int = 4,
    R: int = 512,
    chunk: int | Sequence[int] = 1,
    rope_base: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    rotary_dims: int | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """S1-S11: a stream of T tokens in calls of `chunk`: output and what each call left behind.

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv), none of them rotated;
    `chunk` tokens a call, or the list of call sizes: ``[w, 1, 1, ...]`` is a dense prompt of w
    tokens, then decoding. Positions as in `step`. Returns out (..., heads, T, dv) and the trace, a
    list that holds for each call the numbers of the tokens kept after it, int (kept).

    >>> x = np.ones((1, 4, 2))
    >>> out, trace = streaming_attend(x, x, x, S=1, R=2)
    >>> trace
    [array([0]), array([0, 1]), array([0, 1, 2]), array([0, 2, 3])]
    """
    check_call(q, k, v, S, R, rope_base, alibi_slopes, rotary_dims)
    state, out = init_state(k, v), np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    trace = []
    for size in call_sizes(q.shape[-2], chunk):
        new = slice(state.seen, state.seen + size)
        out[..., new, :], state = step(
            state,
            q[..., new, :],
            k[..., new, :],
            v[..., new, :],
            S,
            R,
            rope_base=rope_base,
            alibi_slopes=alibi_slopes,
            rotary_dims=rotary_dims,
        )
        trace.append(state.pos)
    return out, trace


MECHANISM = Mechanism(
    title="StreamingLLM",
    idea="Keep the first few tokens as attention sinks and a window of recent ones, and number "
    "positions by the row in the cache.",
    paper=Paper(
        title="Efficient Streaming Language Models with Attention Sinks",
        authors=("Guangxuan Xiao", "Yuandong Tian", "Beidi Chen", "Song Han", "Mike Lewis"),
        year=2024,
        arxiv="2309.17453",
        venue="ICLR 2024",
        code="mit-han-lab/streaming-llm",
    ),
    operations=(
        Operation(evict_rows, clauses=("S1",)),
        Operation(evict_rows_for_space, clauses=("S2",)),
        Operation(evict_rows_range, clauses=("S3",)),
        Operation(cache_positions, clauses=("S6",)),
        Operation(rope, clauses=("S7",)),
        Operation(alibi_bias, clauses=("S7",)),
        Operation(sink_window_mask, clauses=("S10",)),
        Operation(sink_window_distances, clauses=("S10",)),
        Operation(step, clauses=("S5", "S6", "S7", "S8", "S9")),
        Operation(
            streaming_attend,
            clauses=(*(f"S{n}" for n in range(1, 12)), "S16"),
            gradient=streaming_attend_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(softmax1, clauses=("S12",), gradient=softmax1_backward, differentiable=("x",)),
        Operation(
            attend_with_sink_logit,
            clauses=("S13", "S14"),
            gradient=attend_with_sink_logit_backward,
            differentiable=("q", "k", "v", "s_h"),
        ),
    ),
    headline="streaming_attend",
    coverage=Coverage(patterns=("causal self",), phases=PHASES, gradient=True),
    stepwise_equals_prefill=False,
)
