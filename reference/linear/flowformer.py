r"""Flowformer: linear attention in which sources compete and sinks are allocated a share.

Without a softmax nothing makes tokens compete, and the weights of linear attention become nearly
uniform. Seen as a flow network, in which the capacity from key j to query i is a product of
positive features, two questions have answers in sums alone: how much is wanted of a source when
every sink takes the same, and how much reaches a sink when every source gives the same. The first
answer, through a softmax, scales the values; the second, through a sigmoid, gates the outputs.

Definition
----------
q (B, H, n, d) are sinks, k and v (B, H, m, d or dv) are sources, :math:`\epsilon = 10^{-6}`.

S1. **Features.** :math:`a = \phi(q)`, :math:`b = \phi(k)` with :math:`\phi` the sigmoid of each
component, without a scale; or :math:`\mathrm{relu}(x) + 10^{-6}`.

S2. **Flows.** :math:`I_i = (a_i + \epsilon) \cdot (\sum_j b_j + \epsilon)` comes into sink i,
:math:`O_j = (b_j + \epsilon) \cdot (\sum_i a_i + \epsilon)` leaves source j; :math:`\epsilon` is
added to every component of both factors.

S3. **Conserved flows.** :math:`\hat I_i = (a_i + \epsilon) \cdot (\sum_j b_j / O_j + \epsilon)` and
:math:`\hat O_j = (b_j + \epsilon) \cdot (\sum_i a_i / I_i + \epsilon)`.

S4. **Competition.** :math:`c_j = m\, \mathrm{softmax}_j(\hat O)`, :math:`\hat O` clamped to [-1, 1]
first. The mean of c is 1.

S5. **Allocation.** :math:`g_i = \sigma(\hat I_i\, n / m)`; :math:`\hat I` is not clamped.

S6. **Aggregation.** :math:`out_i = g_i\, a_i^T (\sum_j b_j (c_j v_j)^T) / I_i`, without
:math:`\epsilon` in a and b. So sink i takes the share :math:`P_{ij} = a_i \cdot b_j / I_i` of
:math:`c_j v_j`; with d = 1 it is the same for all sinks. One sink and one source give
:math:`\sigma(1)\, v` up to :math:`O(\epsilon)`.

S7. **Causal flows.** n = m = T. Both sums of S2 end with the token itself: O of a source counts the
sinks *up to it*, not the later ones that will read it, which keeps the order.

S8. **Causal conserved flows.** With :math:`N_t = t`: :math:`\hat I_t = (a_t + \epsilon) \cdot
(\sum_{s \le t} b_s N_s / O_s + \epsilon) / N_t`, and :math:`\hat O_t` alike from :math:`a_s N_s /
I_s`.

S9. **Causal allocation.** :math:`g_t = \sigma(\hat I_t)`.

S10. **Causal competition.** :math:`c_t = N_t e^{\hat O_t} / \sum_{s \le t} e^{\hat O_s}`, clamped
as in S4. A source keeps the weight of its own time: later queries do not change it. Then
:math:`out_t = g_t\, a_t^T (\sum_{s \le t} b_s (c_s v_s)^T) / I_t`. The first output is that of one
sink and one source; the last is not that of S6 on the same tokens.

S11. **State.** Four sums of width d, the sum of :math:`e^{\hat O}`, the d by dv sum of S10, and N.
A step updates them in the order of S7, S8, S10 and reads the last. The sum holds exponentials as
they are: without a clamp it may overflow.

S12. **Padding.** A padded key has b = 0, is left out of the softmax and of m, its value is not
read; a padded query has a = 0 in all sums, is left out of n, and its output is 0. n and m are
counted for each batch entry, a quotient of a padded token is 0 and never 0 / 0; so is one by a flow
of 0, which :math:`\epsilon = 0` allows (ours). No real key means outputs of 0. The causal form
takes no mask: a padded token would advance N and every sum, so the caller skips it.

S13. **Gradient.** Through all of S1 to S10, none through :math:`\hat O` where it is clamped, and
through every part of the states before and behind, N among them.

S14. **Heads.** A flow belongs to a query head and the kv head it reads: keys and values are
repeated for the group (K7).

S15. **Packed sequences** lie end to end; token ranges come from offsets. Each has a state of its
own before and behind it, and all of S7 to S11 restarts in it, the count N too. Results and
gradients are those of each sequence alone.

Complexity
----------
Time :math:`O((n + m)\, d\, dv)` a head, memory :math:`O(d\, dv)` beside the tokens.

Paper and code
--------------
- The paper has softmax and sigmoid alone; the factor m, the ratio n / m and the clamp are in the
  authors' main code, which is followed here, as are N and the competition at a source's own time,
  which the paper's "cumulative sums" leave out. The paper's form can be made of the same steps: no
  clamp, c / m from S4 and `allocation(Ih, 1, 1)`.
- Their code for long sequences has the relu features and no clamp: `kind` and `clamp=None`. Their
  causal code multiplies 1 / I by N and divides by it again; here it does neither.
- They advise to set padded values to zero, which leaves padded keys in I, O and the softmax. S12 is
  exact instead (ours).
- Their causal code crashes when queries and keys differ in number; here q is refused by name. Keys
  of the past are seen by continuing from their state (S11), and in no other way.
- A layer around it has projections with bias and dropout 0.05 on its output, which is no part of
  this operation. Arbitrary masks of pairs are impossible.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_attention_inputs, repeat_heads
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.flowformer_batches import (
    flow_attend_packed,
    flow_packed_backward,
)
from attnspec.reference.linear.flowformer_causal import (
    flow_attend_causal,
    flow_causal_backward,
    flow_decode_step,
)
from attnspec.reference.linear.flowformer_flows import (
    Clamp,
    allocation,
    check_eps,
    check_flow,
    check_mask,
    clip,
    competition,
    competition_causal,
    conserved_flows,
    conserved_flows_causal,
    dot,
    features_slope,
    flow_features,
    flows,
    flows_causal,
    over_square,
    quotient,
    share,
)
from attnspec.reference.spec import HEADS, PADDINGS, PHASES, Coverage, Mechanism, Operation, Paper


def flow_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    key_mask: np.ndarray | None = None,
    query_mask: np.ndarray | None = None,
) -> np.ndarray:
    """S1-S6, S12: out (..., heads, n, dv) without a causal order.

    q (..., heads, n, d), k (..., kv_heads, m, d), v (..., kv_heads, m, dv); `key_mask` bool
    (..., m) and `query_mask` bool (..., n), True = a real token.

    >>> x = np.zeros((1, 2, 1))
    >>> flow_attend(x, x, np.array([[[1.0], [3.0]]]), eps=0.0).round(3).ravel()
    array([1.462, 1.462])
    """
    a, b, values, n, m = _tokens(q, k, v, eps, kind, key_mask, query_mask)
    I, O = flows(a, b, eps)
    Ih, Oh = conserved_flows(a, b, I, O, eps)
    c, g = competition(Oh, clamp, key_mask), allocation(Ih, n, m)
    KV = np.swapaxes(b, -1, -2) @ (c[..., None] * values)
    return g[..., None] * quotient(a @ KV, I)


def flow_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    key_mask: np.ndarray | None = None,
    query_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S13: dq, dk, dv of `flow_attend`.

    >>> x = np.zeros((1, 2, 1))
    >>> flow_backward(x, x, x, x + 1)[2].ravel().round(3)
    array([0.731, 0.731])
    """
    a, b, values, n, m = _tokens(q, k, v, eps, kind, key_mask, query_mask)
    check_flow("dout", dout, np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1], 1)))
    I, O = flows(a, b, eps)
    Ih, Oh = conserved_flows(a, b, I, O, eps)
    c, g = competition(Oh, clamp, key_mask), allocation(Ih, n, m)
    A, B, u = a + eps, b + eps, c[..., None] * values
    KV = np.swapaxes(b, -1, -2) @ u
    y = quotient(a @ KV, I)
    dr = quotient(g[..., None] * dout, I)
    if query_mask is not None:
        dr = np.where(query_mask[..., None, :, None], dr, np.zeros_like(dr))
        dout = np.where(query_mask[..., None, :, None], dout, np.zeros_like(dout))
    da, dKV = dr @ np.swapaxes(KV, -1, -2), np.swapaxes(a, -1, -2) @ dr
    db, du = u @ np.swapaxes(dKV, -1, -2), b @ dKV
    dI = -dot(dr, y)
    dc = dot(values, du)
    count = np.maximum(np.sum(c, axis=-1, keepdims=True), np.ones_like(c[..., :1]))
    dIh = dot(dout, y) * g * (1 - g) * share(n, m, Ih)
    dOh = c * (dc - np.sum(c * dc, axis=-1, keepdims=True) / count)
    dOh = np.where(clip(Oh, clamp) == Oh, dOh, np.zeros_like(dOh))
    into = np.sum(quotient(b, O), axis=-2, keepdims=True)
    out_of = np.sum(quotient(a, I), axis=-2, keepdims=True)
    dinto = np.sum(dIh[..., None] * A, axis=-2, keepdims=True)
    dout_of = np.sum(dOh[..., None] * B, axis=-2, keepdims=True)
    dA, dB = dIh[..., None] * (into + eps), dOh[..., None] * (out_of + eps)
    da = da + quotient(np.broadcast_to(dout_of, a.shape), I)
    db = db + quotient(np.broadcast_to(dinto, b.shape), O)
    dI = dI - over_square(dot(dout_of, a), I)
    dO = -over_square(dot(dinto, b), O)
    sb, sa = np.sum(b, axis=-2, keepdims=True), np.sum(a, axis=-2, keepdims=True)
    dA, dB = dA + dI[..., None] * (sb + eps), dB + dO[..., None] * (sa + eps)
    da = da + dA + np.sum(dO[..., None] * B, axis=-2, keepdims=True)
    db = db + dB + np.sum(dI[..., None] * A, axis=-2, keepdims=True)
    keys = repeat_heads(k, q.shape[-3])
    dq = np.where(a == 0, np.zeros_like(a), da * features_slope(q, kind))
    dk = np.where(b == 0, np.zeros_like(b), db * features_slope(keys, kind))
    return dq, sum_groups(dk, k.shape[-3]), sum_groups(c[..., None] * du, v.shape[-3])


def _tokens(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    eps: float,
    kind: str,
    key_mask: np.ndarray | None,
    query_mask: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S12, S14: a, b and v of every query head, 0 for padded tokens, and the counts n and m."""
    check_attention_inputs(q, k, v)
    check_eps(eps)
    counts, features = [], []
    values = repeat_heads(v, q.shape[-3])
    for name, x, mask in (("query_mask", q, query_mask), ("key_mask", k, key_mask)):
        phi = repeat_heads(flow_features(x, kind), q.shape[-3])
        real = np.ones((*x.shape[:-3], x.shape[-2]), bool)
        if mask is not None:
            check_mask(name, mask, real.shape)
            real = mask
            phi = np.where(mask[..., None, :, None], phi, np.zeros_like(phi))
        counts.append(np.sum(real, axis=-1))
        features.append(phi)
    if key_mask is not None:
        values = np.where(key_mask[..., None, :, None], values, np.zeros_like(values))
    return features[0], features[1], values, counts[0], counts[1]


MECHANISM = Mechanism(
    title="Flowformer",
    idea="Linear attention with conserved flows: sources compete, sinks are allocated a share.",
    paper=Paper(
        title="Flowformer: Linearizing Transformers with Conservation Flows",
        authors=("Haixu Wu", "Jialong Wu", "Jiehui Xu", "Jianmin Wang", "Mingsheng Long"),
        year=2022,
        arxiv="2202.06258",
        venue="ICML 2022",
        code="thuml/Flowformer",
    ),
    operations=(
        Operation(flow_features, clauses=("S1",)),
        Operation(flows, clauses=("S2",)),
        Operation(conserved_flows, clauses=("S3",)),
        Operation(competition, clauses=("S4", "S12")),
        Operation(allocation, clauses=("S5", "S9")),
        Operation(
            flow_attend,
            clauses=("S1", "S2", "S3", "S4", "S5", "S6", "S12", "S14"),
            gradient=flow_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(flows_causal, clauses=("S7",)),
        Operation(conserved_flows_causal, clauses=("S8",)),
        Operation(competition_causal, clauses=("S10",)),
        Operation(
            flow_attend_causal,
            clauses=("S7", "S8", "S9", "S10", "S11", "S14"),
            gradient=flow_causal_backward,
            differentiable=("q", "k", "v", "state"),
        ),
        Operation(
            flow_attend_packed,
            clauses=("S7", "S8", "S9", "S10", "S11", "S13", "S14", "S15"),
            gradient=flow_packed_backward,
            differentiable=("q", "k", "v", "state"),
        ),
        Operation(flow_decode_step, clauses=("S11",)),
    ),
    headline="flow_attend",
    coverage=Coverage(
        patterns=("noncausal self", "noncausal cross", "causal self"),
        phases=PHASES,
        paddings=PADDINGS,
        heads=HEADS,
        gradient=True,
    ),
)
