r"""SnapKV: the end of the prompt says what the answer will need of it.

The last tokens of a prompt, the observation window, attend to much the same positions as the tokens
that will be generated. SnapKV runs the prompt with ordinary dense attention, adds up what the
window's queries give to each earlier position, smooths that along the keys so that the neighbours
of an important token survive with it, and keeps the best positions of every head plus the window.
The rest of the cache is dropped for good, once; decoding is dense over what is left.

Definition
----------
T tokens, window w, capacity C (the window included), pooling width p, group G = heads / kv_heads;
P = T - w is the prefix. q and k come after the rotation to their absolute positions.

S1. **Prompt.** The prompt's output is exact dense causal attention; only what is stored changes.

S2. **Short prompts.** If T < C everything is stored unchanged, with kv_heads heads. 1 <= w < C.

S3. **Look.** :math:`L_{ij} = q_i \cdot k_j / \sqrt d` for the last w queries and all T keys.
Query i of the window stands at P + i and sees j <= P + i; a padding key is seen by nobody.

S4. **Weigh.** A is the softmax of L over *all* T keys: the window's own keys are in the normaliser.

S5. **Score.** :math:`s_j = \sum_i A_{ij}` for j in [0, P); the window's own columns are dropped.

S6. **Smooth.** Pooling of width p, odd, stride 1, within the prefix: ``avg`` is
:math:`\frac{1}{p} \sum_{|t - j| \le p // 2} s_t`, where what lies outside counts as 0 and the
divisor stays p; ``max`` is the largest of the :math:`s_t` that exist.

S7. **Reduce.** After pooling (a mean of maxima is not a maximum of means), one score for each kv
head: ``group_mean`` or ``group_max`` over its query heads. ``per_query_head`` keeps them all, and
keys and values are repeated to the query heads.

S8. **Select.** The n = C - w best positions of each head, ties to the lower index, sorted ascending
(K6). Under ``max`` ties are the rule: a peak lends its very score to p neighbours, so that the n-th
place usually falls inside a plateau. A padding key comes after all others; it is selected only
where there are fewer than n real keys, and stays hidden.

S9. **State.** Keys and values at the selected positions, then the window's: C slots. ``pos`` holds
the absolute position of each slot, ``seen`` = T is the next one.

S10. **Decode.** The new token stands at position ``seen``, which is not the number of slots. It is
appended and attends to every slot; nothing is evicted any more, so there are C + m slots after m
steps.

S11. **Once.** A second prompt, or a prompt in pieces, is not defined: the state must be empty when
a prompt comes, and a step brings one token.

The functions of S3 to S8, from the window's weights to the selection, are in `snapkv_selection`.
`window_scores`, S3 to S5 at once, is ours: it names what a kernel computes that has the rows'
denominators from the prompt's attention and does not write A.

Complexity
----------
:math:`O(w T d)` time a head beside the prompt's own attention, which stays what it was, and
:math:`O(C + m)` a decoded token and head, in place of :math:`O(T + m)`.

Paper and code
--------------
The defaults w = 32, C = 2048, p = 5 and ``avg`` are those of the authors' model patch (their bare
class has 64, 320, 5, ``avg``); their LongBench runs use w = 32, C = 1024, 2048 or 4096, p = 7 and
``max``. Their code repeats keys and values to all query heads before it selects, which makes the
stored cache G times larger a token: ``per_query_head`` reproduces that, ``group_mean`` (as in
NVIDIA's kvpress) is our default. It keeps the selected slots in score order, which changes no
output since keys carry their rotation, and leaves ties to the library. It ignores the padding mask,
so that padding (S3, S8) is ours. It computes the weights in float32 and adds them in the model's
dtype; we stay in one dtype (K10). A prompt that meets a filled cache is appended uncompressed
there; S11 refuses it. kvpress takes a ratio r instead of C, C = int(T (1 - r)), and the mean over
the window, which ranks as the sum does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.cache.snapkv_selection import (
    REDUCTIONS,
    check_pool,
    check_window,
    key_mask,
    pool_scores,
    prefix_scores,
    reduce_groups,
    select,
    window_attention,
    window_scores,
)
from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_choice,
    check_continues,
    check_integer,
    check_size,
    group_size,
    repeat_heads,
)
from attnspec.reference.dense.attention import attend
from attnspec.reference.spec import Coverage, Mechanism, Operation, Paper


def compress(
    k: np.ndarray, v: np.ndarray, idx: np.ndarray, w: int = 32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S9: the slots kept: k_c (..., slot_heads, n + w, d), v_c likewise, pos int (..., n + w).

    k (..., kv_heads, T, d), v (..., kv_heads, T, dv), `idx` int (..., slot_heads, n) below T - w.
    slot_heads is kv_heads, or a multiple of it, and keys and values are repeated to it.

    >>> x = np.arange(5.0)[None, :, None]
    >>> k_c, v_c, pos = compress(x, x, np.array([[1]]), w=2)
    >>> k_c.ravel(), pos
    (array([1., 3., 4.]), array([[1, 3, 4]]))
    """
    _check_keys_values(k, v)
    T = k.shape[-2]
    check_window(w, T, T)
    check_array("idx", idx, ("slot_heads", "n"), dtype="int")
    if idx.shape[:-2] != k.shape[:-3]:
        raise ValueError(f"idx: got leading axes {idx.shape[:-2]}, expected {k.shape[:-3]}, as k")
    if idx.shape[-2] % k.shape[-3]:
        raise ValueError(
            f"idx: got {idx.shape[-2]} heads, expected a multiple of the {k.shape[-3]} kv heads"
        )
    if np.any(idx < 0) or np.any(idx >= T - w):
        raise ValueError(f"idx: got positions outside [0, {T - w}), expected the prefix only")
    window = np.broadcast_to(np.arange(T - w, T), (*idx.shape[:-1], w))
    pos = np.concatenate([idx, window], axis=-1)
    keys, values = repeat_heads(k, idx.shape[-2]), repeat_heads(v, idx.shape[-2])
    slots = pos[..., None]
    return np.take_along_axis(keys, slots, -2), np.take_along_axis(values, slots, -2), pos


class State(NamedTuple):
    """S9: the slots of each head, and the position of the next token.

    k (..., slot_heads, slots, d), v (..., slot_heads, slots, dv), pos int (..., slot_heads, slots)
    the absolute position of a slot, -1 where it holds padding; seen counts padding too.
    """

    k: np.ndarray
    v: np.ndarray
    pos: np.ndarray
    seen: int


def init_state(k: np.ndarray, v: np.ndarray) -> State:
    """S11: an empty state for tokens shaped as `k` and `v`.

    >>> init_state(np.ones((1, 5, 4)), np.ones((1, 5, 2))).pos.shape
    (1, 0)
    """
    _check_keys_values(k, v)
    return State(k[..., :0, :], v[..., :0, :], np.zeros((*k.shape[:-2], 0), int), 0)


def prefill(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    w: int = 32,
    C: int = 2048,
    p: int = 5,
    pool: str = "avg",
    gqa: str = "group_mean",
    mask: np.ndarray | None = None,
    state: State | None = None,
) -> tuple[np.ndarray, State]:
    """S1-S9, S11: the prompt's output (..., heads, q_tokens, dv) and the compressed state.

    q (..., heads, q_tokens, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv), rotated to their
    absolute positions; `mask` bool (..., T), True = real key, for prompts padded on the left.
    ValueError unless `state` is empty or left out.

    >>> x = np.ones((1, 9, 2))
    >>> out, state = prefill(x, x, x, w=2, C=4)
    >>> state.pos, state.seen
    (array([[2, 3, 7, 8]]), 9)
    """
    check_attention_inputs(q, k, v)
    check_integer("C", C, least=2)
    check_integer("w", w, least=1)
    if w >= C:
        raise ValueError(f"w: got {w}, expected less than C = {C}, which includes the window")
    check_pool(p, "pool", pool)
    check_choice("gqa", gqa, REDUCTIONS)
    if state is not None and state.seen:
        raise ValueError(f"state: got one with {state.seen} tokens, expected an empty one")
    keys, T = key_mask(mask, k), k.shape[-2]
    out, _ = attend(q, k, v, causal=True, mask=keys)
    real = np.ones((*k.shape[:-3], 1, T), bool) if mask is None else mask[..., None, :]
    if T < C:
        pos = np.broadcast_to(np.arange(T), k.shape[:-1])
        return out, State(k, v, np.where(real, pos, -1), T)
    A = window_attention(q, k, w, mask)
    m = reduce_groups(pool_scores(prefix_scores(A, w), p, pool), k.shape[-3], gqa)
    idx = select(m, C - w, real[..., : T - w])
    k_c, v_c, pos = compress(k, v, idx, w)
    kept_real = np.take_along_axis(np.broadcast_to(real, (*pos.shape[:-1], T)), pos, -1)
    return out, State(k_c, v_c, np.where(kept_real, pos, -1), T)


def step(state: State, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, State]:
    """S10: the output (..., heads, 1, dv) of one new token, and the state that includes it.

    q (..., heads, 1, d), k (..., kv_heads, 1, d), v (..., kv_heads, 1, dv), q and k rotated to
    position ``state.seen``.

    >>> x = np.ones((1, 1, 2))
    >>> out, state = step(init_state(x, x), x, x, x)
    >>> state.pos, state.seen
    (array([[0]]), 1)
    """
    check_attention_inputs(q, k, v)
    for name, x in (("q", q), ("k", k)):
        check_size(name, x.shape[-2], 1, "one token a step")
    slot_heads, heads = state.k.shape[-3], q.shape[-3]
    if slot_heads not in (k.shape[-3], heads):
        raise ValueError(
            f"k: got {k.shape[-3]} kv heads, expected {slot_heads}, the heads of the state's slots"
        )
    k, v = repeat_heads(k, slot_heads), repeat_heads(v, slot_heads)
    check_continues(state, k, v)
    here = np.full((*state.pos.shape[:-1], 1), state.seen)
    after = State(
        np.concatenate([state.k, k], axis=-2),
        np.concatenate([state.v, v], axis=-2),
        np.concatenate([state.pos, here], axis=-1),
        state.seen + 1,
    )
    real = np.repeat(after.pos >= 0, group_size(heads, slot_heads), axis=-2)
    out, _ = attend(q, after.k, after.v, mask=real[..., None, :])
    return out, after


def _check_keys_values(k: Any, v: Any) -> None:
    check_array("k", k, ("kv_heads", "tokens", "d"))
    check_array("v", v, ("kv_heads", "tokens", "dv"))
    if v.dtype != k.dtype:
        raise TypeError(f"v: got dtype {v.dtype}, expected {k.dtype}, as k")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: got shape {v.shape}, expected {(*k.shape[:-1], 'dv')}, as k")


MECHANISM = Mechanism(
    title="SnapKV",
    idea="Keep of the prompt what its last tokens attend to, once, and decode over that.",
    paper=Paper(
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        authors=(
            "Yuhong Li",
            "Yingbing Huang",
            "Bowen Yang",
            "Bharat Venkitesh",
            "Acyr Locatelli",
            "Hanchen Ye",
            "Tianle Cai",
            "Patrick Lewis",
            "Deming Chen",
        ),
        year=2024,
        arxiv="2404.14469",
        venue="NeurIPS 2024",
        code="FasterDecoding/SnapKV",
    ),
    operations=(
        Operation(window_attention, clauses=("S3", "S4")),
        Operation(prefix_scores, clauses=("S5",)),
        Operation(window_scores, clauses=("S3", "S4", "S5")),
        Operation(pool_scores, clauses=("S6",)),
        Operation(reduce_groups, clauses=("S7",)),
        Operation(select, clauses=("S8",)),
        Operation(compress, clauses=("S9",)),
        Operation(prefill, clauses=("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S11")),
        Operation(step, clauses=("S10", "S11")),
    ),
    headline="prefill",
    coverage=Coverage(
        patterns=("causal self", "causal cross"),
        phases=("prefill", "step by step"),
        paddings=("none", "left"),
    ),
    stepwise_equals_prefill=False,
)
