r"""S2-Attention: every head reads a recent window and a shard of the earlier context of its own.

A head attends to a window of key blocks and to every v-th block before it; where this stride begins
differs from head to head, so that the heads together cover the context that none of them reads
whole. What a head skips, it skips in blocks of keys, which makes the saving real on a GPU; and a
block that falls out of a head's window and is not in its stride is never read again, so that a
decoder can free it.

Definition
----------
S1. **Blocks.** Queries and keys are cut into blocks of b tokens; I numbers the blocks of queries
and J those of keys, both from the beginning of the text. The kv heads c have patterns, which the
query heads of their group share (K7).

S2. **Stride.** Block J is in the stride of head c if :math:`(J + c\,step + o) \bmod v = 0`, with
step = max(1, v // heads) unless it is given; `heads` counts *query* heads.

S3. **Window.** Block J is local to block I if :math:`I - J < local`: the diagonal block counts.

S4. **Causal pattern.** Head c reads J from I if :math:`J \le I` and J is in its stride or local to
I. The last `num_dense_heads` kv heads are dense: they read every :math:`J \le I`. With `homo_head`
all heads have the pattern of c = 0, and none is dense. Ranks that hold some of the heads take their
slice of the pattern of all of them: a phase comes from a head's number in the whole model.

S5. **Noncausal pattern.** With a window of (left, right) blocks, the current one counted in both,
:math:`l = \max(0, I - J - left + 1)` and :math:`r = \max(0, J - I - right + 1)`, a sparse head
reads J if :math:`(l + r) \bmod v = 0`: all of the window and every v-th block beyond, by distance.
There is no phase, and all sparse heads read the same.

S6. **Tokens.** Query t reads key u if its block reads that of u and, in causal attention,
:math:`u \le t`. Positions count from the start of the text: a chunk of queries or keys gives the
position of its first token (`q_start`, `kv_start`, multiples of b), and the causal order compares
these, not the bottom right corner of K3. Padding hides single keys besides.

S7. **Coverage.** The heads together read every :math:`J \le I` if a head is dense, or if each block
that some row has outside its window is in the stride of a head, and only then; with step 1, v
sparse kv heads do it.

S8. **KV-efficiency.** A pattern is efficient if below the diagonal no column returns from 0 to 1:
with rows of bm queries and columns of bn keys, :math:`P[I, J] \le P[I - 1, J]` for all :math:`I\,
bm \ge (J + 1)\, bn`. A causal pattern of S4 always is; others may make the cache grow, which is no
error.

S9. **Decode.** The query at position t reads the keys of the blocks that row t // b reads. After
it, head c frees block J if it is not in the stride and the query at t + 1 has it outside the
window. A sparse head keeps about :math:`local\, b + t / v` rows. Prefill and decode agree exactly,
since who reads what depends on t and u alone.

S10. **Lists.** A pattern as compressed rows (for queries) or columns (for the gradient of keys).
*Merged* rows serve a tile of bm = m b queries: block J is listed if one of the m rows reads it, and
the first :math:`micro = b\,(1 + \text{last row that does})` queries of the tile use it. That is the
pattern if in each tile the rows that read a block come first, which holds for efficient ones: at
the diagonal the causal order hides the rest. Tiles of queries smaller than b (micro = bm) share a
row; tiles of bn keys, smaller than b, list the parts of a block that are not all in the future.

S11. **Attend.** Softmax attention (K2) over the keys read, with its lse (K5); a row that reads
nothing is 0 (K4). Any pattern is allowed, for query heads, kv heads, or one for all.

S12. **Gradient.** That of dense attention on the pairs read, through the output o and through lse:
:math:`ds = P (do \cdot v - do \cdot o + d\ell)`, with weights P and upstream :math:`do` and
:math:`d\ell`; for keys and values the sum over the heads of a group.

S13. **Merge.** Parts i of the keys, with outputs :math:`o_i` and :math:`\ell_i`: the whole has
:math:`o = \sum_i w_i o_i` with :math:`w = \mathrm{softmax}(\ell)`, and the log-sum-exp of the
:math:`\ell_i` as its lse. A part that saw nothing has no weight.

S2 to S9, what makes or judges a pattern, are in `s2_attention_patterns`; S9, the decoder, and S13
in `s2_attention_decoding`; S10 in `s2_attention_layouts`; S11 and S12 in `s2_attention_blocks`.

Complexity
----------
A row reads at most local + (I + 1) / v blocks of a sparse head, rounded up: close to v times less
than dense attention in a long text, in time, and in the cache of a decoder.

Paper and code
--------------
- The paper argues for any division of the context among heads; the code's ready pattern is that of
  S4, with v = 8, b = 64 and 32 local blocks in its examples (v = 4 and 4 blocks unless given). Here
  the pattern is an array, and S4 one way to make it. The code warns of one that is not efficient,
  and wants the diagonal in a causal one; here a row may read nothing.
- The default step counts query heads, as in the code. With few kv heads the context may not be
  covered: 8 heads on 2 kv heads with v = 8 have two phases. Give `step` then.
- With some dense heads the code takes the first row of the noncausal pattern for all rows. We read
  that as a mistake and use all of it.
- The code builds dense masks of chunks from the top left corner; here `q_start` says where the
  chunk stands. Packed sequences are attended to one by one.
- The models trained with it interleave dense layers; from memory, every second one with b = 64, 16
  local blocks and v = 8 in Phi-3-small, which is not verified.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_attention_inputs, check_integer
from attnspec.reference.patterns.s2_attention_blocks import (
    block_sparse_attend,
    block_sparse_attend_backward,
)
from attnspec.reference.patterns.s2_attention_decoding import decode_step, merge_partitions
from attnspec.reference.patterns.s2_attention_layouts import merge_q, to_csc, to_csr
from attnspec.reference.patterns.s2_attention_patterns import (
    block_pattern,
    check_starts,
    is_kv_efficient,
    live_blocks,
    stride_mask,
    token_mask,
    union_coverage,
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


def s2_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    b: int = 64,
    local: int | tuple[int, int] = 32,
    v_stride: int = 8,
    step: int | None = None,
    offset: int = 0,
    num_dense_heads: int = 0,
    *,
    homo_head: bool = False,
    causal: bool = True,
    scale: float | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S6, S11: the whole mechanism, attention with the ready pattern.

    Arrays and results as in `block_sparse_attend`, the pattern's parameters as in `block_pattern`.

    >>> q, v = np.zeros((2, 4, 1)), np.arange(8.0).reshape(2, 4, 1)
    >>> s2_attend(q, q, v, b=1, local=1, v_stride=2)[0][..., 0]
    array([[0.        , 0.5       , 1.        , 1.66666667],
           [4.        , 5.        , 5.5       , 6.        ]])
    """
    pattern = _pattern(q, k, v, b, local, v_stride, step, offset, num_dense_heads, homo_head,
                       causal, q_start, kv_start)  # fmt: skip
    return block_sparse_attend(
        q, k, v, pattern, b, causal, scale, q_start, kv_start, key_mask=key_mask
    )


def s2_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    b: int = 64,
    local: int | tuple[int, int] = 32,
    v_stride: int = 8,
    step: int | None = None,
    offset: int = 0,
    num_dense_heads: int = 0,
    *,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    homo_head: bool = False,
    causal: bool = True,
    scale: float | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S12: gradients dq, dk, dv of `s2_attend`, shaped as q, k, v.

    >>> one = np.ones((1, 2, 1))
    >>> s2_attend_backward(one, one, one, b=1, local=1, v_stride=2, dout=one)[2].ravel()
    array([1.5, 0.5])
    """
    pattern = _pattern(q, k, v, b, local, v_stride, step, offset, num_dense_heads, homo_head,
                       causal, q_start, kv_start)  # fmt: skip
    return block_sparse_attend_backward(
        q, k, v, pattern, b, dout, dlse, causal, scale, q_start, kv_start, key_mask=key_mask
    )


def _pattern(
    q: Any, k: Any, v: Any, b: Any, local: Any, v_stride: Any, step: Any, offset: Any,
    num_dense_heads: Any, homo_head: bool, causal: bool, q_start: Any, kv_start: Any,
) -> np.ndarray:  # fmt: skip
    """S4, S5: the ready pattern for these tokens."""
    check_attention_inputs(q, k, v)
    check_starts(b, q_start, kv_start)
    check_integer("v_stride", v_stride, least=1)
    return block_pattern(
        -(-q.shape[-2] // b), -(-k.shape[-2] // b), q.shape[-3], k.shape[-3], local, v_stride,
        num_dense_heads, step, offset, homo_head, causal, q_start // b, kv_start // b,
    )  # fmt: skip


MECHANISM = Mechanism(
    title="S2-Attention",
    idea="Each head reads a recent window and its own strided shard of the context, in blocks.",
    paper=Paper(
        title="S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
        authors=("Xihui Lin", "Yunan Zhang", "Suyu Ge", "Liliang Ren", "Barun Patra",
                 "Vishrav Chaudhary", "Hao Peng", "Xia Song"),
        year=2024,
        arxiv="2407.17678",
        code="linxihui/dkernel",
    ),
    operations=(
        Operation(stride_mask, clauses=("S2",)),
        Operation(block_pattern, clauses=("S2", "S3", "S4", "S5")),
        Operation(token_mask, clauses=("S6",)),
        Operation(union_coverage, clauses=("S7",)),
        Operation(is_kv_efficient, clauses=("S8",)),
        Operation(live_blocks, clauses=("S9",)),
        Operation(decode_step, clauses=("S9",)),
        Operation(to_csr, clauses=("S10",)),
        Operation(to_csc, clauses=("S10",)),
        Operation(merge_q, clauses=("S10",)),
        Operation(block_sparse_attend, clauses=("S6", "S11"),
                  gradient=block_sparse_attend_backward, differentiable=("q", "k", "v")),
        Operation(s2_attend, clauses=("S1", "S2", "S3", "S4", "S5", "S6", "S11"),
                  gradient=s2_attend_backward, differentiable=("q", "k", "v")),
        Operation(merge_partitions, clauses=("S13",)),
    ),
    headline="s2_attend",
    coverage=Coverage(
        patterns=PATTERNS,
        phases=PHASES,
        paddings=("none", "left", "right"),
        heads=HEADS,
        gradient=True,
    ),
)  # fmt: skip
