r"""DiffQKV attention: queries, keys and values each have head counts and widths of their own.

Grouped-query attention shrinks keys and values alike, but a model suffers less from fewer and
narrower keys than from fewer values. So keys are compressed most and values lightly, and a wider
query, which costs no cache, makes up for it. At decode a query needs the values of its heaviest
keys only, and the others are not read.

Definition
----------
S1. **Head maps.** q has Hq heads, k has Hk of width d, v has Hv of width dv; Hk and Hv divide Hq,
but need not divide one another. Query head h reads key head :math:`h // (Hq / Hk)` and value head
:math:`h // (Hq / Hv)`, two maps of which neither follows from the other (K7). As a rule Hk <= Hv
and d <= dv. Hk = Hv is grouped attention, and if they are Hq, multi-head attention.

S2. **Contract the query.** A query wider than the keys is brought to their width by a learned map
of its head: :math:`qe = q E_h`. Then :math:`(q E) \cdot k = q \cdot (E k)`, so this is the most
general bilinear score, and the cache stays narrow. Rotary positions act on qe and k, afterwards.

S3. **Score.** :math:`s_{hij} = qe_{hi} \cdot k_{hk(h), j} / \sqrt{d}`, d the width of the *keys*
(K2), not that of the query before S2, of the values, or of heads padded for a kernel.

S4. **Weigh.** :math:`P = \mathrm{softmax}(s)` over the keys that the causal rule (K3) and the
padding allow, with its lse (K5); a row that sees nothing is 0 (K4).

S5. **Combine.** :math:`o_{hi} = \sum_j P_{hij} v_{hv(h), j}`, as wide as the values. A layer lays
the heads side by side, Hq dv channels, and projects them to its own width, as multi-head attention
does; that projection is the layer's and not defined here.

S6. **Gradient.** That of dense attention for each query head. The gradient of a key head sums over
the Hq / Hk heads that read it, that of a value head over its own Hq / Hv. With dqe the gradient of
qe, :math:`dq = dqe\, E^T` and :math:`dE_h = \sum_i q_{hi}^T dqe_{hi}`, over the batch too.

S7. **Selective values.** With all of a row's P known, I is the set of its min(c, k_tokens) largest
entries, ties to the lower index (K6), listed by *descending* P: :math:`o = \sum_{j \in I} P_j v_j`.
Keys with P = 0 add exactly 0 and are not read (K11). The normaliser stays that of the full row, and
with *kept*, the sum of P over I, the error is at most :math:`(1 - kept) \max_j |v_j|`;
`renormalise` divides by *kept* instead, and a row without mass stays 0. c >= k_tokens is exact
(K9).

S8. **What is read.** All keys, since the choice needs the whole row. Of a value head: the union of
I over the rows of all query heads that read it. The cache holds Hk d + Hv dv numbers a token.

S9. **Decode.** The state is the keys and values so far; a step appends its own and attends
causally, to all values (then it equals prefill) or, given c, to selected ones.

Complexity
----------
As grouped attention in arithmetic; its cache of 2 G d numbers a token, for G heads of keys and of
values, becomes Hk d + Hv dv. Query heads that share a value head but no key head have different
weights: they share what is loaded, nothing that is computed.

Paper and code
--------------
- Of the paper we could read the abstract and summaries; the model code is not public. Head maps and
  scale follow the authors' kernels. The test beside them masks with -10000, we with -inf: that is
  the same unless logits are as large.
- How the released models wire their wider query, and whether selected weights are renormalised, is
  not said in what we could read. S2 is the most general form that attention can tell apart; S7
  keeps the full normaliser by default, which tends to the exact output as c grows.
- Their example has Hq, Hk, Hv = 32, 4, 16; they are built for (d, dv) of (32, 64), (64, 128),
  (96, 192), (128, 256) and (192, 128). Recalled, not verified: the same counts, but d = dv, in the
  released models.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_size, default_scale
from attnspec.reference.dense.attention import State
from attnspec.reference.dense.attention_gradient import score_gradient, sum_groups
from attnspec.reference.heads.diffqkv_steps import (
    allowed,
    attend,
    check_inputs,
    contract_query,
    contract_query_backward,
    head_maps,
    scores,
    softmax_rows,
    without_unread,
)
from attnspec.reference.heads.diffqkv_values import (
    attend_selected,
    cache_bytes,
    select_values,
    union_indices,
)
from attnspec.reference.primitives.softmax import weights_given_lse
from attnspec.reference.spec import HEADS, PATTERNS, PHASES, Coverage, Mechanism, Operation, Paper


def diffqkv_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1, S3-S5: output (..., heads, q_tokens, dv) and lse (..., heads, q_tokens).

    q (..., heads, q_tokens, d), contracted if it was wider; k (..., k_heads, k_tokens, d), v (...,
    v_heads, k_tokens, dv); `key_mask` bool (..., k_tokens), True = a real key.

    >>> q, k, v = np.zeros((6, 1, 2)), np.zeros((2, 1, 2)), np.arange(3.0).reshape(3, 1, 1)
    >>> diffqkv_attend(q, k, v)[0].ravel()
    array([0., 0., 1., 1., 2., 2.])
    """
    hk, hv = check_inputs(q, k, v)
    P, lse = softmax_rows(scores(q, k, hk, scale=scale), allowed(q, k, causal, key_mask))
    return attend(P, v, hv), lse


def diffqkv_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S6: gradients dq, dk, dv of `diffqkv_attend`, shaped as q, k, v.

    >>> one = np.ones((2, 1, 1))
    >>> diffqkv_backward(one, one[:1], one, one)[2].ravel()
    array([1., 1.])
    """
    hk, hv = check_inputs(q, k, v)
    check_array("dout", dout, ("heads", "q_tokens", "dv"))
    s, seen = scores(q, k, hk, scale=scale), allowed(q, k, causal, key_mask)
    # Recomputed from the normaliser, as a kernel that kept only this does.
    P = weights_given_lse(s, softmax_rows(s, seen)[1], seen)
    keys, values = without_unread(P, k[..., hk, :, :]), without_unread(P, v[..., hv, :, :])
    ds, _ = score_gradient(P, values, dout, dlse)
    factor = default_scale(k.shape[-1]) if scale is None else scale
    dk = sum_groups(factor * (np.swapaxes(ds, -1, -2) @ q), k.shape[-3])
    dv = sum_groups(np.swapaxes(P, -1, -2) @ dout, v.shape[-3])
    return factor * (ds @ keys), dk, dv


def selective_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    c: int,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
    renormalise: bool = False,
) -> np.ndarray:
    """S7: outputs (..., heads, q_tokens, dv) from the values of each row's c heaviest keys.

    Arguments as in `diffqkv_attend`. Every key is read; meant for the few queries of a decoder.

    >>> q, v = np.ones((1, 1, 1)), np.array([[[8.0], [4.0]]])
    >>> selective_attend(q, np.array([[[0.0], [np.log(3.0)]]]), v, 1).round(6)
    array([[[3.]]])
    """
    hk, hv = check_inputs(q, k, v)
    P, _ = softmax_rows(scores(q, k, hk, scale=scale), allowed(q, k, causal, key_mask))
    idx, _ = select_values(P, c)
    return attend_selected(P, idx, v, hv, renormalise=renormalise)


def step(
    state: State,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    c: int | None = None,
    renormalise: bool = False,
    scale: float | None = None,
) -> tuple[np.ndarray, State]:
    """S9: outputs (..., heads, tokens, dv) of new tokens, and the state that includes them.

    With `c`, selective values. The first state is dense attention's `init_state`.

    >>> one = np.ones((1, 1, 1))
    >>> out, state = step(State(one[:, :0], one[:, :0]), one, one, 5 * one)
    >>> out, state.k.shape
    (array([[[5.]]]), (1, 1, 1))
    """
    check_inputs(q, k, v)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    for name, old, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"{name}: got shape {old.shape}, expected that of {new.shape}")
    keys = np.concatenate([state.k, k], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    options: dict[str, Any] = {"causal": True, "scale": scale}
    if c is None:
        out, _ = diffqkv_attend(q, keys, values, **options)
    else:
        out = selective_attend(q, keys, values, c, renormalise=renormalise, **options)
    return out, State(keys, values)


MECHANISM = Mechanism(
    title="DiffQKV attention",
    idea="Few narrow keys, more and wider values, still wider queries; only heavy values are read.",
    paper=Paper(
        title="Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models",
        authors=("Zhenghao Lin", "Zihao Tang", "Xiao Liu", "Yeyun Gong", "and 30 others"),
        year=2025,
        arxiv="2501.13629",
        code="xiayuqing0622/flex_head_fa",
    ),
    operations=(
        Operation(head_maps, clauses=("S1",)),
        Operation(
            contract_query,
            clauses=("S2",),
            gradient=contract_query_backward,
            differentiable=("q", "E"),
        ),
        Operation(scores, clauses=("S3",)),
        Operation(softmax_rows, clauses=("S4",)),
        Operation(attend, clauses=("S5",)),
        Operation(
            diffqkv_attend,
            clauses=("S1", "S3", "S4", "S5"),
            gradient=diffqkv_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(select_values, clauses=("S7",)),
        Operation(attend_selected, clauses=("S7",)),
        Operation(selective_attend, clauses=("S7",)),
        Operation(union_indices, clauses=("S8",)),
        Operation(cache_bytes, clauses=("S8",)),
        Operation(step, clauses=("S9",)),
    ),
    headline="diffqkv_attend",
    coverage=Coverage(
        patterns=PATTERNS,
        phases=PHASES,
        paddings=("none", "left", "right"),
        heads=HEADS,
        gradient=True,
    ),
)
