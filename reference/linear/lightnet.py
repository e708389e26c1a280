r"""LightNet: a recurrence whose decay is a ratio of running sums, so that one scan is enough.

A state that is multiplied by a decay treats directions differently, so an image needs several
scans. Here the decay is the ratio of a running sum before and after a token. The recurrence then
telescopes into a weighted mean of the values seen, one for every key channel, with weights
proportional to the exponential of the key; without a causal order it is a softmax over time. Where
a token is, which this forgets, is told by two position encodings (`lightnet_positions`).

Definition
----------
Per head: q and k (T, d), v (T, e). The entries of k are raw logits; q comes after its activation
(SiLU in the paper). Everything holds for each key channel c by itself.

S1. **Additive decay.** With gates g (T, d): :math:`\Delta_t = \Delta_{t-1} + e^{g_t}`,
:math:`\Delta_0 = 0`, and :math:`S_t = \mathrm{diag}(\Delta_{t-1} / \Delta_t) S_{t-1} +
\mathrm{diag}(e^{g_t} / \Delta_t) k_t v_t^T`, read by :math:`o_t = S_t^T q_t`.

S2. **Unrolled**: :math:`S_t = \mathrm{diag}(1 / \Delta_t) \sum_{s \le t} \mathrm{diag}(e^{g_s}) k_s
v_s^T`. The weights :math:`e^{g_{sc}} / \Delta_{tc}` of the past sum to 1.

S3. **LightNet**: g = k, and the key that is multiplied is 1. Row c of :math:`S_t` is the mean of
the past values under :math:`\mathrm{softmax}_{s \le t}(k_{sc})`.

S4. **Gates.** With :math:`z_t = \log \Delta_t` and :math:`x_t = k_t - z_{t-1}`: :math:`\bar k_t =
\sigma(x_t)` and the log decay :math:`w_t = -\log(1 + e^{x_t})`, so that :math:`\bar k_t + e^{w_t} =
1`. The first token has :math:`\bar k = 1`; its decay meets an empty state and is set to w = 0. z is
kept as a running maximum m and :math:`\Delta e^{-m}`, so that an offset of all logits costs no
digits. A key of :math:`-\infty` (padding, with v = 0) has :math:`\bar k = 0` and w = 0.

S5. **Vector decay.** :math:`S_t = \mathrm{diag}(e^{w_t}) S_{t-1} + \bar k_t v_t^T`, :math:`o_t =
scale\, S_t^T q_t` with scale = 1 by default. :math:`S_0` is given or zero; S never contains scale.

S6. **State.** (S, z); z enters the first log decay. One token is one step of S4 and S5.

S7. **General rule**, g and k apart: with a running maximum m of g, :math:`s \leftarrow e^{m - m'} s
+ (e^{g - m'} k) v^T`, :math:`\Delta \leftarrow e^{m - m'} \Delta + e^{g - m'}`, :math:`o = (q /
\Delta)\, s`. The state is (s, :math:`\Delta`, m), from s = 0, :math:`\Delta = 0`, :math:`m =
-\infty`; the S of S1 is :math:`\mathrm{diag}(1 / \Delta) s`.

S8. **One scan.** Without a causal order: P = softmax of k over time, per channel, :math:`KV = P^T
v`, and :math:`o_i = scale\, KV^T q_i` for any number of queries.

S9. **Gradient of S5**, with :math:`R_t = scale\, q_t do_t^T + \mathrm{diag}(e^{w_{t+1}}) R_{t+1}`,
the last of which adds dS, that of the state behind the last token: :math:`dq_t = scale\, S_t do_t`,
:math:`d\bar k_t = R_t v_t`, :math:`dv_t = R_t^T \bar k_t`, and :math:`dw_t = (S_T\, dS) 1 +
\sum_{t' \ge t} (q_{t'} dq_{t'} - \bar k_{t'} d\bar k_{t'})`, elementwise. :math:`dS_0 =
\mathrm{diag}(e^{w_1}) R_1`.

S10. **Gradient of S3.** The weights sum to 1, so only what differs from the mean counts:
:math:`dk_t = \bar k_t (d\bar k_t - r_t)` with :math:`r_t = q_t\, dq_t + e^{w_{t+1}} r_{t+1}`, the
last of which adds :math:`(S_T\, dS) 1 - dz`. The z handed over is the logit of a key whose value is
:math:`S_0`: :math:`dz_0 = (S_0\, dS_0) 1 - e^{w_1} r_1`, and 0 for a channel that has seen nothing.
In S8: :math:`dKV = scale\, q^T do`, :math:`dv = P\, dKV`, :math:`dP = v\, dKV^T`, :math:`dk = P (dP
- \sum_t P\, dP)`.

S11. **Heads.** Query head h reads kv head h // group (K7); states belong to query heads.

S16. **Gradient of S7**, which is S5 with :math:`\bar k_t = i_t k_t`, :math:`i_t = e^{g_t - z_t}`:
S9 gives :math:`d\bar k_t` and :math:`dw_t`, so that :math:`dk_t = i_t\, d\bar k_t`, and with
:math:`di_t = k_t\, d\bar k_t` and :math:`dz_t = e^{w_{t+1}} dz_{t+1} + dw_{t+1} - i_t\, di_t -
dw_t` it is :math:`dg_t = i_t (di_t + dz_t)`. Behind the last token dz adds :math:`(s\, ds) 1 +
\Delta\, d\Delta`. m is a point of reference and no more: nothing comes back from the last one, and
what is computed from (s, :math:`\Delta`, m) has the right gradient without.

S17. **Packed sequences** lie end to end; token ranges come from offsets, and every one starts from
a state of its own: S5 and S3 restart in each, z with S. The gradients are those of each alone.

Complexity
----------
Time :math:`O(T d e)` and a state of :math:`d e + d` numbers a head, however long the sequence. As t
grows :math:`w_t` tends to 0, about -1/t for alike logits: the mechanism becomes a plain mean. The
log decays that `additive_gates` returns show how far it is on that way.

Paper and code
--------------
The paper's own repository could not be had; S1 to S8 agree with two independent implementations.
The first author's later layer starts z at 0, which adds a key of logit 0 and value 0 to every
sequence; here it starts at :math:`-\infty`, as S1 says, and the state S = 0, z = 0 gives that
layer's form. A third party's, which has no position encodings, scales by :math:`1/\sqrt d`; a norm
follows the output, so scale matters only beside its epsilon. Around the mechanism stand a gate,
:math:`(Norm(o) \odot act(x W_1 W_2)) W_o` with an RMSNorm over all heads at once, and pre-norm
blocks: they are the caller's. The rank of :math:`W_1 W_2` is d and act a sigmoid in the first
author's layer, 128 and swish in the third party's.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_shaped,
    check_size,
    repeat_heads,
)
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.lightnet_batches import (
    lightnet_packed,
    lightnet_packed_backward,
    vector_decay_packed,
    vector_decay_packed_backward,
)
from attnspec.reference.linear.lightnet_gradient import (
    State,
    check_state,
    lightnet_causal_backward,
)
from attnspec.reference.linear.lightnet_positions import md_angles, md_lrpe, md_tpe, tpe
from attnspec.reference.linear.lightnet_positions_gradients import (
    md_lrpe_backward,
    md_tpe_backward,
    tpe_backward,
)
from attnspec.reference.linear.lightnet_scan import (
    additive_gates,
    additive_rule,
    additive_rule_backward,
    check_scale,
    vector_decay_attend,
    vector_decay_backward,
)
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


def lightnet_causal(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    state: State | None = None,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, State]:
    """S3-S6, S11: o (..., heads, T, e) and the state: S (..., heads, d, e) and z (..., heads, d).

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, e).

    >>> k, v = np.zeros((1, 3, 1)), np.array([[[3.0], [6.0], [0.0]]])
    >>> o, (S, z) = lightnet_causal(np.ones((1, 3, 1)), k, v)
    >>> o.ravel(), S.ravel(), np.exp(z).ravel()
    (array([3. , 4.5, 3. ]), array([3.]), array([3.]))
    """
    S0, z0 = check_state(state, q, k, v)
    check_scale(scale)
    k, v = repeat_heads(k, q.shape[-3]), repeat_heads(v, q.shape[-3])
    kbar, log_decay, z = additive_gates(k, z0)
    o, S = vector_decay_attend(q, kbar, v, log_decay, S0, scale=scale)
    return o, (S, z)


def time_softmax(k: np.ndarray) -> np.ndarray:
    """S8: softmax of k (..., T, d) over time; zeros where a channel has no key.

    >>> time_softmax(np.log([[1.0, 4.0], [3.0, 4.0]]))
    array([[0.25, 0.5 ],
           [0.75, 0.5 ]])
    """
    check_array("k", k, ("T", "d"))
    top = np.max(k, axis=-2, keepdims=True, initial=-np.inf)
    weights = np.exp(k - np.where(np.isneginf(top), np.zeros_like(top), top))
    total = np.sum(weights, axis=-2, keepdims=True)
    return weights / np.where(total == 0, np.ones_like(total), total)


def lightnet_noncausal(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float = 1.0
) -> np.ndarray:
    """S8, S11: o (..., heads, q_tokens, e) of all keys, in any order.

    q (..., heads, q_tokens, d), k (..., kv_heads, T, d), v (..., kv_heads, T, e).

    >>> k, v = np.zeros((1, 2, 1)), np.array([[[2.0], [4.0]]])
    >>> lightnet_noncausal(np.array([[[1.0], [10.0]]]), k, v).ravel()
    array([ 3., 30.])
    """
    check_attention_inputs(q, k, v)
    check_scale(scale)
    k, v = repeat_heads(k, q.shape[-3]), repeat_heads(v, q.shape[-3])
    KV = np.swapaxes(time_softmax(k), -1, -2) @ v
    return scale * (q @ KV)


def lightnet_noncausal_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, *, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S10: dq, dk, dv of `lightnet_noncausal`.

    >>> one = np.ones((1, 1, 1))
    >>> [float(x.squeeze()) for x in lightnet_noncausal_backward(one, one, 5 * one, one)]
    [5.0, 0.0, 1.0]
    """
    check_attention_inputs(q, k, v)
    check_scale(scale)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    kv_heads = k.shape[-3]
    k, v = repeat_heads(k, q.shape[-3]), repeat_heads(v, q.shape[-3])
    P = time_softmax(k)
    KV = np.swapaxes(P, -1, -2) @ v
    dq = scale * (do @ np.swapaxes(KV, -1, -2))
    dKV = scale * (np.swapaxes(q, -1, -2) @ do)
    dP = v @ np.swapaxes(dKV, -1, -2)
    mean = np.einsum("...de,...de->...d", KV, dKV)
    dk = P * (dP - mean[..., None, :])
    return dq, sum_groups(dk, kv_heads), sum_groups(P @ dKV, kv_heads)


def decode_step(
    state: State, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float = 1.0
) -> tuple[np.ndarray, State]:
    """S6: o (..., heads, 1, e) of one new token and the state with it.

    The first state is S = 0 and z = -inf.

    >>> one = np.ones((1, 1, 1))
    >>> o, (S, z) = decode_step((0 * one, np.full((1, 1), -np.inf)), one, one, 5 * one)
    >>> o.ravel(), S.ravel(), z.ravel()
    (array([5.]), array([5.]), array([1.]))
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], 1, "one token")
    if state is None:
        raise TypeError("state: got NoneType, expected (S, z)")
    return lightnet_causal(q, k, v, state, scale=scale)


MECHANISM = Mechanism(
    title="LightNet",
    idea="Running softmax means of the values, one for each key channel: any order, one scan.",
    paper=Paper(
        title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        authors=("Zhen Qin", "Yuxin Mao", "Xuyang Shen", "Dong Li", "Jing Zhang", "Yuchao Dai",
                 "Yiran Zhong"),
        year=2024,
        arxiv="2405.21022",
        code="OpenNLPLab/LightNet",
    ),
    operations=(
        Operation(additive_gates, clauses=("S1", "S4")),
        Operation(additive_rule, ("S1", "S2", "S7", "S16"), additive_rule_backward,
                  ("q", "k", "v", "g", "state")),
        Operation(vector_decay_attend, ("S5",), vector_decay_backward,
                  ("q", "kbar", "v", "log_decay", "S0")),
        Operation(vector_decay_packed, ("S5", "S9", "S17"), vector_decay_packed_backward,
                  ("q", "kbar", "v", "log_decay", "S0")),
        Operation(lightnet_causal, ("S3", "S4", "S5", "S6", "S11"), lightnet_causal_backward,
                  ("q", "k", "v", "state")),
        Operation(lightnet_packed, ("S3", "S10", "S11", "S17"), lightnet_packed_backward,
                  ("q", "k", "v", "state")),
        Operation(lightnet_noncausal, ("S8", "S11"), lightnet_noncausal_backward, ("q", "k", "v")),
        Operation(decode_step, clauses=("S6",)),
        Operation(md_angles, clauses=("S12",)),
        Operation(md_lrpe, ("S12", "S13", "S18"), md_lrpe_backward, ("x", "theta")),
        Operation(tpe, ("S14", "S18"), tpe_backward, ("x", "qp", "kp", "lam", "state")),
        Operation(md_tpe, ("S14", "S15", "S18"), md_tpe_backward, ("x", "params")),
    ),
    headline="lightnet_causal",
    coverage=Coverage(
        patterns=tuple(p for p in PATTERNS if p != "causal cross"),
        phases=PHASES,
        paddings=PADDINGS,
        heads=HEADS,
        gradient=True,
    ),
)  # fmt: skip
