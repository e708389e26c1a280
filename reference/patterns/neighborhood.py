r"""Neighborhood attention: on a grid of one to three axes, every query sees a window of fixed size.

Tokens are pixels, frames or plain positions, and what matters to one lies around it. The window is
centred on the query and pushed inwards at a border instead of being cut, so that all queries see
equally many keys. Dilation spreads it, stride lets neighbouring queries share one, up to attention
in blocks, and each axis may be causal. Cost is linear in the number of tokens.

Definition
----------
S1. **Grid.** Shape :math:`X_1 \times \ldots \times X_n`, n = 1, 2 or 3; tokens are flattened
row-major, the last axis fastest. Each axis has a kernel :math:`k \ge 2`, a stride :math:`1 \le s
\le k`, a dilation :math:`\delta \ge 1` with :math:`k \delta \le X`, and is causal or not. Anything
else is refused; an axis of length 1 is left out. A batch shares one grid, without padding.

S2. **Dilation groups.** Coordinate x of an axis is entry :math:`\lfloor x / \delta \rfloor` of
group :math:`x \bmod \delta`; a query sees its own group only. Groups differ in length by one where
:math:`\delta` does not divide X: :math:`L = \lfloor X / \delta \rfloor + [g < X \bmod \delta]`.

S3. **Window.** Queries i with equal :math:`\lfloor i / s \rfloor` share a leader :math:`c =
\min(s \lfloor i / s \rfloor + \lfloor s / 2 \rfloor, L - 1)`, right of the middle for even s. With
:math:`l = \lfloor k / 2 \rfloor` keys to the left and :math:`r = k - 1 - l` to the right (an even
kernel reaches further left), c is moved into :math:`[l, L - 1 - r]` and the window is :math:`[c -
l, c + r]`: exactly k keys, the query always among them.

S4. **Causal axis.** The leader is the last of its queries, :math:`c = \min(s \lfloor i / s \rfloor
+ s - 1, L - 1)`, and the window is :math:`[\max(c - k + 1, 0), i]`, cut at both ends: at most k
keys, fewer near the start, and fewer for the early queries of a shared window.

S5. **Mask.** A query sees a key if the windows of all axes hold it.

S6. **Attend.** Dense attention under this mask (K2, K7). E additional keys and values, appended
behind those of the grid, are seen by every query. lse comes with the output (K5).

S7. **Gradient.** That of masked attention. A key gathers from the queries whose windows hold it,
which near a border are not those of its own window: with s = :math:`\delta` = 1 and :math:`X \ge
2k` the first key lies in :math:`\lfloor k / 2 \rfloor + 1` windows, the last in :math:`\lceil k / 2
\rceil`, key k - 1 in :math:`k + \lfloor k / 2 \rfloor`, a far interior key in k.

S8. **Unfused form.** Scores (tokens, :math:`\prod k`) in window order: row-major offsets from the
window's start, those behind the end of a causal axis -inf. Softmax over them, then the weighted sum
of the window's values.

S9. **Permutation.** The tokens of the dilation groups laid end to end, residues in row-major order,
each group a grid of its own: attention with dilation is attention without it inside each.

S10. **Merge.** Attentions over disjoint sets of keys: :math:`\sum_i w_i o_i` with :math:`w =
\mathrm{softmax}(\ell)` over their lse, and the lse of all.

S11. **Special cases.** Kernel = length on all axes is dense attention; one causal axis with kernel
= length is causal attention; stride = kernel is attention in blocks, the last block pushed inwards
if the kernel does not divide the length. On one causal axis with stride and dilation 1 a decoder
needs the last k keys only, and on a causal axis of time, of stride 1, the last :math:`k \delta`
frames, whole ones where another axis is not causal. With a larger stride the windows of the last,
incomplete group move as the sequence grows, so L means the final length there.

Complexity
----------
Time :math:`O(N \prod k \, (d + dv))` a head. A fused kernel keeps the lse only; it visits tiles of
keys that cover the windows of a tile of queries, so tiles are boxes of the grid. The unfused form
stores :math:`N \prod k` scores.

Paper and code
--------------
- The papers define odd kernels and stride 1; strides came with a later one, even kernels with the
  library. S3 and S4 are the library's present rules. Before version 0.15 it took kernels that with
  their dilation do not fit an axis; since then, and here, they are refused.
- The paper is about speed: S8 as batched matrix products, on one or two axes, and S6 as one kernel,
  on up to three. Here both are defined on all three.
- The library keeps heads behind the tokens; here they come first (K1). A key head shared by a group
  of query heads (K7) is ours where one of its backends has none.
- Position biases of older versions, (2k - 1) an axis because border queries are not centred, are
  left out, as the library does now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_size,
)
from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns.neighborhood_unfused import (
    na_av,
    na_av_backward,
    na_qk,
    na_qk_backward,
)
from attnspec.reference.patterns.neighborhood_windows import (
    Flags,
    Sizes,
    axis_mask,
    axis_window,
    na_mask,
    token_order,
)
from attnspec.reference.primitives.softmax import merge
from attnspec.reference.spec import HEADS, Coverage, Mechanism, Operation, Paper


def na_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
    extra: int = 0,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S6: output (..., heads, tokens, dv) and lse (..., heads, tokens).

    q (..., heads, tokens, d), k (..., kv_heads, tokens + extra, d), v (..., kv_heads, tokens +
    extra, dv), with the tokens of a grid of `shape`; `kernel`, `stride`, `dilation` and `causal`
    are one value for all axes or one for each. The last `extra` keys are seen by all queries.

    >>> v = np.arange(6.0).reshape(1, 6, 1)
    >>> na_attend(0 * v, 0 * v, v, (6,), 3)[0].ravel()
    array([1., 1., 2., 3., 4., 4.])
    """
    mask = _visible(q, k, v, shape, kernel, stride, dilation, causal, extra)
    return dense.attend(q, k, v, mask=mask, scale=scale)


def na_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    shape: Sequence[int],
    kernel: Sizes,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
    extra: int = 0,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S7: gradients dq, dk, dv of `na_attend`, shaped as q, k, v.

    >>> x = np.zeros((1, 6, 1))
    >>> na_backward(x, x, x, (6,), 2, x + 1)[2].ravel()
    array([1. , 1.5, 1. , 1. , 1. , 0.5])
    """
    mask = _visible(q, k, v, shape, kernel, stride, dilation, causal, extra)
    return dense.attend_backward(q, k, v, dout, dlse, mask=mask, scale=scale)


def token_permute(x: np.ndarray, shape: Sequence[int], dil: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """S9: the tokens of x (..., tokens, d) group after group, and the groups' grid shapes (groups,
    axes), int64.

    >>> token_permute(np.arange(5.0)[:, None], (5,), 2)[0].ravel()
    array([0., 2., 4., 1., 3.])
    """
    order, shapes = token_order(shape, dil)
    check_array("x", x, ("tokens", "d"))
    check_size("x", x.shape[-2], len(order), "tokens, as in shape")
    return x[..., order, :], shapes


def token_unpermute(x: np.ndarray, shape: Sequence[int], dil: Sizes) -> np.ndarray:
    """S9: the tokens of x (..., tokens, d), laid out by `token_permute`, back in their places.

    >>> token_unpermute(np.array([[0.0], [2.0], [4.0], [1.0], [3.0]]), (5,), 2).ravel()
    array([0., 1., 2., 3., 4.])
    """
    order, _ = token_order(shape, dil)
    check_array("x", x, ("tokens", "d"))
    check_size("x", x.shape[-2], len(order), "tokens, as in shape")
    return x[..., np.argsort(order), :]


def merge_attentions(
    outs: Sequence[np.ndarray], lses: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """S10: output (..., dv) and lse (...) over all keys, from those over disjoint sets of keys.

    >>> one, zero = np.array([2.0]), np.array(0.0)
    >>> merge_attentions([one, 2 * one, 3 * one], [zero, zero, zero])[0].round(6)
    array([4.])
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (tuple, list)):
            raise TypeError(f"{name}: got {type(parts).__name__}, expected a list of arrays")
        if not parts:
            raise ValueError(f"{name}: got no parts, expected at least one")
    check_size("lses", len(lses), len(outs), "as many as outs")
    for out, lse in zip(outs, lses, strict=True):
        check_array("outs", out, ("dv",))
        check_array("lses", lse, ())
        if out.shape != outs[0].shape:
            raise ValueError(f"outs: got shape {out.shape}, expected {outs[0].shape}, as the first")
        if lse.shape != out.shape[:-1]:
            raise ValueError(f"lses: got shape {lse.shape}, expected {out.shape[:-1]}, as in outs")
    out, lse = outs[0], lses[0]
    for more in zip(outs[1:], lses[1:], strict=True):
        out, lse = merge(out, lse, *more)
    return out.astype(outs[0].dtype), lse


def _visible(
    q: Any, k: Any, v: Any, shape: Any, kernel: Any, stride: Any, dilation: Any, causal: Any,
    extra: Any,
) -> np.ndarray:  # fmt: skip
    """S5, S6, K14: bool (tokens, tokens + extra) for inputs that fit the grid."""
    check_attention_inputs(q, k, v)
    check_integer("extra", extra, least=0)
    mask = na_mask(shape, kernel, stride=stride, dilation=dilation, causal=causal)
    check_size("q", q.shape[-2], len(mask), "tokens, as in shape")
    check_size("k", k.shape[-2], len(mask) + extra, "tokens of shape, and extra ones")
    return np.concatenate([mask, np.ones((len(mask), extra), bool)], axis=1)


MECHANISM = Mechanism(
    title="Neighborhood attention",
    idea="On a grid, every query sees a window of fixed size, pushed inwards at the borders.",
    paper=Paper(
        title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the "
        "Threadblock Level",
        authors=("Ali Hassani", "Wen-Mei Hwu", "Humphrey Shi"),
        year=2024,
        arxiv="2403.04690",
        venue="NeurIPS 2024",
        code="SHI-Labs/NATTEN",
    ),
    operations=(
        Operation(axis_window, clauses=("S2", "S3", "S4")),
        Operation(axis_mask, clauses=("S2", "S3", "S4")),
        Operation(na_mask, clauses=("S5",)),
        Operation(
            na_attend,
            clauses=("S1", "S2", "S3", "S4", "S5", "S6"),
            gradient=na_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(na_qk, clauses=("S8",), gradient=na_qk_backward, differentiable=("q", "k")),
        Operation(na_av, clauses=("S8",), gradient=na_av_backward, differentiable=("p", "v")),
        Operation(token_permute, clauses=("S9",)),
        Operation(token_unpermute, clauses=("S9",)),
        Operation(merge_attentions, clauses=("S10",)),
    ),
    headline="na_attend",
    coverage=Coverage(patterns=("noncausal self", "causal self"), heads=HEADS, gradient=True),
    stepwise_equals_prefill=False,
)
