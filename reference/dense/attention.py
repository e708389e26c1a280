r"""Dense softmax attention: chapter zero, the mechanism every other chapter departs from.

Every query compares itself with every key by a dot product, turns the scores into weights that
sum to one, and returns the average of the values under these weights. It is exact, permutation
invariant in the keys, and costs time quadratic in the context. The log of the normaliser (lse)
is returned beside the output, because with it attentions over disjoint keys can be merged.

Definition
----------
S1. **Score.** :math:`s_{ij} = \tau\, q_i \cdot k_j` with the scale :math:`\tau` (K2); query head
h reads kv head h // group (K7).

S2. **Mask.** A pair is visible if the causal rule (K3), the mask and the padding all allow it.

S3. **Weigh.** :math:`\ell_i = \log \sum_j e^{s_{ij}}` and :math:`p_{ij} = e^{s_{ij} - \ell_i}`
over the visible keys j; nothing visible means weights 0 and :math:`\ell_i = -\infty` (K4).

S4. **Combine.** :math:`o_i = \sum_j p_{ij} v_j`.

S5. **Gradient.** With upstream :math:`do` (and :math:`d\ell`, the gradient of lse, if it is used):
:math:`dv_j = \sum_i p_{ij} do_i`, :math:`ds_{ij} = p_{ij} (do_i \cdot v_j - do_i \cdot o_i +
d\ell_i)`, :math:`dq_i = \tau \sum_j ds_{ij} k_j`, :math:`dk_j = \tau \sum_i ds_{ij} q_i`; the
gradients of a kv head are summed over its group.
The weights are recomputed from the scores and :math:`\ell`, as a kernel that kept only these does.

S6. **Packing.** Sequences of different lengths laid end to end, with offsets: a query sees the keys
of its own sequence only, and the causal rule applies inside it.

S7. **Decode.** The state is the keys and values seen so far; a step appends its own and attends to
all of them, causally among the tokens of the step.

Complexity
----------
Time :math:`O(q\_tokens \cdot k\_tokens \cdot (d + dv))` a head; memory :math:`O(k\_tokens)` a row
when computed row by row, which is what the fast path does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    causal_mask,
    check_array,
    check_attention_inputs,
    check_offsets,
    check_size,
    default_scale,
    repeat_heads,
)
from attnspec.reference.dense.attention_gradient import score_gradient, sum_groups
from attnspec.reference.primitives.softmax import softmax_lse, weights_given_lse
from attnspec.reference.spec import (
    HEADS,
    PADDINGS,
    PATTERNS,
    PHASES,
    Coverage,
    Mechanism,
    Operation,
    Paper,
)


def score(q: np.ndarray, k: np.ndarray, *, scale: float | None = None) -> np.ndarray:
    """S1: scores (..., heads, q_tokens, k_tokens) of q (..., heads, q_tokens, d) against
    k (..., kv_heads, k_tokens, d).

    >>> score(np.ones((1, 1, 4)), np.ones((1, 2, 4)))
    array([[[2., 2.]]])
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_array("k", k, ("kv_heads", "k_tokens", "d"))
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    scale = default_scale(q.shape[-1]) if scale is None else scale
    return scale * (q @ np.swapaxes(repeat_heads(k, q.shape[-3]), -1, -2))


def visible(
    q_tokens: int, k_tokens: int, *, causal: bool = False, mask: np.ndarray | None = None
) -> np.ndarray:
    """S2: bool, broadcastable to (..., heads, q_tokens, k_tokens), True where a query may look.

    `mask` is bool and broadcastable to the scores; a padding mask (batch, k_tokens) is given as
    ``padding[:, None, None, :]``.

    >>> visible(2, 2, causal=True, mask=np.array([True, False])).astype(int)
    array([[1, 0],
           [1, 0]])
    """
    allowed = causal_mask(q_tokens, k_tokens) if causal else np.ones((q_tokens, k_tokens), bool)
    if mask is None:
        return allowed
    check_array("mask", mask, ("k_tokens",), dtype="bool")
    for got, expected in zip(mask.shape[::-1], (k_tokens, q_tokens), strict=False):
        if got not in (1, expected):
            raise ValueError(
                f"mask: got shape {mask.shape}, expected (..., {q_tokens}, {k_tokens}) or ones"
            )
    return allowed & mask


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S4: output (..., heads, q_tokens, dv) and lse (..., heads, q_tokens).

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), v (..., kv_heads, k_tokens, dv);
    `mask` as in `visible`. TypeError or ValueError if they do not fit one another (K14).

    >>> out, lse = attend(np.zeros((1, 2, 4)), np.zeros((1, 2, 4)), np.eye(2)[None], causal=True)
    >>> out
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    check_attention_inputs(q, k, v)
    allowed = visible(q.shape[-2], k.shape[-2], causal=causal, mask=mask)
    weights, lse = softmax_lse(score(q, k, scale=scale), allowed)
    return combine(weights, v), lse


def combine(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S4: weighted sum (..., heads, q_tokens, dv) of v (..., kv_heads, k_tokens, dv).

    A value whose weight is exactly 0 is not read, even if it is NaN (K11). A row that reads a value
    that is not finite is NaN there.

    >>> weights = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    >>> combine(weights, np.array([[[4.0], [np.nan]]]))
    array([[[ 4.],
            [nan]]])
    """
    values = repeat_heads(v, weights.shape[-3])
    finite = np.isfinite(values)
    if np.all(finite):
        return weights @ values
    out = weights @ np.where(finite, values, np.zeros_like(values))
    return np.where((weights != 0) @ ~finite, np.nan, out).astype(out.dtype)


def attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    causal: bool = False,
    mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S5: gradients dq, dk, dv, shaped as q, k, v.

    `dout` (..., heads, q_tokens, dv) and `dlse` (..., heads, q_tokens) are the gradients of the two
    outputs of `attend`; no `dlse` means lse is not used.

    >>> one = np.ones((1, 1, 2))
    >>> [gradient.ravel() for gradient in attend_backward(one, one, one, one)]
    [array([0., 0.]), array([0., 0.]), array([1., 1.])]
    """
    check_attention_inputs(q, k, v)
    check_array("dout", dout, ("heads", "q_tokens", "dv"))
    heads, scale = q.shape[-3], default_scale(q.shape[-1]) if scale is None else scale
    allowed = visible(q.shape[-2], k.shape[-2], causal=causal, mask=mask)
    scores = score(q, k, scale=scale)
    weights = weights_given_lse(scores, softmax_lse(scores, allowed)[1], allowed)
    unread = np.all(weights == 0, axis=-2)[..., None]
    keys = np.where(unread, 0, repeat_heads(k, heads)).astype(k.dtype)
    values = np.where(unread, 0, repeat_heads(v, heads)).astype(v.dtype)

    dscores, _ = score_gradient(weights, values, dout, dlse)
    dq = scale * (dscores @ keys)
    dk = scale * (np.swapaxes(dscores, -1, -2) @ q)
    dv = np.swapaxes(weights, -1, -2) @ dout
    return dq, sum_groups(dk, k.shape[-3]), sum_groups(dv, v.shape[-3])


def attend_packed(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_offsets: np.ndarray,
    k_offsets: np.ndarray,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S6: attention inside each of the sequences laid end to end.

    q (heads, q_total, d), k (kv_heads, k_total, d), v (kv_heads, k_total, dv); offsets int
    (sequences + 1), increasing from 0 to the total. Returns out (heads, q_total, dv) and lse
    (heads, q_total). ValueError if the offsets are not such.

    >>> x = np.eye(2)[None]
    >>> attend_packed(x, x, x, np.array([0, 1, 2]), np.array([0, 1, 2]))[0]
    array([[[1., 0.],
            [0., 1.]]])
    """
    check_attention_inputs(q, k, v)
    check_offsets("q_offsets", q_offsets, q.shape[-2])
    check_offsets("k_offsets", k_offsets, k.shape[-2])
    check_size("k_offsets", len(k_offsets), len(q_offsets), "as many as q_offsets")
    outs, lses = [], []
    for n in range(len(q_offsets) - 1):
        rows = slice(q_offsets[n], q_offsets[n + 1])
        keys = slice(k_offsets[n], k_offsets[n + 1])
        out, lse = attend(
            q[..., rows, :], k[..., keys, :], v[..., keys, :], causal=causal, scale=scale
        )
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs, axis=-2), np.concatenate(lses, axis=-1)


class State(NamedTuple):
    """S7: the keys (..., kv_heads, seen, d) and values (..., kv_heads, seen, dv) so far."""

    k: np.ndarray
    v: np.ndarray


def init_state(k: np.ndarray, v: np.ndarray) -> State:
    """S7: an empty state for tokens shaped as `k` and `v`.

    >>> init_state(np.ones((1, 5, 4)), np.ones((1, 5, 2))).k.shape
    (1, 0, 4)
    """
    return State(k[..., :0, :], v[..., :0, :])


def step(
    state: State, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float | None = None
) -> tuple[np.ndarray, State]:
    """S7: outputs (..., heads, tokens, dv) of new tokens, and the state that includes them.

    ValueError if the tokens do not fit one another or the state (K14).

    >>> x = np.ones((1, 1, 2))
    >>> out, state = step(init_state(x, x), x, x, x)
    >>> state.k.shape
    (1, 1, 2)
    """
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    for name, old, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"{name}: got shape {old.shape}, expected that of {new.shape}")
    keys = np.concatenate([state.k, k], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    out, _ = attend(q, keys, values, causal=True, scale=scale)
    return out, State(keys, values)


MECHANISM = Mechanism(
    title="Dense softmax attention",
    idea="Every query averages all values, weighted by the softmax of its dot products.",
    paper=Paper(
        title="Attention Is All You Need",
        authors=(
            "Ashish Vaswani",
            "Noam Shazeer",
            "Niki Parmar",
            "Jakob Uszkoreit",
            "Llion Jones",
            "Aidan N. Gomez",
            "Lukasz Kaiser",
            "Illia Polosukhin",
        ),
        year=2017,
        arxiv="1706.03762",
        venue="NeurIPS 2017",
        code="tensorflow/tensor2tensor",
    ),
    operations=(
        Operation(
            attend,
            clauses=("S1", "S2", "S3", "S4"),
            gradient=attend_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(attend_packed, clauses=("S6",)),
        Operation(step, clauses=("S7",)),
    ),
    headline="attend",
    coverage=Coverage(
        patterns=PATTERNS, phases=PHASES, paddings=PADDINGS, heads=HEADS, gradient=True
    ),
)
