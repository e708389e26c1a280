r"""Lightning Attention-2: causal linear attention with a decay per head, tile by tile.

Without a softmax, attention is a running sum: the state holds every key-value product seen, each
head forgets at its own constant rate, and a query reads the state. A block of rows is computed as
a small masked matrix product, and one d by e state is carried from block to block, so time is
linear in the tokens and the work is matrix products. The same split serves the backward pass, with
a second state carried from the end.

Definition
----------
Per query head: q and k of width d, v of width e, slope :math:`s \ge 0`, decay
:math:`\lambda = e^{-s}`. There is no softmax, no scale and no denominator: an activation of q and k
before and a norm of the output behind are the caller's, and training needs them to be stable. In
the authors' layer they are SiLU and one norm over all heads together.

S1. **Left product.** :math:`o_t = \sum_{j \le t} \lambda^{t-j} (q_t \cdot k_j) v_j`: the scores
times the mask :math:`M_{tj} = e^{-s (t-j)}`, which is 0 for :math:`j > t` and 1 on the diagonal.

S2. **Recurrence.** :math:`S_t = \lambda S_{t-1} + k_t v_t^T`, then :math:`o_t = S_t^T q_t`: a token
enters undecayed and before the read. :math:`S_0` is given or zero; the last state is returned.

S3. **Log decays.** In general each step has its own :math:`g_t \le 0` (here :math:`g_t = -s`), and
:math:`G_r = \sum_{i \le r} g_i` is the inclusive sum inside a block of m rows, r = 1..m.

S4. **Blocks.** With S the state entering a block and :math:`D_{rj} = e^{G_r - G_j}` for
:math:`r \ge j`, else 0: :math:`O = (e^G Q) S + (Q K^T \odot D) V`, and the state leaving it is
:math:`e^{G_m} S + (e^{G_m - G} K)^T V`. Every exponent is :math:`\le 0`, so nothing overflows. The
last block may be short; m is then its own number of rows.

S5. **Gradient by token.** With :math:`dS_t` the gradient of :math:`S_t`:
:math:`dS_t = \lambda dS_{t+1} + q_t do_t^T` (the gradient of the returned state is added undecayed
at t = T), :math:`dq_t = S_t do_t`, :math:`dk_t = dS_t v_t`, :math:`dv_t = dS_t^T k_t`, and
:math:`dS_0 = \lambda dS_1`.

S6. **Gradient by block.** A forward sweep recomputes S, and
:math:`dQ = (dO V^T \odot D) K + (e^G dO) S^T`. A sweep from the end carries R, the gradient of the
state leaving the block: :math:`dK = (dO V^T \odot D)^T Q + e^{G_m - G} V R^T`,
:math:`dV = (Q K^T \odot D)^T dO + e^{G_m - G} K R`, then
:math:`R \leftarrow e^{G_m} R + (e^G Q)^T dO`.

S7. **Gradient of the decay.** :math:`dG_t = q_t \cdot dq_t - k_t \cdot dk_t`, plus
:math:`\langle S_T, dS_T \rangle` at t = T for a returned state;
:math:`dg_t = \sum_{t' \ge t} dG_{t'}` over the whole sequence, and :math:`ds = -\sum_t dg_t`.

S8. **Slopes.** For n heads, n a power of two: :math:`s_h = 2^{-8 (h+1) / n}`. Otherwise, with p the
largest power of two below n: the slopes of p heads, then the first n - p of every second slope of
2p heads. Layer l of L uses :math:`s_h (1 - l/(L-1) + 10^{-5})`: low layers forget faster. The
factor of a single layer is :math:`1 + 10^{-5}` (ours: the formula divides by zero).

S9. **No decay** is s = 0.

S10. **Batches.** Packed sequences start each from its own state, and no block crosses a boundary. A
padded token neither writes nor ages the state: its k, v and g count as 0 and its output is 0 (ours;
the authors zero v only, exact with padding on the left, while padding on the right ages the state).

S11. **Decode** is one step of S2.

S12. **Heads.** Query head h reads kv head h // group (K7). Slopes and states belong to query heads;
dk and dv are summed over the group.

S13. **Unequal lengths** (ours). q and k, v are aligned at the end (K3) and the shorter counts as
zero in front: keys before the first query only fill the state, and queries before the first key
see nothing but :math:`S_0`. Without a causal order only s = 0 has a meaning, the product :math:`Q
(K^T V)`, which is no operation here.

Complexity
----------
Time :math:`O(T (d e + B (d + e)))` a head for blocks of B rows, memory :math:`O(T (d + e) + d e)`.

Paper and code
--------------
- The paper decays the query by :math:`\lambda^r`, as here; the authors' kernel uses
  :math:`\lambda^{r-1}` and a state already multiplied by :math:`\lambda`: the same outputs. It may
  take a short last block for a whole one, as it drops the state, which here is returned and exact.
- The companion model paper writes the decay :math:`e^{-(8h/H)(1 - l/L)}`, the authors' code has S8,
  and a third library takes the paper's formula with h from 0, so that one head never decays: three
  different models. `slopes` is S8, and any slopes are accepted.
- Third-party kernels scale q by :math:`1/\sqrt d` unless told otherwise. Here nothing does.
- The authors return no gradient for s, reject d = 16 by mistake and sum slices of heads wider than
  128 in the dtype of the inputs; none of this is followed. Their blocks have 64 rows, in sub-blocks
  of 32 on the way back: the default here is 64, and no result depends on it.
- By "Lightning Attention-1" the authors mean the masked product of S1 in tiles, quadratic in T.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_attention_inputs, check_integer, check_shaped
from attnspec.reference.linear.lightning_attention_2_batches import (
    attend_packed,
    attend_packed_backward,
    attend_padded,
    attend_padded_backward,
)
from attnspec.reference.linear.lightning_attention_2_chunks import (
    backward_chunk,
    chunk_output,
    chunk_states,
    constant_log_decays,
)
from attnspec.reference.linear.lightning_attention_2_tokens import (
    attend_left,
    attend_recurrent,
    backward_left,
    decay_mask,
    decode_step,
)
from attnspec.reference.spec import HEADS, PADDINGS, PHASES, Coverage, Mechanism, Operation, Paper


def slopes(n_heads: int) -> np.ndarray:
    """S8: slopes (n_heads,) of the heads of one layer, float64.

    >>> slopes(2), slopes(3)
    (array([0.0625    , 0.00390625]), array([0.0625    , 0.00390625, 0.25      ]))
    """
    check_integer("n_heads", n_heads, least=1)
    power = 1 << (int(n_heads).bit_length() - 1)
    even = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    if power == n_heads:
        return even
    return np.concatenate([even, slopes(2 * power)[0::2][: n_heads - power]])


def layer_slopes(n_heads: int, layer: int, n_layers: int) -> np.ndarray:
    """S8: slopes (n_heads,) of layer `layer` = 0 .. n_layers - 1.

    >>> layer_slopes(1, 1, 2) == slopes(1) * 1e-5
    array([ True])
    """
    check_integer("n_layers", n_layers, least=1)
    check_integer("layer", layer, least=0)
    if layer >= n_layers:
        raise ValueError(f"layer: got {layer}, expected an integer below {n_layers} (n_layers)")
    return slopes(n_heads) * (1 - layer / max(n_layers - 1, 1) + 1e-5)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: np.ndarray,
    S0: np.ndarray | None = None,
    *,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """S3, S4, S13: o (..., heads, q_tokens, e) and the last state S (..., heads, d, e).

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), v (..., kv_heads, k_tokens, e),
    s (heads,), S0 (..., heads, d, e). The result does not depend on `block`.

    >>> x = np.ones((1, 2, 1))
    >>> o, S = attend(x, x, x, np.array([np.log(2.0)]), block=1)
    >>> o.ravel(), S.ravel()
    (array([1. , 1.5]), array([1.5]))
    """
    check_attention_inputs(q, k, v)
    queries, keys, values = _align(q, k, v)
    g = constant_log_decays(queries, s)
    S_entering, S = chunk_states(keys, values, g, block, S0)
    o = chunk_output(queries, keys, values, g, S_entering, block)
    return o[..., queries.shape[-2] - q.shape[-2] :, :], S


def attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: np.ndarray,
    S0: np.ndarray | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    *,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S6, S7: dq, dk, dv, ds (heads,), dS0 of `attend`; do and dS are shaped as its outputs.

    >>> x = np.ones((1, 2, 1))
    >>> attend_backward(x, x, x, np.zeros(1), None, x)[3]
    array([-1.])
    """
    check_attention_inputs(q, k, v)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    if dS is not None:
        check_shaped("dS", dS, (*q.shape[:-2], q.shape[-1], v.shape[-1]))
    queries, keys, values = _align(q, k, v)
    upstream, _, _ = _align(do, k, v)
    g = constant_log_decays(queries, s)
    dq, dk, dv, dg, dS0 = backward_chunk(queries, keys, values, g, upstream, dS, block, S0)
    ds = -np.sum(dg, axis=(*range(dg.ndim - 2), -1))
    q_from, k_from = (queries.shape[-2] - x.shape[-2] for x in (q, k))
    return dq[..., q_from:, :], dk[..., k_from:, :], dv[..., k_from:, :], ds, dS0


def _align(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """S13: arrays (..., tokens, width) made equally long by zeros in front."""
    T = max(x.shape[-2] for x in arrays)
    missing = [
        np.zeros_like(x, shape=(*x.shape[:-2], T - x.shape[-2], x.shape[-1])) for x in arrays
    ]
    return tuple(np.concatenate(pair, axis=-2) for pair in zip(missing, arrays, strict=True))


MECHANISM = Mechanism(
    title="Lightning Attention-2",
    idea="Decayed linear attention in blocks: masked products inside, one carried state between.",
    paper=Paper(
        title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in "
        "Large Language Models",
        authors=(
            "Zhen Qin",
            "Weigao Sun",
            "Dong Li",
            "Xuyang Shen",
            "Weixuan Sun",
            "Yiran Zhong",
        ),
        year=2024,
        arxiv="2401.04658",
        code="OpenNLPLab/lightning-attention",
    ),
    operations=(
        Operation(slopes, clauses=("S8",)),
        Operation(layer_slopes, clauses=("S8",)),
        Operation(decay_mask, clauses=("S1",)),
        Operation(
            attend_left,
            clauses=("S1", "S9", "S12"),
            gradient=backward_left,
            differentiable=("q", "k", "v"),
        ),
        Operation(attend_recurrent, clauses=("S2", "S9", "S12")),
        Operation(chunk_states, clauses=("S3", "S4", "S12")),
        Operation(chunk_output, clauses=("S3", "S4", "S12")),
        Operation(backward_chunk, clauses=("S5", "S6", "S7", "S12")),
        Operation(
            attend,
            clauses=("S3", "S4", "S9", "S12", "S13"),
            gradient=attend_backward,
            differentiable=("q", "k", "v", "s", "S0"),
        ),
        Operation(
            attend_packed,
            clauses=("S10",),
            gradient=attend_packed_backward,
            differentiable=("q", "k", "v", "s", "S0"),
        ),
        Operation(
            attend_padded,
            clauses=("S10",),
            gradient=attend_padded_backward,
            differentiable=("q", "k", "v", "s", "S0"),
        ),
        Operation(decode_step, clauses=("S11", "S12")),
    ),
    headline="attend",
    coverage=Coverage(
        patterns=("causal self", "causal cross"),
        phases=PHASES,
        paddings=PADDINGS,
        heads=HEADS,
        gradient=True,
    ),
)
