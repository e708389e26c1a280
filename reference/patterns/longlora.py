r"""LongLoRA: attention within groups, half of the heads displaced by half a group, and LoRA.

To teach a model a longer context, fine-tune it with attention inside groups of G tokens; half of
the heads have their groups displaced by half a group, so that from layer to layer information
crosses the borders. The weights are tuned by low-rank adapters, while embeddings and norms, few
numbers as they are, are trained in full, without which the adapters fall short in long texts.
Afterwards the model attends to everything, as it did before.

Definition
----------
q (B, H, T, d), k and v (B, Hk, T, d or dv), of the same T tokens, rotated to their places in the
text *before* anything is grouped or shifted.

S1. **Heads.** :math:`g = \lfloor G/2 \rfloor`. *Query* heads :math:`h < \lfloor H/2 \rfloor` are
plain, the others shifted; kv heads are repeated for their groups first (K7), so that a kv head may
serve both kinds.

S2. **Segments** (the default). The text of a plain head is cut at 0, G, 2G, ...; that of a shifted
head at 0, g, g + G, g + 2G, ..., where a cut at T or beyond is none. Token t sees u if they are in
the same segment and, in causal attention, :math:`u \le t`. That is :math:`\lfloor t / G \rfloor =
\lfloor u / G \rfloor` in a plain head, :math:`\lfloor (t + G - g) / G \rfloor = \lfloor (u + G - g)
/ G \rfloor` in a shifted one. The first segment of a shifted head has g tokens, the last may be
short; T need not be a multiple of G.

S3. **Roll** (the paper's). H and G even, T a multiple of G. A shifted head is rolled: row r holds
token :math:`(r + g) \bmod T`; all heads then have the groups of plain heads, causal *by row*, and
the output is rolled back. With :math:`r(t) = (t - g) \bmod T`, t sees u if :math:`\lfloor r(t) / G
\rfloor = \lfloor r(u) / G \rfloor` and :math:`r(u) \le r(t)`. The last group of rows holds tokens
T - g .. T - 1 and behind them 0 .. g - 1: **the first g tokens see the last g of the text**. All
other rows of causal attention are those of S2; without the order the last group joins both ends of
the text.

S4. **Attend.** Softmax attention (K2) in each segment or group, with its lse (K5), in the order of
the tokens. A text shorter than its first segment has dense attention.

S5. **Lengths.** With padding on the right, cuts count from a sequence's own first token and nothing
reaches beyond its own length; what is padded has output 0 and lse -inf (K4). With S2 only.

S6. **Gradient.** From the output o and its lse :math:`\ell`, with upstream :math:`do` and
:math:`d\ell`: :math:`P = e^{s - \ell}` and :math:`ds = P (do \cdot v - do \cdot o + d\ell)` inside
the segments; then dq, dk and dv as in dense attention, a kv head's being the sum over its query
heads, of either kind.

S7. **Group size.** In pre-training G = T / 4, a whole number that divides T. In supervised
training T / 4 if T is a multiple of 4096, else a fixed 8192.

S8. **Adapters.** For the projections of q, k, v and the output, with W (out, in) frozen,
:math:`y = x W^T + s\, \tilde{x} A^T B^T`, :math:`s = \alpha / r`; A (r, in) starts random
(Kaiming-uniform), B (out, r) at 0; :math:`\tilde{x}` is x after dropout, if there is any. Merged:
:math:`W' = W + s B A`. The authors have r = 8, :math:`\alpha` = 16 and no dropout.

S9. **Their gradient.** With upstream :math:`G_y`: :math:`dB = s\, G_y^T (\tilde{x} A^T)`,
:math:`dA = s\, (G_y B)^T \tilde{x}`, :math:`dx = G_y W + s\, (G_y B) A`, the second term through
the dropout; W has none.

S10. **What else is trained.** All parameters with "embed" or "norm" in their names: the gains of
norms and the embedding of tokens, but no output head unless it is tied to it. Of a norm
:math:`y = w \hat{x}`, :math:`\hat{x} = x / \rho`, :math:`\rho = \sqrt{mean(x^2) + \epsilon}`:
:math:`dw = \sum G_y \hat{x}`, :math:`dx = (w G_y - \hat{x}\, mean(w G_y \hat{x})) / \rho`. Of an
embedding: row n of dE sums the upstream over the positions whose token is n.

S11. **Positions.** Divided by :math:`\lceil T / T_0 \rceil` for a model trained on :math:`T_0`
tokens, or on :math:`T_0 f` if its positions are already divided by f, before the rotation.

The groups of S1 to S3, S5 and S7 are in `longlora_groups`, S6 in `longlora_gradient`, S8 to S11 in
`longlora_tuning`.

Complexity
----------
:math:`T (G + 1) / 2` pairs a plain head, :math:`(T - G)(G + 1) / 2 + g (g + 1)` a shifted one, if G
is even and divides T, instead of :math:`T (T + 1) / 2`: at G = T / 4 a quarter. Training only: with
a cache the groups are not defined.

Paper and code
--------------
- The paper rolls (S3). The authors' code now cuts (S2) on its fast path and rolls on the plain one;
  they gave up the roll for the leak. We cut by default.
- The plain path masks every group by the padding of the first, and repeats that mask in an order
  that mixes the batch; the fast path takes its cuts from the longest sequence, which reach into the
  next. S5 is what they mean; rolled groups have no lengths here.
- The code truncates T / 4; an odd G it rolls by g + 1 and back by g. Both raise an error here.
- The paper has G = T / 4, and T / 2 in an ablation; the 8192 of S7 is the code's alone, in the
  script for supervised training. To the left or to the right, a shift served the authors as well.
- The code for GPT-NeoX has the same groups; its projections are called otherwise (query_key_value
  and dense, where Llama has q_proj, k_proj, v_proj and o_proj).
- The authors train with AdamW, a rate of 2e-5 and 20 steps of warm-up; from memory, and not
  verified, for about 1000 steps with 64 texts in each.
- Attention without the causal order inside a group, an odd number of heads and lse are ours.
- The paper allows grouped attention at inference as well; the code has dense attention there, and
  that is what we recommend.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import repeat_heads
from attnspec.reference.dense.attention import attend
from attnspec.reference.patterns.longlora_gradient import s2_backward
from attnspec.reference.patterns.longlora_groups import (
    check_inputs,
    choose_group_size,
    group_starts,
    real_pairs,
    s2_mask,
    segments,
    shift_heads,
)
from attnspec.reference.patterns.longlora_tuning import (
    embedding_backward,
    interpolate_positions,
    interpolation_factor,
    lora_backward,
    lora_forward,
    lora_merge,
    rmsnorm,
    rmsnorm_backward,
)
from attnspec.reference.spec import HEADS, Coverage, Mechanism, Operation, Paper


def grouped_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    G: int,
    variant: str = "segments",
    lengths: np.ndarray | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S5: output (..., H, T, dv) and lse (..., H, T), in the order of the tokens.

    q (..., H, T, d), k (..., Hk, T, d), v (..., Hk, T, dv); G tokens a group; `variant` "segments"
    or "roll"; `lengths` int (...), the real tokens of each sequence, for segments only. TypeError
    or ValueError if they do not fit one another (K14).

    >>> q, v = np.zeros((2, 4, 1)), np.arange(8.0).reshape(2, 4, 1)
    >>> grouped_attend(q, q, v, 2)[0][..., 0]
    array([[0. , 0.5, 2. , 2.5],
           [4. , 5. , 5.5, 7. ]])
    >>> grouped_attend(q, q, v, 2, "roll")[0][1, :, 0]
    array([5.5, 5. , 5.5, 7. ])
    """
    check_inputs(q, k, v, G, variant, lengths, causal)
    H, T = q.shape[-3:-1]
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    if variant == "roll":
        q, k, v = (shift_heads(x, G, -1) for x in (q, k, v))
    out, lse = np.zeros_like(v), np.full_like(q[..., 0], -np.inf)
    for heads, rows in segments(T, G, H, variant):
        cut = (..., heads, rows, slice(None))
        mask = real_pairs(lengths, rows)
        out[cut], lse[..., heads, rows] = attend(
            q[cut], k[cut], v[cut], causal=causal, mask=mask, scale=scale
        )
    if variant == "roll":
        out, lse = shift_heads(out, G, 1), shift_heads(lse[..., None], G, 1)[..., 0]
    return out, lse


def grouped_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    G: int,
    variant: str = "segments",
    lengths: np.ndarray | None = None,
    causal: bool = True,
    scale: float | None = None,
    *,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S6: gradients dq, dk, dv of `grouped_attend`, shaped as q, k, v.

    >>> one = np.ones((2, 2, 1))
    >>> grouped_attend_backward(one, one, one, 2, dout=one)[2][..., 0]
    array([[1.5, 0.5],
           [1. , 1. ]])
    """
    out, lse = grouped_attend(q, k, v, G, variant, lengths, causal, scale)
    return s2_backward(q, k, v, out, lse, dout, G, variant, lengths, causal, scale, dlse=dlse)


MECHANISM = Mechanism(
    title="LongLoRA",
    idea="Training attends within groups, half of the heads displaced by half a group; low-rank "
    "adapters, embeddings and norms are tuned.",
    paper=Paper(
        title="LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
        authors=("Yukang Chen", "Shengju Qian", "Haotian Tang", "Xin Lai", "Zhijian Liu",
                 "Song Han", "Jiaya Jia"),
        year=2023,
        arxiv="2309.12307",
        venue="ICLR 2024",
        code="dvlab-research/LongLoRA",
    ),
    operations=(
        Operation(choose_group_size, clauses=("S7",)),
        Operation(group_starts, clauses=("S2",)),
        Operation(s2_mask, clauses=("S1", "S2", "S3")),
        Operation(shift_heads, clauses=("S3",)),
        Operation(grouped_attend, clauses=("S1", "S2", "S3", "S4", "S5"),
                  gradient=grouped_attend_backward, differentiable=("q", "k", "v")),
        Operation(lora_forward, clauses=("S8",), gradient=lora_backward,
                  differentiable=("x", "A", "B")),
        Operation(lora_merge, clauses=("S8",)),
        Operation(rmsnorm, clauses=("S10",), gradient=rmsnorm_backward,
                  differentiable=("x", "w")),
        Operation(embedding_backward, clauses=("S10",)),
        Operation(interpolation_factor, clauses=("S11",)),
        Operation(interpolate_positions, clauses=("S11",)),
    ),
    headline="grouped_attend",
    coverage=Coverage(
        patterns=("noncausal self", "causal self"),
        paddings=("none", "right"),
        heads=HEADS,
        gradient=True,
    ),
)  # fmt: skip
