r"""MASFormer: full attention in a few layers, and in all the others only in short spans.

Dependencies over a long distance need full attention, but not at every layer. A trained decoder is
converted by nothing but its masks: l of its L layers keep full attention, the others see their own
block of tokens, or a window, and training goes on with long texts. Short layers still carry what a
full layer has fetched, because they are stacked on it.

Definition
----------
q (B, H, T, d), k and v (B, Hk, T, d or dv) of one layer, :math:`blk(t) = \lfloor t / b \rfloor`.

S1. **Schedule.** Of L layers, counted from the bottom, l are full: the first l ("bottom"), the last
l ("top"), layers :math:`\lfloor i L / l \rfloor` for i < l ("every"), or those of a list.

S2. **Full layer.** Token t sees every :math:`u \le t`.

S3. **Block layer.** Token t sees :math:`u \le t` if :math:`0 \le blk(t) - blk(u) \le n`: its own
block and the n before it, n = 0 by default. The last block may be short. Without causal order
:math:`|blk(t) - blk(u)| \le n`.

S4. **Window layer.** Token t sees :math:`u \le t` if :math:`t - u \le w`: at most w + 1 keys, so
that in the terms of K8 the window is w + 1. Without causal order :math:`|t - u| \le w`.

S5. **Attend.** Softmax over the visible keys. The scale is :math:`1 / \sqrt d` (K2), but 1 for
weights of GPT-Neo, which were trained without any and with scores in float32. Every row sees at
least itself.

S6. **Padding.** On the right only, by lengths: what is padded is seen by none, has output 0 and
lse -inf (K4). Blocks count from the first token; padding on the left would move their borders, and
is not defined.

S7. **Heads.** Grouped heads (K7) are repeated. Spans differ from layer to layer, never by head.

S8. **Positions** are encoded before, if at all: attention as such is equivariant under moves by
whole blocks, or, away from the start, of windows by any distance. GPT-Neo learned a vector for each
of 2048 positions; longer texts need new ones.

S9. **Decode.** The query at position t reads its own row and those before it that its span holds:
t + 1 rows in a full layer, :math:`\min(t, t \bmod b + n b) + 1` in a block layer,
:math:`\min(t, w) + 1` in a window layer. A step leaves in the cache as many. With n = 0 the first
token of a block therefore reads nothing but itself.

S10. **Chunks.** New tokens may come in chunks that begin and end anywhere: borders are those of
absolute positions (K13). Prefill, chunks and single steps agree.

S11. **Reach.** Through a stack with masks :math:`M_0` (bottom) to :math:`M_{L-1}`, token t depends
on token u iff :math:`(M_{L-1} \cdots M_0)_{tu}`, a product of booleans. One full layer anywhere
makes it all of :math:`u \le t`. With blocks alone, n = 0, it stays inside the block at any depth.

S12. **Cost** in pairs of a causal layer: full :math:`T (T + 1) / 2`; blocks, with
:math:`r = T \bmod b`, :math:`(T - r)(b + 1) / 2 + r (r + 1) / 2`; windows, with w at most T - 1,
:math:`(w + 1) T - w (w + 1) / 2`. Relative to full attention throughout, with b a divisor of T:
:math:`l / L + (1 - l / L)(b + 1) / (T + 1)`.

S13. **Gradient.** That of S5 over the visible pairs. Keys of a block layer with n = 0 have
gradients from their own block only.

S14. **Training.** The schedule replaces the masks of a trained model; pre-training goes on with
texts of the new length (the Pile, 8192 tokens), then the model is tuned for its task: articles to
continue, meetings and reports to summarise. The paper compares l full layers with all layers full,
all of blocks and all of windows.

S1, the masks, S11 and S12 are in `masformer_spans`, S9 and S10 in `masformer_decoding`, S13 in
`masformer_gradient`.

Complexity
----------
:math:`O(T b (n + 1) (d + dv))` time for a block layer instead of :math:`O(T^2 (d + dv))`, and
:math:`b (n + 1)` rows of cache instead of T. By S12, 4 full layers of 24 with b = 1024 score
0.271 of the pairs of 8192 tokens, 8 of them 0.417: the paper saves up to 75 %.

Paper and code
--------------
The authors published no code, so that every choice is a parameter. The paper's figure shows blocks
and windows (b = 3, w = 1) mixed with full attention. That blocks see no neighbours (n = 0), and a
default of b = 1024 in texts of 8192 tokens, are our reading, and unverified; so are "top", "every"
and the data of S14. Full layers at the bottom, 4 to 8 of 24, are what others report of it.
Attention without causal order, padding, lse and the cache are ours.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.patterns.masformer_decoding import decode_step
from attnspec.reference.patterns.masformer_gradient import (
    block_attend_backward,
    layer_attend_backward,
    window_attend_backward,
)
from attnspec.reference.patterns.masformer_spans import (
    Span,
    block_mask,
    cache_rows_needed,
    check_sizes,
    check_span,
    layer_spans,
    reachability,
    relative_cost,
    span_mask,
    window_mask,
)
from attnspec.reference.patterns.masformer_tiles import attend_tiles
from attnspec.reference.spec import PHASES, Coverage, Mechanism, Operation, Paper


def block_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    b: int,
    n: int = 0,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S3, S5-S7: output (..., H, T, dv) and lse (..., H, T) of a block layer.

    q (..., H, T, d), k (..., Hk, T, d), v (..., Hk, T, dv); blocks of `b` tokens, `n` earlier ones
    visible, and `n` later ones if not `causal`; `lengths` int (...), the real tokens of each
    sequence. TypeError or ValueError if they do not fit one another (K14).

    >>> q, v = np.zeros((1, 4, 1)), np.arange(4.0).reshape(1, 4, 1)
    >>> block_attend(q, q, v, 2)[0].ravel(), block_attend(q, q, v, 2, causal=False)[0].ravel()
    (array([0. , 0.5, 2. , 2.5]), array([0.5, 0.5, 2.5, 2.5]))
    """
    check_sizes(("block", b, n))
    return attend_tiles(q, k, v, ("block", b, n), causal, scale, lengths)


def window_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    w: int,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S4-S7: output (..., H, T, dv) and lse (..., H, T) of a window layer, arguments as in blocks.

    >>> q, v = np.zeros((1, 4, 1)), np.arange(4.0).reshape(1, 4, 1)
    >>> window_attend(q, q, v, 1)[0].ravel()
    array([0. , 0.5, 1.5, 2.5])
    """
    check_sizes(("window", w))
    return attend_tiles(q, k, v, ("window", w), causal, scale, lengths)


def layer_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    span: Span,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S2-S7: output (..., H, T, dv) and lse (..., H, T) of a layer with any span.

    `span` is ``("full",)``, ``("block", b, n)`` or ``("window", w)``; the rest is as in blocks.

    >>> q, v = np.zeros((1, 4, 1)), np.arange(4.0).reshape(1, 4, 1)
    >>> layer_attend(q, q, v, ("full",))[0].ravel()
    array([0. , 0.5, 1. , 1.5])
    """
    check_span(span)
    if span[0] == "block":
        return block_attend(q, k, v, span[1], span[2], causal, scale, lengths=lengths)
    if span[0] == "window":
        return window_attend(q, k, v, span[1], causal, scale, lengths=lengths)
    return attend_tiles(q, k, v, span, causal, scale, lengths)


MECHANISM = Mechanism(
    title="MASFormer",
    idea="A few layers attend to everything, the others to a block or a window of tokens.",
    paper=Paper(
        title="Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at "
        "Every Layer",
        authors=("Qingru Zhang", "Dhananjay Ram", "Cole Hawkins", "Sheng Zha", "Tuo Zhao"),
        year=2023,
        arxiv="2310.12442",
        venue="Findings of EMNLP 2023",
    ),
    operations=(
        Operation(layer_spans, clauses=("S1",)),
        Operation(span_mask, clauses=("S2", "S3", "S4")),
        Operation(block_mask, clauses=("S3", "S6")),
        Operation(window_mask, clauses=("S4",)),
        Operation(block_attend, clauses=("S3", "S5", "S6", "S7"),
                  gradient=block_attend_backward, differentiable=("q", "k", "v")),
        Operation(window_attend, clauses=("S4", "S5", "S6", "S7"),
                  gradient=window_attend_backward, differentiable=("q", "k", "v")),
        Operation(layer_attend, clauses=("S2", "S3", "S4", "S5", "S6", "S7"),
                  gradient=layer_attend_backward, differentiable=("q", "k", "v")),
        Operation(decode_step, clauses=("S9", "S10")),
        Operation(cache_rows_needed, clauses=("S9",)),
        Operation(reachability, clauses=("S11",)),
        Operation(relative_cost, clauses=("S12",)),
    ),
    headline="layer_attend",
    coverage=Coverage(
        patterns=("noncausal self", "causal self"),
        phases=PHASES,
        paddings=("none", "right"),
        gradient=True,
    ),
)  # fmt: skip
