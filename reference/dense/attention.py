r"""Dense softmax attention: chapter zero, the mechanism every other chapter departs from.

Every query compares itself with every key by a dot product, turns the scores into weights that
sum to one, and returns the average of the values under these weights. It is exact, permutation
invariant in the keys, and costs time quadratic in the context. The log of the normaliser (lse)
is returned beside the output, because with it attentions over disjoint keys can be merged.

Definition
----------
S1. **Score.** :math:`s_{ij} = \tau\, q_i \cdot k_j` with the scale :math:`\tau` (K2); query head
h reads kv head h // group (K7).

S2. **Mask.** A pair is visible if the causal rule (K3), the mask and the padding all allow it. With
more queries than keys the causal rule leaves the first queries without any.

S3. **Weigh.** :math:`\ell_i = \log \sum_j e^{s_{ij}}` and :math:`p_{ij} = e^{s_{ij} - \ell_i}`
over the visible keys j; nothing visible means weights 0 and :math:`\ell_i = -\infty` (K4).

S4. **Combine.** :math:`o_i = \sum_j p_{ij} v_j`.

S5. **Gradient.** With upstream :math:`do` (and :math:`d\ell`, the gradient of lse, if it is used):
:math:`dv_j = \sum_i p_{ij} do_i`, :math:`ds_{ij} = p_{ij} (do_i \cdot v_j - do_i \cdot o_i +
d\ell_i)`, :math:`dq_i = \tau \sum_j ds_{ij} k_j`, :math:`dk_j = \tau \sum_i ds_{ij} q_i`; the
gradients of a kv head are summed over its group.
The weights are recomputed from the scores and :math:`\ell`, as a kernel that kept only these does.

S6. **Packing.** Sequences of different lengths laid end to end, with offsets: a query sees the keys
of its own sequence only, and the causal rule applies inside it. So does S5.

S7. **Decode.** The state is the keys and values seen so far; a step appends its own and attends to
all of them, causally among the tokens of the step.

Complexity
----------
Time :math:`O(q\_tokens \cdot k\_tokens \cdot (d + dv))` a head. Memory :math:`O(k\_tokens)` a row
as written here; a kernel that meets the keys tile by tile, with the largest score and the sums so
far, keeps :math:`O(dv)` a row.

Paper and code
--------------
The paper has one kv head for each query head, as many queries as keys under the causal rule, and no
lse. Grouped heads (K7), the alignment at the bottom right (K3), lse beside the output, a gradient
from it, packing and decoding are what kernels and models have added since. The authors' code hides
a pair by adding -1e9 to its score, so that a row which sees nothing averages what it must not see,
and very large scores shine through; K4 and K11 are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_continues,
    check_size,
)
from attnspec.reference.dense.attention_gradient import (
    attend_backward,
    attend_packed_backward,
)
from attnspec.reference.dense.attention_steps import combine, score, sequences, visible
from attnspec.reference.primitives.softmax import softmax_lse
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
    outs, lses = [], []
    for rows, keys in sequences(q, k, v, q_offsets, k_offsets):
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
    check_array("k", k, ("kv_heads", "tokens", "d"))
    check_array("v", v, ("kv_heads", "tokens", "dv"))
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
    check_continues(state, k, v)
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
        Operation(
            attend_packed,
            clauses=("S6",),
            gradient=attend_packed_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(step, clauses=("S7",)),
    ),
    headline="attend",
    coverage=Coverage(
        patterns=PATTERNS, phases=PHASES, paddings=PADDINGS, heads=HEADS, gradient=True
    ),
)
