r"""TempScale: one temperature below 1 keeps the embeddings of long texts apart.

Every layer of self-attention is a low-pass filter along the tokens, and the longer the text, the
less of the part that varies from token to token survives: all tokens, and the pooled embedding with
them, drift to one constant. TempScale divides the logits of every layer by a single temperature
:math:`\tau < 1`, whatever the length. A sharper softmax lets more of the varying part through, most
of all in long texts, so that long and short texts are spread alike again.

Definition
----------
S1. **Score.** :math:`z_{ij} = \sigma\, q_i \cdot k_j + b_{ij}`. The scale :math:`\sigma` is
1/sqrt(d) (K2) in BERT and RoBERTa and 1 in T5; the bias :math:`b`, T5's learned relative positions
or BERT's relative-key terms already scaled, is optional and added unscaled. Query head h reads kv
head h // group (K7).

S2. **Temper.** :math:`z_{ij} / \tau` with :math:`\tau > 0`, one number for the model, or one for
each layer or each query head. The bias is inside the division and is sharpened too. :math:`\tau`
may not depend on the length; :math:`\tau = 1` changes nothing.

S3. **Weigh.** :math:`p_{ij} = \operatorname{softmax}_j(z_{ij} / \tau)` over the visible keys, and
lse is that of the tempered scores (K5); nothing visible means weights 0 and lse -inf (K4).

S4. **Combine.** :math:`o_i = \sum_j p_{ij} v_j`. Prefill and decode are the same formula: keys and
values are all there is to cache. How a model pools its tokens is left alone.

S5. **Gradient.** With :math:`dz'` the gradient of the tempered scores: :math:`dz = dz' / \tau`,
:math:`dq_i = \sigma \sum_j dz_{ij} k_j`, :math:`dk_j = \sigma \sum_i dz_{ij} q_i`, and for the
temperature itself :math:`d\tau = -\tau^{-2} \sum_{ij} dz'_{ij} z_{ij}` over the visible pairs.

What length does to a filter, and how it is measured, is S6 to S11 in `tempscale_collapse`.

Complexity
----------
Nothing beside attention: :math:`1 / (\tau \sqrt d)` takes the place of the scale.

Paper and code
--------------
The paper divides :math:`q \cdot k / \sqrt d`; the authors' code adds bias and mask first and
divides the sum. We follow the code for the bias. Its mask is the least number of the dtype, which
overflows to -inf when divided and gives NaN in a row that is wholly masked; ours is boolean (K4).
For T5 the code takes the softmax in float32, we stay in one dtype (K10). It patches BERT, RoBERTa
and T5 only: a "gte" model is recognised by its name and left as it is, so that the option does
nothing there. Its default temperature is 1; values such as 0.8 or 0.9 are used, the exact grid of
the paper is unverified. The first version of the paper states its aim as a higher rate of low-pass
attenuation, the final one as a narrower gap between short and long texts; the formula is the same.
A temperature for each layer or head and the causal order are ours.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    default_scale,
    repeat_heads,
)
from attnspec.reference.dense.attention import visible
from attnspec.reference.dense.attention_gradient import score_gradient, sum_groups
from attnspec.reference.primitives.softmax import softmax_lse, weights_given_lse
from attnspec.reference.scores.tempscale_collapse import (
    attention_entropy,
    centre_distance,
    dc,
    filter_gain,
    hc,
    pairwise_cosine,
    retention,
    token_spectrum,
)
from attnspec.reference.scores.tempscale_steps import (
    attend,
    check_temperature,
    scores,
    softmax_rows,
    temper,
    temper_backward,
)
from attnspec.reference.spec import PATTERNS, PHASES, Coverage, Mechanism, Operation, Paper


def tempered_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    tau: float | np.ndarray = 1.0,
    causal: bool = False,
    mask: np.ndarray | None = None,
    scale: float | None = None,
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S4: output (..., heads, q_tokens, dv) and lse (..., heads, q_tokens) at temperature `tau`.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), v (..., kv_heads, k_tokens, dv);
    `tau` a number or (heads,); `mask` bool, True = visible, and `bias` broadcast to the scores.

    >>> x = np.eye(2)[None]
    >>> tempered_attention(x, x, x, tau=0.1)[0].round(3)
    array([[[0.999, 0.001],
            [0.001, 0.999]]])
    """
    check_attention_inputs(q, k, v)
    check_temperature(tau, q.shape[-3], q.dtype)
    allowed = visible(q.shape[-2], k.shape[-2], causal=causal, mask=mask)
    P, lse = softmax_lse(temper(scores(q, k, scale, bias), tau), allowed)
    return attend(P, v), lse


def tempered_attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    tau: float | np.ndarray = 1.0,
    causal: bool = False,
    mask: np.ndarray | None = None,
    scale: float | None = None,
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S5: gradients dq, dk, dv, shaped as q, k, v; `dlse` None means lse is not used.

    >>> one = np.ones((1, 1, 2))
    >>> [x.ravel() for x in tempered_attention_backward(one, one, one, one, tau=0.5)]
    [array([0., 0.]), array([0., 0.]), array([1., 1.])]
    """
    check_attention_inputs(q, k, v)
    check_array("dout", dout, ("heads", "q_tokens", "dv"))
    check_temperature(tau, q.shape[-3], q.dtype)
    heads, factor = q.shape[-3], default_scale(q.shape[-1]) if scale is None else float(scale)
    allowed = visible(q.shape[-2], k.shape[-2], causal=causal, mask=mask)
    z = scores(q, k, scale, bias)
    tempered = temper(z, tau)
    P = weights_given_lse(tempered, softmax_lse(tempered, allowed)[1], allowed)
    unread = np.all(P == 0, axis=-2)[..., None]
    keys, values = (np.where(unread, 0, repeat_heads(x, heads)).astype(x.dtype) for x in (k, v))
    dz, _ = temper_backward(z, tau, score_gradient(P, values, dout, dlse)[0])
    dk = factor * (np.swapaxes(dz, -1, -2) @ q)
    dv = np.swapaxes(P, -1, -2) @ dout
    return factor * (dz @ keys), sum_groups(dk, k.shape[-3]), sum_groups(dv, v.shape[-3])


MECHANISM = Mechanism(
    title="TempScale",
    idea="Divide every logit by one temperature below 1, so that long texts keep their variety.",
    paper=Paper(
        title="Length-Induced Embedding Collapse in PLM-based Models",
        authors=("Yuqi Zhou", "Sunhao Dai", "Zhanshuo Cao", "Xiao Zhang", "Jun Xu"),
        year=2025,
        arxiv="2410.24200",
        venue="ACL 2025",
        code="Yuqi-Zhou/Length_Collapse",
    ),
    operations=(
        Operation(scores, clauses=("S1",)),
        Operation(
            temper,
            clauses=("S2",),
            gradient=temper_backward,
            differentiable=("scores", "tau"),
        ),
        Operation(softmax_rows, clauses=("S3",)),
        Operation(attend, clauses=("S4",)),
        Operation(
            tempered_attention,
            clauses=("S1", "S2", "S3", "S4"),
            gradient=tempered_attention_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(dc, clauses=("S6",)),
        Operation(hc, clauses=("S6",)),
        Operation(filter_gain, clauses=("S7",)),
        Operation(retention, clauses=("S8",)),
        Operation(token_spectrum, clauses=("S9",)),
        Operation(attention_entropy, clauses=("S9",)),
        Operation(pairwise_cosine, clauses=("S10",)),
        Operation(centre_distance, clauses=("S10",)),
    ),
    headline="tempered_attention",
    coverage=Coverage(
        patterns=PATTERNS, phases=PHASES, paddings=("none", "left", "right"), gradient=True
    ),
)
