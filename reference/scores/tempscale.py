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

S2. **Temper.** :math:`z_{ij} / \tau` with :math:`\tau > 0`, one number for the model or one for
each query head. The bias is inside the division and is sharpened too. :math:`\tau` may not depend
on the length; :math:`\tau = 1` changes nothing.

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
and T5 only, and its default temperature is 1; values such as 0.8 or 0.9 are used, the exact grid of
the paper is unverified. A temperature for each head and the causal order are ours.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_size,
    default_scale,
    repeat_heads,
)
from attnspec.reference.dense.attention import (
    combine,
    score,
    score_gradient,
    sum_groups,
    visible,
)
from attnspec.reference.primitives.softmax import softmax, softmax_lse, weights_given_lse
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
from attnspec.reference.spec import PATTERNS, PHASES, Coverage, Mechanism, Operation, Paper


def check_positive(name: str, value: Any) -> None:
    """S1, K14: `value` is a finite number above 0."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a finite number > 0")
    if not (float(value) > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: got {value}, expected a finite number > 0")


def check_temperature(tau: Any, heads: int, dtype: np.dtype[Any]) -> None:
    """S2, K14: `tau` is a finite number above 0, or an array (heads,) of them with `dtype`."""
    if not isinstance(tau, np.ndarray):
        check_positive("tau", tau)
        return
    if tau.dtype != dtype:
        raise TypeError(f"tau: got dtype {tau.dtype}, expected {dtype}, as the scores")
    if tau.shape != (heads,):
        raise ValueError(
            f"tau: got shape {tau.shape}, expected ({heads},), one for each head, or a number"
        )
    if not np.all((tau > 0) & np.isfinite(tau)):
        raise ValueError(f"tau: got {tau}, expected finite numbers > 0")


def scores(
    q: np.ndarray, k: np.ndarray, scale: float | None = None, bias: np.ndarray | None = None
) -> np.ndarray:
    """S1: scores z (..., heads, q_tokens, k_tokens) before tempering.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d); `bias` broadcasts to the scores,
    `scale` None means 1/sqrt(d), T5 has 1.

    >>> scores(np.ones((1, 1, 4)), np.ones((1, 2, 4)), bias=np.array([0.0, 1.0]))
    array([[[2., 3.]]])
    """
    if scale is not None:
        check_positive("scale", scale)
    z = score(q, k, scale=None if scale is None else float(scale))
    if bias is None:
        return z
    check_array("bias", bias, ("k_tokens",))
    if bias.dtype != z.dtype:
        raise TypeError(f"bias: got dtype {bias.dtype}, expected {z.dtype}, as q")
    shape = (1,) * (z.ndim - bias.ndim) + bias.shape
    if len(shape) > z.ndim or any(b not in (1, n) for b, n in zip(shape, z.shape, strict=True)):
        raise ValueError(f"bias: got shape {bias.shape}, expected one that broadcasts to {z.shape}")
    return z + bias


def temper(scores: np.ndarray, tau: float | np.ndarray = 1.0) -> np.ndarray:
    """S2: scores (..., heads, q_tokens, k_tokens) divided by `tau`, a number or (heads,).

    >>> temper(np.array([[[1.0, 2.0]]]), 0.5)
    array([[[2., 4.]]])
    """
    check_array("scores", scores, ("heads", "q_tokens", "k_tokens"))
    check_temperature(tau, scores.shape[-3], scores.dtype)
    return scores / _over_scores(tau)


def temper_backward(
    scores: np.ndarray, tau: float | np.ndarray, dout: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S5: the gradients of the scores and of `tau`, from `dout`, that of the tempered scores.

    A score whose gradient is exactly 0, as behind a mask, is not read (K11).

    >>> dscores, dtau = temper_backward(np.array([[[1.0, 2.0]]]), 0.5, np.array([[[1.0, 1.0]]]))
    >>> dscores, dtau
    (array([[[2., 2.]]]), array(-12.))
    """
    check_array("dout", dout, ("heads", "q_tokens", "k_tokens"))
    check_temperature(tau, scores.shape[-3], scores.dtype)
    terms = np.where(dout == 0, np.zeros_like(scores), dout * scores)
    slopes = np.sum(terms / _over_scores(tau) / -_over_scores(tau), axis=(-2, -1))
    by_head = isinstance(tau, np.ndarray)
    dtau = np.sum(slopes, axis=tuple(range(slopes.ndim - by_head)))
    return dout / _over_scores(tau), np.asanyarray(dtau)


def softmax_rows(scores: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """S3: weights P (..., heads, q_tokens, k_tokens) of tempered scores.

    `mask` is bool and broadcasts to the scores, True = visible; rows that see nothing are 0 (K4).

    >>> softmax_rows(np.zeros((1, 1, 3)), np.array([True, True, False]))
    array([[[0.5, 0.5, 0. ]]])
    """
    check_array("scores", scores, ("heads", "q_tokens", "k_tokens"))
    return softmax(scores, visible(*scores.shape[-2:], mask=mask))


def attend(P: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S4: outputs (..., heads, q_tokens, dv) of weights P (..., heads, q_tokens, k_tokens).

    v (..., kv_heads, k_tokens, dv); a value that no query weighs is not read (K11).

    >>> attend(np.array([[[0.5, 0.5]]]), np.array([[[2.0], [4.0]]]))
    array([[[3.]]])
    """
    check_array("P", P, ("heads", "q_tokens", "k_tokens"))
    check_array("v", v, ("kv_heads", "k_tokens", "dv"))
    if v.dtype != P.dtype:
        raise TypeError(f"v: got dtype {v.dtype}, expected {P.dtype}, as P")
    if v.shape[:-3] != P.shape[:-3]:
        raise ValueError(f"v: got leading axes {v.shape[:-3]}, expected {P.shape[:-3]}, as P")
    check_size("v", v.shape[-2], P.shape[-1], "k_tokens, as in P")
    if v.shape[-3] < 1 or P.shape[-3] % v.shape[-3]:
        raise ValueError(f"v: got {v.shape[-3]} kv heads, expected a divisor of {P.shape[-3]}")
    return combine(P, v)


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


def _over_scores(tau: float | np.ndarray) -> Any:
    """`tau` as it broadcasts against (..., heads, q_tokens, k_tokens), without a wider dtype."""
    return tau[:, None, None] if isinstance(tau, np.ndarray) else float(tau)


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
