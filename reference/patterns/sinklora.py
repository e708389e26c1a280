r"""SinkLoRA: groups with global sink tokens for training, H2O's small cache for inference.

LongLoRA displaces half of its heads by half a group. SinkLoRA puts a share of these back to their
places, and makes the first few tokens of the text global: every later token sees them, so that no
group is without the tokens on which a decoder rests its attention (SF-Attn). At inference the
cache is cut to the most recent tokens and those that have received the most attention (H2O).

Definition
----------
*Training.* q (B, H, T, d), k and v (B, Hk, T, d or dv), of the same T tokens, rotated to their
places in the text. G tokens a group, :math:`g = \lfloor G/2 \rfloor`, s sink tokens.

S1. **Heads.** The first :math:`\lfloor H/2 \rfloor` *query* heads are plain. Of the :math:`H_2 =
H - \lfloor H/2 \rfloor` others the first :math:`\lceil \rho H_2 \rceil` are returned and plain as
well, the rest are shifted: of 32 heads with :math:`\rho = 1/2`, heads 24 to 31. Before it is
rounded up, :math:`\rho H_2` is lowered by 1e-9, so that a product like 7.000000000000001 counts as
7. kv heads are repeated for their groups first (K7).

S2. **Groups.** Plain: t and u are together if :math:`\lfloor t/G \rfloor = \lfloor u/G \rfloor`;
shifted: if :math:`\lfloor (t-g)/G \rfloor = \lfloor (u-g)/G \rfloor`. T need not be a multiple of
G. Call this :math:`A_h[t,u]`.

S3. **Roll** (`wrap`). G even, T a multiple of G. Shifted heads are rolled by g before attention and
back by g after it; the others never are. (To roll on one side only is the worst of the paper's
variants.) Their groups are those of plain heads, causal *by row*, so that the first g tokens see
the last g of the text: :math:`R_h[t,u]`, as in LongLoRA.

S4. **Global tokens.** All tokens see the first s, which see all tokens: with the causal order last,
:math:`M_h[t,u] = (A_h[t,u] \lor u < s \lor t < s) \land u \le t`. Rolled: :math:`M_h[t,u] =
R_h[t,u] \lor ((u < s \lor t < s) \land u \le t)`. Without causal order its conditions are left
out.

S5. **Attend.** One softmax (K2) over the union: a sink in the token's own group counts once. The
merge, by lse (K5), of the attention to the sinks and of that to the rest of the group is the same.

S6. **Gradient.** That of dense attention with the mask M; a sink collects from all later tokens.

S7. **What is trained.** As in `longlora`: adapters (rank 8), embeddings and norms. Three epochs in
bfloat16, one text a step, at a learning rate of 2e-5 after 20 steps of warming up. Inference is
dense, or with the cache below.

*Inference.* One sequence. w tokens come in a call and see n rows, their own included; hh heavy and
rec recent rows are kept, C = hh + rec.

S8. **Accumulate.** P (1, H, w, n) are the call's weights. Their sum over the queries, and over the
query heads of a kv head, is added to the scores a of the rows that were there, and is the score of
the new ones.

S9. **Keep.** All rows if :math:`n \le C`. Else in each kv head the hh highest scores among rows
[0, n - rec) (K6), in their order, and rows [n - rec, n).

S10. **Step.** Attention first (K3), to up to C rows and the new ones; then S8; then S9, by which k,
v, a and the positions are gathered alike. A decoded token sees up to C + 1 rows; in the terms of K8
hh = 0 is a window of rec + 1. A prompt of any length in one call is dense and causal, and
is cut once, afterwards: results depend on how a text is divided into calls.

S11. **Positions.** Those of the text, or with a `rope_base` those of the cache (K13): rows are kept
unrotated, row j is rotated to j and query i to n - w + i.

S12. **As a mask.** The same policy without moving rows: dropped rows stay, are hidden from the next
call on, and their scores are set to 0. Only rows not dropped before may be kept.

S13. **Local simulation.** On the scores of a whole prompt, with each row's softmax over all causal
keys. Queries t < hh have columns [0, hh). From there on, :math:`a = \sum_{t < hh} P_t`; at each t
the hh - 1 highest a among what the query before had, and t itself, are kept; then :math:`P_t` is
added to a, and a is 0 outside what is kept. With hh = 0 there is nothing. In use: S13 or
:math:`t - u \le rec`, then causal.

S14. **Global simulation.** Columns of the causal P are summed over *all* queries; every query has
the hh highest and :math:`|t - u| \le rec`, then causal.

S15. **Budgets.** As ratios of a prompt's length, rounded down.

S1 to S4 are in `sinklora_heads`, S8 to S12 and S15 in `sinklora_h2o`, S13 and S14 in
`sinklora_prompt`.

Complexity
----------
At most :math:`T (G + s)` pairs a head in training. At inference C rows of memory, and
:math:`O(C (d + dv))` time a token and head.

Paper and code
--------------
- The paper describes SF-Attn in words and a figure, and the authors' code holds LongLoRA's roll
  alone. The split of the second half, :math:`\rho = 1/2` and the head order of S1 are our reading,
  **unverified**.
- The paper adds new global tokens to the graph; here the first 4 of the text serve. That they see
  all tokens contradicts a decoder, hence the causal order last.
- We cut by default instead of rolling, for the roll's leak (S3).
- The paper states O(n log n); with G = T / 4 it is T G + s T.
- The paper does not say which form of H2O it uses. H2O's own code has all of S8 to S10, S12, S13
  and S14; only the first saves memory. S14 looks ahead and is no policy for a decoder.
- Ties, grouped heads in S8 and that S13 never returns to a dropped token when weights vanish are
  ours. Defaults are those of H2O's cache class: hh = 4, rec = 512.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_attention_inputs, check_size
from attnspec.reference.dense.attention import attend, attend_backward
from attnspec.reference.patterns.sinklora_h2o import (
    h2o_accumulate,
    h2o_budgets,
    h2o_keep,
    h2o_mask_step,
    h2o_step,
)
from attnspec.reference.patterns.sinklora_heads import (
    check_pattern,
    segment_and_reassemble,
    sf_head_kind,
    sf_mask,
)
from attnspec.reference.patterns.sinklora_prompt import h2o_global_mask, h2o_local_mask
from attnspec.reference.spec import HEADS, PHASES, Coverage, Mechanism, Operation, Paper


def sf_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    G: int,
    s: int = 4,
    rho: float = 0.5,
    wrap: bool = False,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S5: output (..., H, T, dv) and lse (..., H, T), in the order of the tokens.

    q (..., H, T, d), k (..., Hk, T, d), v (..., Hk, T, dv); G tokens a group, s sinks, `rho` the
    share of shifted heads that is returned. TypeError or ValueError if they do not fit (K14).

    >>> q, v = np.zeros((2, 4, 1)), np.arange(8.0).reshape(2, 4, 1)
    >>> sf_attend(q, q, v, 2, s=1, rho=0.0)[0][..., 0].round(2)
    array([[0.  , 0.5 , 1.  , 1.67],
           [4.  , 4.5 , 5.  , 5.5 ]])
    """
    mask = _check_inputs(q, k, v, G, s, rho, wrap, causal)
    return attend(q, k, v, mask=mask, scale=scale)


def sf_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    G: int,
    s: int = 4,
    rho: float = 0.5,
    wrap: bool = False,
    causal: bool = True,
    scale: float | None = None,
    *,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S6: gradients dq, dk, dv of `sf_attend`, shaped as q, k, v.

    >>> one = np.ones((1, 3, 1))
    >>> sf_attend_backward(one, one, one, 1, s=1, dout=one)[2][..., 0]
    array([[2. , 0.5, 0.5]])
    """
    mask = _check_inputs(q, k, v, G, s, rho, wrap, causal)
    return attend_backward(q, k, v, dout, dlse, mask=mask, scale=scale)


def _check_inputs(
    q: Any, k: Any, v: Any, G: Any, s: Any, rho: Any, wrap: Any, causal: Any
) -> np.ndarray:
    """The mask, after K14: one text's q, k and v, and a pattern that fits it."""
    check_attention_inputs(q, k, v)
    H, T = q.shape[-3:-1]
    check_size("k", k.shape[-2], T, "tokens, as in q: there is no cache in training")
    check_pattern(T, G, s, rho, wrap, causal)
    return sf_mask(T, G, H, s, rho, wrap, causal)


MECHANISM = Mechanism(
    title="SinkLoRA",
    idea="Training attends within groups, some heads displaced, and to a few global sink tokens; "
    "inference keeps recent tokens and heavy hitters.",
    paper=Paper(
        title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language "
        "Models",
        authors=("Hengyu Zhang",),
        year=2024,
        arxiv="2406.05678",
        code="Dexter-GT-86/SinkLoRA",
    ),
    operations=(
        Operation(sf_head_kind, clauses=("S1",)),
        Operation(sf_mask, clauses=("S2", "S3", "S4")),
        Operation(segment_and_reassemble, clauses=("S3",)),
        Operation(sf_attend, clauses=("S1", "S2", "S3", "S4", "S5"), gradient=sf_attend_backward,
                  differentiable=("q", "k", "v")),
        Operation(h2o_accumulate, clauses=("S8",)),
        Operation(h2o_keep, clauses=("S9",)),
        Operation(h2o_step, clauses=("S8", "S9", "S10", "S11")),
        Operation(h2o_mask_step, clauses=("S12",)),
        Operation(h2o_local_mask, clauses=("S13",)),
        Operation(h2o_global_mask, clauses=("S14",)),
        Operation(h2o_budgets, clauses=("S15",)),
    ),
    headline="sf_attend",
    coverage=Coverage(
        patterns=("noncausal self", "causal self"),
        phases=PHASES,
        heads=HEADS,
        gradient=True,
    ),
    stepwise_equals_prefill=False,
)  # fmt: skip
