r"""Mixture-of-Head attention: every token chooses which heads it uses, and how much of each.

Multi-head attention is a sum over heads; MoH makes it a weighted one, in which a token uses all
*shared* heads and the k best of the *routed* ones. A router of two stages gives the weights: inside
each group of heads first, between the two groups then. What a token did not choose need not be
computed, so a kernel that gathers the rows of each head saves the work in proportion.

Definition
----------
S1. **Routed probabilities.** Of H heads the first hs are shared, the other hr = H - hs routed. For
tokens x, those that make the queries, :math:`r = \mathrm{softmax}(x W_r^T)` over the routed heads.

S2. **Choose.** A token's mask marks its k largest :math:`r_i`, ties to the lower index (K6);
0 <= k <= hr and hs + k >= 1.

S3. **Routed gates.** :math:`g^r_i = k\, r_i m_i / \max(\sum_j r_j m_j, \epsilon)`: they sum to k.
:math:`\epsilon` is the smallest spacing of the dtype.

S4. **Shared gates.** :math:`g^s = hs \cdot \mathrm{softmax}(x W_s^T)`; a single shared head has
gate 1 and needs no :math:`W_s`.

S5. **Between the groups.** :math:`a = 2\, \mathrm{softmax}(x W_0^T)` over two logits, and the gates
are :math:`a_0 g^s` for the shared heads, :math:`a_1 g^r` for the routed ones. With hs = 0 they are
:math:`g^r`, with k = 0 they are :math:`g^s` and 0 for routed heads; there is no :math:`W_0` then.

S6. **Heads.** :math:`h_i` is ordinary softmax attention of query head i, scaled as in K2, over all
keys that the causal rule (K3) and the padding leave: k and v exist for every head and token. A row
(token, head) that is not *active* is not computed and its :math:`h` is 0, as that of a row that
sees nothing (K4).

S7. **Mix.** :math:`out = \mathrm{concat}_i(gate_i\, h_i)\, W_O^T + b_O`. The gate multiplies the
head's output, not its weights, and not the bias. :math:`W_O` is (D, H dv): the heads together need
not be as wide as the model.

S8. **Gradient.** Of every step by the chain rule; the choice in S2 is a constant. An inactive row
gets and gives gradient 0, its gate's included. dk and dv sum over a group of query heads (K7).

S9. **Routing by norms.** For a model trained without a router: :math:`s_i = \|q_i\|_2` for the
routed *query* heads, grouped or not, q before positions (which keep norms); :math:`g =
\mathrm{softmax}(s / \mathrm{std}(s))` with the unbiased std over the hr heads. The k largest
:math:`s_i`, which are those of g, have gate 1 like the shared heads, all others 0. In training the
gate's gradient is handed to g as it is.

S10. **Balance.** Over all real tokens of a layer together, :math:`me_i` the mean of :math:`r_i` and
:math:`ce_i` the share of tokens that chose i: :math:`L = hr \sum_i me_i\, ce_i`. Uniform routing
gives k. ce carries no gradient.

S11. **Decode.** Gates of the new tokens depend on them alone. The cache holds the keys and values
of *all* heads, since any later token may choose any of them.

Complexity
----------
A fraction (hs + k) / H of dense attention's scores and sums. The cache stays as it is; a decoding
step need not read that of a kv head whose group has no active head.

Paper and code
--------------
- The paper's formula, as we recall it, has the plain probabilities: neither the division in S3 nor
  the factors k, hs, 2 and, in S10, hr. The authors' code has them, and we follow it: with zero
  routers and k = hr it is exactly dense attention. `rescale=False` gives the other form.
- The class for diffusion models fails for hs = 1 and k > 0; S4 follows that for images.
- Many of the authors' models have k = 0 in their first layers: the gates there are S4's, not 1.
- That S6 leaves inactive rows out, forward and backward, is ours: the authors compute all heads and
  multiply by 0. The gates then differ in one place: a gate that is 0, by choice or because its
  probability underflows, learns nothing from its head.
- Which of equal probabilities is chosen (S2) the authors leave to torch; the lower index is ours.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_attention_inputs
from attnspec.reference.heads.moh_heads import (
    check_mix,
    head_outputs,
    head_outputs_backward,
    mix_heads,
    mix_heads_backward,
    step,
)
from attnspec.reference.heads.moh_routing import (
    combine_gates,
    combine_gates_backward,
    group_weights,
    group_weights_backward,
    routed_gates,
    routed_gates_backward,
    routed_probs,
    routed_probs_backward,
    shared_gates,
    shared_gates_backward,
    topk_mask,
)
from attnspec.reference.heads.moh_training import (
    load_balance_loss,
    load_balance_loss_backward,
    norm_probs,
    norm_probs_backward,
    norm_router,
    straight_through,
    straight_through_backward,
)
from attnspec.reference.spec import (
    HEADS,
    PATTERNS,
    PHASES,
    Coverage,
    Mechanism,
    Operation,
    Paper,
)


def route(
    x: np.ndarray,
    Wr: np.ndarray | None,
    Ws: np.ndarray | None,
    W0: np.ndarray | None,
    k: int,
    *,
    rescale: bool = True,
) -> np.ndarray:
    """S1-S5: gates (..., tokens, H) of tokens x (..., tokens, D).

    Wr (hr, D), Ws (hs, D), W0 (2, D). No Wr means no routed heads; no Ws means a single shared head
    if there is W0, else none. W0 is not used unless both groups are.

    >>> route(np.ones((1, 1)), np.array([[1.0], [1.0]]), None, np.zeros((2, 1)), 1)
    array([[1., 1., 0.]])
    """
    check_array("x", x, ("tokens", "D"))
    if Wr is None and k != 0:
        raise ValueError(f"k: got {k} without Wr, expected 0 or routed heads")
    gs: np.ndarray | None = None
    if Ws is not None:
        gs = shared_gates(x, Ws, rescale=rescale)
    elif W0 is not None:
        gs = np.ones_like(x, shape=(*x.shape[:-1], 1))
    if gs is None and k == 0:
        raise ValueError("k: got 0 without shared heads, expected at least 1")
    gr = None
    if Wr is not None:
        p = routed_probs(x, Wr)
        gr = routed_gates(p, topk_mask(p, k), k, rescale=rescale)
    if gs is None or gr is None:
        return combine_gates(gs, gr)
    if k == 0:
        return np.concatenate([gs, gr], axis=-1)
    if W0 is None:
        raise ValueError("W0: got None, expected (2, D) for two groups of heads")
    return combine_gates(gs, gr, group_weights(x, W0, rescale=rescale))


def moh_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    gates: np.ndarray,
    Wo: np.ndarray,
    bo: np.ndarray | None = None,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """S6, S7: out (..., q_tokens, D); heads whose gate is 0 are not active.

    q, k, v and the keywords as in `head_outputs`; gates (..., q_tokens, heads), Wo (D, heads * dv),
    bo (D,).

    >>> q, v, gates = np.zeros((2, 1, 1)), np.array([[[4.0], [8.0]]]), np.array([[0.5, 0.0]])
    >>> moh_attend(q, np.zeros((1, 2, 1)), v, gates, np.ones((1, 2)))
    array([[3.]])
    """
    check_attention_inputs(q, k, v)
    check_mix(gates, np.zeros_like(v, shape=(*q.shape[:-1], v.shape[-1])), Wo, bo)
    h = head_outputs(q, k, v, gates != 0, causal=causal, key_mask=key_mask, scale=scale)
    return mix_heads(gates, h, Wo, bo)


def moh_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    gates: np.ndarray,
    Wo: np.ndarray,
    bo: np.ndarray | None,
    dout: np.ndarray,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S8: the gradients of q, k, v, gates, Wo and bo.

    >>> one = np.ones((1, 1, 1))
    >>> moh_backward(one, one, one, 3 * one[0], one[0], None, one[0])[2].item()
    3.0
    """
    check_attention_inputs(q, k, v)
    check_mix(gates, np.zeros_like(v, shape=(*q.shape[:-1], v.shape[-1])), Wo, bo)
    active = gates != 0
    h = head_outputs(q, k, v, active, causal=causal, key_mask=key_mask, scale=scale)
    dgates, dh, dWo, dbo = mix_heads_backward(gates, h, Wo, bo, dout)
    dq, dk, dv = head_outputs_backward(
        q, k, v, active, dh, causal=causal, key_mask=key_mask, scale=scale
    )
    return dq, dk, dv, dgates, dWo, dbo


MECHANISM = Mechanism(
    title="Mixture-of-Head attention",
    idea="Each token uses the shared heads and its k best of the others, with weights of its own.",
    paper=Paper(
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        authors=("Peng Jin", "Bo Zhu", "Li Yuan", "Shuicheng Yan"),
        year=2024,
        arxiv="2410.11842",
        venue="ICML 2025",
        code="SkyworkAI/MoH",
    ),
    operations=(
        Operation(routed_probs, ("S1",), routed_probs_backward, ("x", "Wr")),
        Operation(topk_mask, ("S2",)),
        Operation(routed_gates, ("S3",), routed_gates_backward, ("p",)),
        Operation(shared_gates, ("S4",), shared_gates_backward, ("x", "Ws")),
        Operation(group_weights, ("S5",), group_weights_backward, ("x", "W0")),
        Operation(combine_gates, ("S5",), combine_gates_backward, ("gs", "gr", "a")),
        Operation(route, ("S1", "S2", "S3", "S4", "S5")),
        Operation(head_outputs, ("S6",), head_outputs_backward, ("q", "k", "v")),
        Operation(mix_heads, ("S7",), mix_heads_backward, ("gates", "head_outputs", "Wo", "bo")),
        Operation(moh_attend, ("S6", "S7"), moh_backward, ("q", "k", "v", "gates", "Wo", "bo")),
        Operation(norm_probs, ("S9",), norm_probs_backward, ("q_unrot",)),
        Operation(norm_router, ("S9",)),
        Operation(straight_through, ("S9",), straight_through_backward, ("p",)),
        Operation(load_balance_loss, ("S10",), load_balance_loss_backward, ("p",)),
        Operation(step, ("S11",)),
    ),
    headline="moh_attend",
    coverage=Coverage(
        patterns=PATTERNS,
        phases=PHASES,
        paddings=("none", "left", "right"),
        heads=HEADS,
        gradient=True,
    ),
)
