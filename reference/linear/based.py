r"""Based: attention by the second-order Taylor polynomial of exp, beside a small exact window.

A model whose state has a fixed size recalls only as much as the state can hold, so Based makes the
size a dial. The polynomial :math:`1 + s + s^2/2` is an inner product of finitely many features, so
attention with it is a linear recurrence on a state of D by dv numbers, smooth and global. What it
cannot do, picking out single near tokens, is left to softmax attention over a small sliding window
and to short convolutions in other layers: quality at scale comes from the three together.

Definition
----------
q (B, Hq, Tq, d), k (B, Hk, Tk, d), v (B, Hk, Tk, dv). d is the *feature* width, 16 for the authors,
and is not that of a value head.

S1. **Score.** :math:`s_{ij} = \tau\, q_i \cdot k_j` with the scale :math:`\tau = 1/\sqrt d`.

S2. **Weight.** :math:`w_{ij} = 1 + s_{ij} + s_{ij}^2 / 2 = ((s_{ij} + 1)^2 + 1)/2 \ge 1/2`.

S3. **Mask.** :math:`M_{ij}` is 1 where query i may see key j, by the causal rule (K3) and the
padding `key_mask`, and 0 elsewhere. It multiplies w: a score set to 0 would still weigh 1.

S4. **Attend.** :math:`z_i = \sum_j M_{ij} w_{ij}` and :math:`o_i = \sum_j M_{ij} w_{ij} v_j / (z_i
+ \epsilon)`. A row that sees nothing is exactly 0, also for :math:`\epsilon = 0` (K4). Without the
norm (`use_norm=False`) the result is the numerator.

S5. **Features.** :math:`\phi(x) = [1, \sqrt\tau\, x, (\tau / \sqrt 2)\, \mathrm{vec}(x x^T)]`, vec
by rows, D = 1 + d + d * d numbers, has :math:`\phi(q) \cdot \phi(k) = 1 + s + s^2/2` exactly. The
packed form keeps the pairs a <= b, those with a < b times :math:`\sqrt 2`: of d = 16 channels it
makes 153 numbers, not 273.

S6. **Recurrence.** :math:`S_t = S_{t-1} + \phi(k_t) v_t^T`, :math:`zk_t = zk_{t-1} + \phi(k_t)`,
then :math:`o_t = \phi(q_t)^T S_t / (\phi(q_t)^T zk_t + \epsilon)`. The state is (D, dv), unpacked,
starts at 0, and zk[0] is the number of tokens in it.

S7. **Chunks.** With (S, zk) entering a chunk, :math:`W = \mathrm{tril}(w)` inside it, :math:`num =
\phi(Q) S + W V`, :math:`den = \phi(Q) zk + W 1`; then the chunk's tokens enter the state. Features
exist for one chunk at a time. The last chunk may be short and is never filled up: :math:`\phi(0)`
is not 0, so a key of zeros would count.

S8. **All keys.** Without a causal order every query reads the state of all keys.

S9. **Gradient.** With G = do: :math:`dnum = G/(z+\epsilon)`, :math:`dden_i = -G_i \cdot o_i / (z_i
+ \epsilon)`, :math:`dw_{ij} = M_{ij} (dnum_i \cdot v_j + dden_i)`, :math:`ds = dw (1 + s)`,
:math:`dq = \tau\, ds\, k`, :math:`dk = \tau\, ds^T q`, :math:`dv = (M w)^T dnum`. Without the norm
dnum = G and dden = 0. A row that sees nothing gives nothing. Through the state: :math:`d\phi(q) = S
\, dnum + zk\, dden` and, with R and rz the gradients of S and zk behind a token, :math:`d\phi(k) =
R v + rz`, :math:`dv = R^T \phi(k)`. Over the later queries of the group, R sums :math:`\phi(q)\,
dnum^T` and rz sums :math:`\phi(q)\, dden`.

S10. **Window layer.** Softmax attention with the scale :math:`1/\sqrt{d}` of its own head width, in
which the query at position p sees the keys p - left .. p, so left + 1 of them (K8). Cached queries
stand at the end (K3). The authors' `window_size` of W is left = W // 2. The gradient is softmax
attention's own, under the same mask.

S11. **Convolution layer.** :math:`[u_1, u_2] = x W_{in}`, then :math:`y = (\mathrm{silu}(c(u_1))
\odot u_2) W_{out}` with c a causal convolution of 3 taps for each channel, zeros in front.

S12. **Pattern.** Of 27 layers, counted from 0, linear attention is in layers 1, 6, 11, 16, 21 and
the window in 2, 7, 12, 17, 22. Of 36, in 1, 6, 11, 16, 21, 27, 33 and 2, 7, 12, 17, 22, 28, 34. All
others are convolutions.

S13. **Prefill and decode.** Prefill is S7, decode S6: constant work a token, whatever the context.

S14. **Heads.** Query head h reads kv head h // group (K7). The state belongs to the kv head.

S15. **Edges.** One token: :math:`o = v\, w / (w + \epsilon)`. No queries give no rows.

S16. **Packing** (ours). Sequences laid end to end start each from an empty state, and have the
gradients of S9 each by itself.

Complexity
----------
Time :math:`O(T D\, dv + T C (d + dv))` a head for chunks of C, memory :math:`O(D\, dv)` beside the
tokens, and :math:`O(D\, dv)` a decoded token.

Paper and code
--------------
- The authors' layers have 16 heads of d = 16; here d is any number. All forms have one scale, by
  default :math:`1/\sqrt d`; a third-party layer that takes 1 in its quadratic form is not followed.
- eps is 1e-12 in the authors' eager code and 1e-6 in their kernels and after a prefill by them; as
  :math:`z \ge 1/2` either is invisible. The default here is 1e-12, added to z.
- The authors' fastest kernel drops the denominator and has an RMS norm of the output in its place.
  That is a different function: `use_norm=False` gives its numerator.
- The authors decode with the state transposed, (dv, D). A third-party form counts a short last
  chunk as a full one in zk; here the state returned is exact.
- The text has windows of 64 and 128, the released configurations `window_size=256`, which is 128
  tokens back and 129 keys. Here `left` says it directly.
- No rotary embedding enters the linear layers, and the decay that the larger configuration lists
  is read by none.
- Ours: the zero rows of S4, S16, and that order 2 is the only one. Order 0 would be the mean of the
  values; with order 1 weights may be negative and z may vanish.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    causal_mask,
    check_array,
    check_attention_inputs,
    check_bool,
    check_shaped,
    repeat_heads,
)
from attnspec.reference.dense.attention import combine
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.based_batches import based_packed, based_packed_backward
from attnspec.reference.linear.based_features import (
    check_eps,
    taylor_features,
    taylor_features_backward,
    taylor_weights,
    taylor_weights_backward,
)
from attnspec.reference.linear.based_layers import (
    gated_convolution,
    sliding_window_attend,
    sliding_window_backward,
)
from attnspec.reference.linear.based_state import (
    based_chunk,
    based_chunk_backward,
    based_decode_step,
    based_read,
    based_state_update,
    divide,
    share_gradient,
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


def based_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-12,
    key_mask: np.ndarray | None = None,
    use_norm: bool = True,
) -> np.ndarray:
    """S1-S4: o (..., heads, q_tokens, dv) by the quadratic form.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), v (..., kv_heads, k_tokens, dv),
    `key_mask` bool (..., k_tokens), True = a real key.

    >>> x, v = np.zeros((1, 2, 1)), np.array([[[2.0], [6.0]]])
    >>> based_attend(x, x, v, causal=True).ravel()
    array([2., 4.])
    """
    _check(q, k, v, causal, eps, use_norm)
    weights = masked_weights(q, k, causal, scale, key_mask)
    num = combine(weights, v)
    return divide(num, np.sum(weights, axis=-1), eps) if use_norm else num


def based_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    do: np.ndarray,
    *,
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-12,
    key_mask: np.ndarray | None = None,
    use_norm: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S9: dq, dk, dv of `based_attend`; do (..., heads, q_tokens, dv).

    >>> x, v = np.zeros((1, 2, 1)), np.array([[[2.0], [6.0]]])
    >>> based_backward(x, x, v, np.ones_like(v), causal=True)[2].ravel()
    array([1.5, 0.5])
    """
    _check(q, k, v, causal, eps, use_norm)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    weights = masked_weights(q, k, causal, scale, key_mask)
    unread = np.all(weights == 0, axis=-2)[..., None]
    keys, values = (
        np.where(unread, np.zeros_like(x), x)
        for x in (repeat_heads(y, q.shape[-3]) for y in (k, v))
    )
    dnum, dden = do, np.zeros_like(do, shape=do.shape[:-1])
    if use_norm:
        den = np.sum(weights, axis=-1)
        dnum, dden = share_gradient(do, divide(weights @ values, den, eps), den, eps)
    dw = dnum @ np.swapaxes(values, -1, -2) + dden[..., None]
    dw = np.where(weights == 0, np.zeros_like(dw), dw)
    dq, dk = taylor_weights_backward(q, keys, dw, scale=scale)
    dv = np.swapaxes(weights, -1, -2) @ dnum
    return dq, sum_groups(dk, k.shape[-3]), sum_groups(dv, k.shape[-3])


def masked_weights(
    q: np.ndarray,
    k: np.ndarray,
    causal: bool,
    scale: float | None,
    key_mask: np.ndarray | None,
) -> np.ndarray:
    """S3: M w (..., heads, q_tokens, k_tokens), 0 wherever a query may not look.

    >>> x = np.zeros((1, 2, 1))
    >>> masked_weights(x, x, True, None, None)
    array([[[1., 0.],
            [1., 1.]]])
    """
    allowed = np.ones((q.shape[-2], k.shape[-2]), bool)
    if causal:
        allowed = causal_mask(q.shape[-2], k.shape[-2])
    if key_mask is not None:
        check_array("key_mask", key_mask, ("k_tokens",), dtype="bool")
        expected = (*k.shape[:-3], k.shape[-2])
        if key_mask.shape != expected:
            raise ValueError(f"key_mask: got shape {key_mask.shape}, expected {expected}")
        allowed = allowed & key_mask[..., None, None, :]
    weights = taylor_weights(q, k, scale=scale)
    return np.where(allowed, weights, np.zeros_like(weights))


def _check(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, eps: float, use_norm: bool
) -> None:
    check_attention_inputs(q, k, v)
    check_bool("causal", causal)
    check_bool("use_norm", use_norm)
    check_eps(eps)


MECHANISM = Mechanism(
    title="Based",
    idea="The Taylor polynomial of exp as a linear recurrence, whose state size is a dial.",
    paper=Paper(
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        authors=(
            "Simran Arora",
            "Sabri Eyuboglu",
            "Michael Zhang",
            "Aman Timalsina",
            "Silas Alberti",
            "Dylan Zinsley",
            "James Zou",
            "Atri Rudra",
            "Christopher Ré",
        ),
        year=2024,
        arxiv="2402.18668",
        venue="ICML 2024",
        code="HazyResearch/based",
    ),
    operations=(
        Operation(
            taylor_features,
            clauses=("S5",),
            gradient=taylor_features_backward,
            differentiable=("x",),
        ),
        Operation(taylor_weights, clauses=("S1", "S2")),
        Operation(
            based_attend,
            clauses=("S1", "S2", "S3", "S4", "S8", "S14", "S15"),
            gradient=based_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(based_state_update, clauses=("S6", "S7", "S8")),
        Operation(based_read, clauses=("S6", "S8", "S14")),
        Operation(
            based_chunk,
            clauses=("S7", "S13", "S14", "S15"),
            gradient=based_chunk_backward,
            differentiable=("q", "k", "v", "S0", "zk0"),
        ),
        Operation(based_decode_step, clauses=("S6", "S13", "S14")),
        Operation(based_packed, ("S16",), based_packed_backward, ("q", "k", "v")),
        Operation(sliding_window_attend, ("S10",), sliding_window_backward, ("q", "k", "v")),
        Operation(gated_convolution, clauses=("S11",)),
    ),
    headline="based_attend",
    coverage=Coverage(
        patterns=PATTERNS,
        phases=PHASES,
        paddings=("none", "left", "right", "packed"),
        heads=HEADS,
        gradient=True,
    ),
)
