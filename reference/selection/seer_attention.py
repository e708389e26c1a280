r"""SeerAttention: a small learned gate says which blocks of the attention map matter.

Queries and keys are pooled over blocks of tokens, projected, rotated to the position of their block
and compared: a tiny attention of one score for each pair of blocks. A threshold or a ratio turns
the scores into a block mask, and attention is computed inside the mask only. The gate learns from
the model itself, which reports the largest weight it gives inside each pair of blocks.

Definition
----------
b tokens a block, :math:`nb = \lceil T/b \rceil`, gate width dg; R counts blocks of queries and C
blocks of keys. q and k enter the gate before their rotary positions, and the attention after.

S1. **Pool.** Each block of q and of k is reduced along its tokens by max, min or avg, any choice of
them for q and another for k, concatenated along channels in the order of the gate type's name
("Qavg_Kmaxminavg"). A ragged last block pools over the tokens it has.

S2. **Project.** :math:`gq = pool(q) W_q`, :math:`gk = pool(k) W_k` with matrices of each head and
no bias. Without :math:`W_q` (one pooling of q, and dg = d) gq is the pooled query, and
:math:`W_k` belongs to query heads, the pooled keys being repeated before it. With :math:`W_q`,
:math:`W_k` belongs to kv heads, and gk is repeated after S3 (K7).

S3. **Rotate.** gq and gk of block n by the rotary angles (half-split) of position n b, with
frequencies :math:`base^{-2j/dg}`.

S4. **Score.** :math:`G_{RC} = gq_R \cdot gk_C / \sqrt{dg}`, and :math:`-10^9` for C > R.

S5. **Threshold.** :math:`M = softmax(G) > \tau`, strictly. A row may select nothing if
:math:`nb \ge 1/\tau`.

S6. **Ratio.** The k best of G in each row (K6), the same
:math:`k = \max(1, \lfloor (1 - \sqrt{1 - \rho})\, nb \rfloor)` in all: about a share
:math:`\rho` of the causal triangle stays, as rows at the top have fewer than k.

S7. **Finish.** With `last_dense` the last two block rows are all true; then blocks C > R are
dropped. The diagonal is not forced, unless `force_diagonal` (ours) asks for it. With S6 or
`last_dense` a row's selection depends on nb, hence on T.

S8. **Attend.** Token i of block R sees :math:`j \le i` with :math:`M_{R, j/b}`: dense attention
otherwise; a row without a key gives 0 (K4; the authors' kernel gives NaN). Masks belong to query
heads. Its gradient is that of dense attention with M constant.

S9. **Ground truth.** With P the full causal attention, :math:`A_{RC} = \max P_{ij}` over i in R
and j in C, and :math:`GT = A / \sum_C A`.

S10. **Loss.** Block rows R < nb // 4 are dropped; the loss of a layer is the mean over all
remaining elements of :math:`GT (\log GT - \log softmax(G))`, with 0 log 0 = 0. (The authors sum it
over layers and multiply by 10.) :math:`dG = (softmax(G) \sum_C GT - GT) / size` reaches
:math:`W_q` and :math:`W_k` only.

S11. **Decode: query.** The heads of a kv group take the place of the block: "Qproj" projects each
by its own matrix and adds, "Qavg" averages them, "Qavgproj" averages and projects, "Qorig" keeps
each. Then an optional RMS norm (eps :math:`10^{-6}`) and the rotation to the token's position.

S12. **Decode: keys.** A block of keys is pooled, projected, normed and rotated to its start when
its b-th token arrives; until then it counts as gk = 0.

S13. **Decode: scores** of S4, one for each kv head and block, those of "Qorig" averaged over the
group; nothing is masked.

S14. **Decode: select.** By S5, or the budget / b best blocks (K6, K9). The last block, complete or
not, is always in, on top of the budget. The whole kv group attends to the same blocks.

S15. **Decode: step.** The new token's key is appended first, then S11 to S14 with all tokens seen.

S16. **Decode: ground truth.** The largest weight of a query row in each block of keys, then the
largest over the heads of the group, divided by the row's sum plus :math:`10^{-9}`.

Complexity
----------
Gate :math:`O(T d + nb^2 dg)`, attention :math:`O(density \cdot T^2 d)`, a head.

Paper and code
--------------
The first version of the paper describes another regression loss (unverified); S10 is what the
authors' code does. The code leaves :math:`W_q` out wherever S2 allows it, unless it is told not to;
here a missing `Wq` says so. Its kernels take blocks of 32, 64 or 128 tokens (16, 32 or 64 at
decode) and know a gate that is not causal, which no model uses and which is not here. The order of
norm and rotation in S11 and S12, the zero of an incomplete block and the always selected last block
are our reading of the decode code, without outside evidence. Defaults are those of the authors'
training script and documents: b = 64, dg = 128, "Qavg_Kmaxminavg", :math:`\tau = 0.002` (0.0005 to
0.005 are in use), `last_dense`, a budget of 4096; their class itself has "Qavg_Kmaxmin" and
:math:`\tau = 0`. "Qproj" with max, min and avg keys at decode is our choice. The decode variant has
a paper of its own, SeerAttention-R, arXiv 2506.08889.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_size,
)
from attnspec.reference.dense import attention as dense
from attnspec.reference.primitives.rope import rope
from attnspec.reference.selection.seer_attention_decode import (
    compress_step,
    decode_attend,
    decode_gate,
    decode_select,
    step,
)
from attnspec.reference.selection.seer_attention_gate import (
    gate_rope,
    gate_scores,
    gate_scores_backward,
    pool_blocks,
)
from attnspec.reference.selection.seer_attention_selection import (
    ratio_to_k,
    select_blocks,
    select_ratio,
    select_threshold,
)
from attnspec.reference.selection.seer_attention_training import (
    attend_with_block_max,
    decode_target,
    distill_loss,
    distill_loss_backward,
    normalise_gt,
)
from attnspec.reference.spec import HEADS, Coverage, Mechanism, Operation, Paper


def block_sparse_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    M: np.ndarray,
    b: int,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S8: out (..., heads, T, dv) and lse (..., heads, T), causal and inside the block mask.

    q (..., heads, T, d) and k (..., kv_heads, T, d), both rotated, v (..., kv_heads, T, dv); M bool
    (..., heads, ceil(T/b), ceil(T/b)).

    >>> q, v = np.zeros((1, 3, 2)), np.array([[[1.0], [3.0], [5.0]]])
    >>> M = np.array([[[True, False], [False, True]]])
    >>> block_sparse_attend(q, q, v, M, 2)[0].ravel()
    array([1., 2., 5.])
    """
    return dense.attend(q, k, v, causal=True, mask=_token_mask(q, k, v, M, b), scale=scale)


def block_sparse_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    M: np.ndarray,
    b: int,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S8: dq, dk, dv of `block_sparse_attend`, M being constant.

    >>> q, M = np.zeros((1, 2, 1)), np.ones((1, 1, 1), dtype=bool)
    >>> block_sparse_attend_backward(q, q, q, M, 2, np.ones((1, 2, 1)))[2].ravel()
    array([1.5, 0.5])
    """
    mask = _token_mask(q, k, v, M, b)
    return dense.attend_backward(q, k, v, dout, dlse, causal=True, mask=mask, scale=scale)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    Wq: np.ndarray | None,
    Wk: np.ndarray,
    *,
    b: int = 64,
    q_kinds: Sequence[str] = ("avg",),
    k_kinds: Sequence[str] = ("max", "min", "avg"),
    base: float = 10000.0,
    tau: float | None = None,
    rho: float | None = None,
    last_dense: bool = True,
    force_diagonal: bool = False,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S1-S8: out (..., heads, T, dv), lse (..., heads, T) and the mask M (..., heads, nb, nb).

    q (..., heads, T, d) and k (..., kv_heads, T, d) before their rotation, v (..., kv_heads, T,
    dv); the keywords are those of `select_blocks`.

    >>> x = np.ones((1, 3, 2))
    >>> attend(x, x, x, None, np.eye(2)[None], b=2, k_kinds=("avg",))[0][0, 2]
    array([1., 1.])
    """
    check_attention_inputs(q, k, v)
    M = select_blocks(
        q,
        k,
        Wq,
        Wk,
        b=b,
        q_kinds=q_kinds,
        k_kinds=k_kinds,
        base=base,
        tau=tau,
        rho=rho,
        last_dense=last_dense,
        force_diagonal=force_diagonal,
    )
    positions = np.arange(q.shape[-2])
    rotated_q, rotated_k = rope(q, positions, base), rope(k, positions, base)
    out, lse = block_sparse_attend(rotated_q, rotated_k, v, M, b, scale=scale)
    return out, lse, M


def _token_mask(q: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray, b: int) -> np.ndarray:
    """S8: M (..., heads, nb, nb) spread over tokens (..., heads, T, T), once the arguments fit."""
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_integer("b", b, least=1)
    check_array("M", M, ("heads", "nb", "nb"), dtype="bool")
    T = q.shape[-2]
    nb = -(-T // b)
    if M.shape != (*q.shape[:-2], nb, nb):
        raise ValueError(f"M: got shape {M.shape}, expected {(*q.shape[:-2], nb, nb)}")
    return np.repeat(np.repeat(M, b, axis=-2), b, axis=-1)[..., :T, :T]


MECHANISM = Mechanism(
    title="SeerAttention",
    idea="A learned gate scores pairs of blocks; attention is computed in the selected ones only.",
    paper=Paper(
        title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
        authors=(
            "Yizhao Gao",
            "Zhichen Zeng",
            "Dayou Du",
            "Shijie Cao",
            "Peiyuan Zhou",
            "Jiaxing Qi",
            "Junjie Lai",
            "Hayden Kwok-Hay So",
            "Ting Cao",
            "Fan Yang",
            "Mao Yang",
        ),
        year=2024,
        arxiv="2410.13276",
        venue="NeurIPS 2025",
        code="microsoft/SeerAttention",
    ),
    operations=(
        Operation(pool_blocks, clauses=("S1",)),
        Operation(gate_rope, clauses=("S3",)),
        Operation(
            gate_scores,
            clauses=("S2", "S3", "S4"),
            gradient=gate_scores_backward,
            differentiable=("Wq", "Wk"),
        ),
        Operation(select_threshold, clauses=("S5", "S7")),
        Operation(ratio_to_k, clauses=("S6",)),
        Operation(select_ratio, clauses=("S6", "S7")),
        Operation(select_blocks, clauses=("S1", "S2", "S3", "S4", "S5", "S6", "S7")),
        Operation(
            block_sparse_attend,
            clauses=("S8",),
            gradient=block_sparse_attend_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(attend, clauses=("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8")),
        Operation(attend_with_block_max, clauses=("S9",)),
        Operation(normalise_gt, clauses=("S9",)),
        Operation(
            distill_loss,
            clauses=("S10",),
            gradient=distill_loss_backward,
            differentiable=("G",),
        ),
        Operation(compress_step, clauses=("S12",)),
        Operation(decode_gate, clauses=("S11", "S13")),
        Operation(decode_select, clauses=("S14",)),
        Operation(decode_attend, clauses=("S14",)),
        Operation(step, clauses=("S15",)),
        Operation(decode_target, clauses=("S16",)),
    ),
    headline="attend",
    coverage=Coverage(
        patterns=("causal self",), phases=("prefill", "step by step"), heads=HEADS, gradient=True
    ),
    stepwise_equals_prefill=False,
)
