r"""RCMHA: relative positions as in Transformer-XL, on heads that a short convolution has mixed.

After the projections every channel of a head is mixed with its two predecessors in time, by a
filter that all heads share. The scores then add to the content a learned bias for content, a
learned vector and a learned number for the distance of query and key. A segment also sees the
tokens of a memory, the inputs of the same layer for the segments before.

Definition
----------
A segment x has T tokens, its memory M; S = M + T. Query i stands at token M + i of the S.

S1. **Project.** q = x Wq, k = [memory; x] Wk, v = [memory; x] Wv + bv; only v and the output have
biases. Head h takes columns h dk .. (h + 1) dk - 1.

S2. **Convolve.** For q, k and v each, with K taps: :math:`y_{tc} = b_c + \sum_{m=0}^{K-1} w_{cm}
p_{t-(K-1)+m,c}`, zeros before the first token: that of the memory for k and v, but that of the
segment for q ("reset"; "carry" lets the filters of q see the memory too). One filter a channel of a
head, the same for all heads.

S3. **Score.** With tables R of 2 P vectors and b of 2 P numbers a head, a vector u a head, and
r = P + (j - M) - i: :math:`s_{ij} = (q_i + u) \cdot k_j + q_i \cdot R_r + b_r`. S must not be
above P. The bias u is not added to the query that meets R.

S4. **Shift.** The products B = q R[P - S : P + T]' + b[P - S : P + T], (T, S + T), hold all of
them: :math:`q_i \cdot R_r + b_r = B_{i, T+j-i}`. One zero column on the right, the numbers in a row
without their last T, read as (T, S + T): the last S columns.

S5. **Attend.** All four terms are scaled by :math:`1/\sqrt{dk}` (K2). Visible are the memory and
j - M <= i (K3). The weights, called P as the size of the tables is, are the softmax over these;
:math:`o = P v`.

S6. **Output.** The heads side by side, times Wo, plus bo.

S7. **Layer and memory.** The layer adds S1-S6 of norm(x) and norm(memory), the same norm, to x, and
to that a feed-forward net of its own norm. The memory of the next segment is the layer's *input*,
without gradient: the last `mem_len` tokens of old and new.

S8. **Gradient.** With dS that of the unscaled scores: :math:`db_r` is the sum of dS over batch and
pairs of distance r, :math:`dR_r` that of :math:`dS_{ij} q_i`, :math:`du = \sum_{ij} dS_{ij} k_j`,
:math:`dk_j = \sum_i dS_{ij} (q_i + u)`, :math:`dq_i = \sum_j dS_{ij} (k_j + R_r)`. Rows of
distances that no visible pair has get 0.

S9. **Decode.** The state is the last K - 1 rows of q, k and v before S2, fewer tokens keeping older
ones, and all keys and values after it. Equal to a whole segment with q carried, as long as nothing
is forgotten: a memory that was cut is convolved anew from zeros in S2.

Complexity
----------
:math:`O(T S d)` time, half as much again as the scores alone, and :math:`O(S d K)` for S2; the
tables are linear in S.

Paper and code
--------------
- The released script trains Transformer-XL attention of another package; the class RCMHA beside it
  is what is written here.
- Results of the source depend on where a text is cut, since the filters of q start anew at each
  segment. "reset" is the source, "carry" is ours.
- Defaults there: 6 layers of 8 heads and 128 channels, 256 in the net, K = 3, P = 4096, all tables
  and u zero at first; 128 tokens of memory, in the released script 32 for segments of 2.
- K = 1, which the source's slices do not bear, is plain here. A memory of 0 tokens keeps nothing.
- `causal=False` is ours: S3 is defined for j - M > i, but S2 stays causal.
- Grouped heads are not defined. Dropout on P, 0.1 in the class and 0 in its configuration, is left
  out. The norms and the net of S7 are ordinary ones and not repeated here.
- The equations of the paper could not be compared in full; the code decides.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_choice, default_scale
from attnspec.reference.scores.rcmha_gradients import (
    attend_segment_backward,
    relative_attention_backward,
    visible,
)
from attnspec.reference.scores.rcmha_layer import State, check_segment, check_step, init_state
from attnspec.reference.scores.rcmha_scores import (
    check_tokens,
    content_scores,
    relative_scores,
    relative_shift,
)
from attnspec.reference.scores.rcmha_steps import (
    attend,
    depthwise_causal_conv,
    depthwise_causal_conv_backward,
    memory_mask,
    project_heads,
    update_memory,
)
from attnspec.reference.spec import PHASES, Coverage, Mechanism, Operation, Paper


def relative_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    R: np.ndarray,
    b: np.ndarray,
    u: np.ndarray,
    *,
    scale: float | None = None,
    causal: bool = True,
) -> np.ndarray:
    """S3-S5: outputs (..., heads, T, dv) of convolved q, k and v.

    q (..., heads, T, dk), k (..., heads, S, dk), v (..., heads, S, dv) with M = S - T >= 0 tokens
    of memory first; R (2 P, heads, dk) and b (2 P, heads) with P >= S, u (heads, dk). The scale is
    1 / sqrt(dk) unless given, and multiplies all four terms.

    >>> x, R = np.zeros((1, 2, 1)), np.zeros((4, 1, 1))
    >>> relative_attention(x, x, np.eye(2)[None], R, R[..., 0], x[:, 0])
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    check_tokens(q, k, v)
    T, S = q.shape[-2], k.shape[-2]
    s = content_scores(q, u, k) + relative_scores(q, R, b, S - T)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    return attend(s * scale, visible(T, S - T, causal), v)[0]


def attend_segment(
    x: np.ndarray,
    memory: np.ndarray | None,
    W: np.ndarray,
    biases: np.ndarray,
    w: np.ndarray,
    c: np.ndarray,
    R: np.ndarray,
    b: np.ndarray,
    u: np.ndarray,
    q_conv_state: str = "reset",
) -> np.ndarray:
    """S1-S6: a segment x (..., T, D) after its memory (..., M, D) or none, (..., T, D).

    W (4, D, D) holds Wq, Wk, Wv and Wo, `biases` (2, D) those of v and of the output, w (3, dk, K)
    and c (3, dk) the filters of q, k and v; tables as in `relative_attention`, whose number of
    heads is that of u (heads, dk). With `q_conv_state` "reset" the filters of q see zeros before
    the segment, with "carry" the memory.

    >>> one, R = np.ones((1, 1)), np.zeros((4, 1, 1))
    >>> W, w, zero = np.ones((4, 1, 1)), np.ones((3, 1, 1)), np.zeros((3, 1))
    >>> attend_segment(one, None, W, zero[:2], w, zero, R, R[..., 0], one)
    array([[1.]])
    """
    check_segment(x, memory, W, biases, w, c, u)
    check_choice("q_conv_state", q_conv_state, ("reset", "carry"))
    heads, T = u.shape[0], x.shape[-2]
    kvx = x if memory is None else np.concatenate([memory, x], axis=-2)
    source = kvx if q_conv_state == "carry" else x
    q = depthwise_causal_conv(project_heads(source, W[0], None, heads), w[0], c[0])[0]
    k = depthwise_causal_conv(project_heads(kvx, W[1], None, heads), w[1], c[1])[0]
    v = depthwise_causal_conv(project_heads(kvx, W[2], biases[0], heads), w[2], c[2])[0]
    o = relative_attention(q[..., q.shape[-2] - T :, :], k, v, R, b, u)
    return np.swapaxes(o, -2, -3).reshape(x.shape) @ W[3] + biases[1]


def step(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    w: np.ndarray,
    c: np.ndarray,
    R: np.ndarray,
    b: np.ndarray,
    u: np.ndarray,
    state: State,
) -> tuple[np.ndarray, State]:
    """S9: outputs (..., heads, T, dk) of T new tokens, and the state after them.

    q, k and v (..., heads, T, dk) are projected and not yet convolved; w (3, dk, K) and c (3, dk)
    are their filters; the tables need P of at least all tokens so far.

    >>> x, R, w = np.ones((1, 1, 1)), np.zeros((4, 1, 1)), np.ones((3, 1, 2))
    >>> out, after = step(x, x, x, w, w[..., 0], R, R[..., 0], x[0], init_state(x, 2))
    >>> out.ravel(), after.k.ravel(), after.k_rows.ravel()
    (array([2.]), array([2.]), array([1.]))
    """
    check_step(q, k, v, w, c, state)
    qc, q_rows = depthwise_causal_conv(q, w[0], c[0], state.q_rows)
    kc, k_rows = depthwise_causal_conv(k, w[1], c[1], state.k_rows)
    vc, v_rows = depthwise_causal_conv(v, w[2], c[2], state.v_rows)
    keys = np.concatenate([state.k, kc], axis=-2)
    values = np.concatenate([state.v, vc], axis=-2)
    out = relative_attention(qc, keys, values, R, b, u)
    return out, State(q_rows, k_rows, v_rows, keys, values)


MECHANISM = Mechanism(
    title="Relative attention on convolved heads",
    idea="A short filter mixes each head in time; content and distance both get learned biases.",
    paper=Paper(
        title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
        authors=("Herman Sugiharto", "Aradea", "Husni Mubarok"),
        year=2023,
        arxiv="2308.03429",
        code="hermansh-id/rcmha",
    ),
    operations=(
        Operation(project_heads, clauses=("S1",)),
        Operation(
            depthwise_causal_conv,
            clauses=("S2",),
            gradient=depthwise_causal_conv_backward,
            differentiable=("p", "w", "b", "state"),
        ),
        Operation(content_scores, clauses=("S3",)),
        Operation(relative_shift, clauses=("S4",)),
        Operation(relative_scores, clauses=("S3", "S4")),
        Operation(memory_mask, clauses=("S5",)),
        Operation(attend, clauses=("S5",)),
        Operation(
            relative_attention,
            clauses=("S3", "S4", "S5", "S8"),
            gradient=relative_attention_backward,
            differentiable=("q", "k", "v", "R", "b", "u"),
        ),
        Operation(
            attend_segment,
            clauses=("S1", "S2", "S3", "S4", "S5", "S6", "S8"),
            gradient=attend_segment_backward,
            differentiable=("x", "memory", "W", "biases", "w", "c", "R", "b", "u"),
        ),
        Operation(update_memory, clauses=("S7",)),
        Operation(init_state, clauses=("S9",)),
        Operation(step, clauses=("S9",)),
    ),
    headline="relative_attention",
    coverage=Coverage(
        patterns=("causal self", "noncausal self", "causal cross"),
        phases=PHASES,
        heads=("MHA",),
        gradient=True,
    ),
)
