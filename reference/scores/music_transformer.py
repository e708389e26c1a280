r"""Music Transformer: logits that also depend on the distance, without a vector for every pair.

Relative attention adds to each logit the product of the query with a learned vector for the
distance of query and key. Written out for all pairs that is L x L vectors. But the products of all
queries with all rows of the table already hold every number needed, only sheared: *skewing*, one
padded column and a reshape, moves them into place. A local form does the same in blocks.

Definition
----------
S1. **Table.** E has M rows for each head, or for all of them: row M - 1 is distance 0, row
M - 1 - t distance t. For L tokens its *last* L rows are used; distances of M and more add 0, and
are not clipped to the last row. Without a causal order the table has 2 M - 1 rows, distance i - j
at row M - 1 + (j - i), and is aligned in the middle.

S2. **Relative logits.** With the scaled queries :math:`\tilde q = q / \sqrt d` (K2), :math:`R_{ic}
= \tilde q_i \cdot E_c` for every row c of the table, and :math:`rel_{ij} = \tilde q_i \cdot
E_{M-1-(i-j)}`. Logits are :math:`\tilde q_i \cdot k_j + rel_{ij}`: the scale is applied once, to
both terms.

S3. **Skew.** R (L, L) gets a zero column on its left, is read row by row as (L + 1, L) and loses
its first row: then :math:`S_{ij} = R_{i, L-1-(i-j)}` for j <= i. Entries with j > i come from other
rows and must be masked.

S4. **Skew without an order.** R (L, 2 L - 1) gets a zero column on its right and L - 1 zeros at the
end of its numbers, is read as (L + 1, 2 L - 1), and the columns from L - 1 of its first L rows are
kept.

S5. **Local.** In blocks of b tokens, query i sees j <= i in its own block and in the one before,
between b + 1 and 2 b keys from the second block on; fewer than 2 b tokens are one block. The
authors keep 4 b rows of which the last 2 b count; the tokens are padded to whole blocks at the end,
which the order hides.

S6. **Attend.** :math:`P = \operatorname{softmax}` over what is visible, :math:`o = P v`; hidden
logits are -inf, and a row without any visible key is 0 (K4). A new token needs the products of its
own query with the table, reversed onto the keys. Query head h reads kv head h // group (K7).

S7. **Values.** Optionally :math:`o_i \leftarrow o_i + \sum_j P_{ij} Ev_{M-1-(i-j)}`, a second
table, whose rows are as wide as the values.

S8. **Gradient.** With dS the gradient of the logits, :math:`dE_{M-1-t} = \sum_{i-j=t} dS_{ij}
\tilde q_i` over batch and pairs, and over heads if shared; :math:`d\tilde q_i` gains
:math:`\sum_j dS_{ij} E_{M-1-(i-j)}`. Rows for distances of L and more get 0. That of Ev is the same
sum with P for dS and do, the gradient of o, for :math:`\tilde q`.

Complexity
----------
:math:`O(L^2 d)` time: the products with the table cost what those with the keys do, so a third
joins attention's two. The local form takes :math:`O(L b d)`. The table adds :math:`O(M d)` memory
where writing out all pairs took :math:`O(L^2 d)`: 4.2 MB against 8.5 GB a layer for 2048 tokens,
512 features and 4 bytes.

Paper and code
--------------
- The paper has tables as long as the sequence; the code allows any M and pads with zero rows. We
  follow the code; Shaw et al. clip, which `relative_table_slice` offers as `clip`: the table it
  returns can be given to everything else.
- The code scales q before the call and leaves the causal mask to the caller; we do both here. It
  adds -1e9 where we have -inf.
- Its local form insists on 4 b rows; any number from min(2 b, L) on is accepted here.
- Grouped heads are not in the source: tables belong to query heads. Nor are cross attention, which
  has no shared positions, and padding.
- The authors start E from a normal distribution of variance 1/d, one table for each head, and have
  no table of values unless asked. For music M is half the length and b is 512 (128 by default);
  their translation presets have M = 20. Dropout on P, 0.1, is left out.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import causal_mask, check_array, check_bool, check_integer
from attnspec.reference.dense.attention import combine
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.scores.music_transformer_checks import (
    check_dtype,
    check_local_rows,
    check_self,
    check_square,
    check_table,
    check_values_table,
    check_weighed,
)
from attnspec.reference.scores.music_transformer_gradients import (
    by_distance,
    global_attention_backward,
    local_attention_backward,
)
from attnspec.reference.scores.music_transformer_steps import (
    decode_relative,
    global_logits,
    local_logits,
    local_visibility,
    relative_logits,
    relative_logits_gather,
    relative_table_slice,
    skew,
    skew_full,
    table_gradient,
    unskew,
)
from attnspec.reference.spec import Coverage, Mechanism, Operation, Paper


def attend(
    logits: np.ndarray, mask: np.ndarray | None, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S6: outputs (..., heads, L, dv) and weights P (..., heads, L, L).

    `mask` is bool and broadcasts to the logits, True = visible; None leaves it to their -inf.

    >>> attend(np.zeros((1, 2, 2)), np.tri(2, dtype=bool), np.eye(2)[None])[0]
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    check_weighed(logits, mask, v)
    P = softmax(logits, mask)
    return combine(P, v), P


def relative_values(P: np.ndarray, Ev: np.ndarray, causal: bool = True) -> np.ndarray:
    """S7: what a table of values (heads, M or 2 M - 1, dv) adds, (..., heads, L, dv).

    P (..., heads, L, L) are weights, 0 where hidden.

    >>> relative_values(np.array([[[1.0, 0.0], [0.25, 0.75]]]), np.array([[4.0], [8.0]]))
    array([[[8.],
            [7.]]])
    """
    check_array("P", P, ("heads", "L", "L"))
    check_square("P", P)
    check_bool("causal", causal)
    check_array("Ev", Ev, ("rows", "dv"))
    check_table("Ev", Ev, P.shape[-3], Ev.shape[-1], causal)
    check_dtype("Ev", Ev, P, "P")
    rows, L = Ev.shape[-2], P.shape[-1]
    unread = np.abs(np.arange(rows) - (rows - 1 if causal else rows // 2)) >= L
    return by_distance(P, rows, causal) @ np.where(unread[:, None], np.zeros_like(Ev), Ev)


def global_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    E: np.ndarray,
    *,
    Ev: np.ndarray | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> np.ndarray:
    """S1-S4, S6, S7: outputs (..., heads, L, dv) of global relative attention.

    q (..., heads, L, d), k (..., kv_heads, L, d), v (..., kv_heads, L, dv), E (heads, M, d), or
    (heads, 2 M - 1, d) if not causal, without its first axis if shared; Ev like E, of width dv and
    with any number of rows.

    >>> x = np.zeros((1, 2, 1))
    >>> global_attention(x, x, np.eye(2)[None], np.ones((2, 1)))
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    check_self("k", q, k)
    check_self("v", q, v)
    check_values_table(Ev, q, v, causal)
    logits = global_logits(q, k, E, scale, causal)
    out, P = attend(logits, causal_mask(*logits.shape[-2:]) if causal else None, v)
    return out if Ev is None else out + relative_values(P, Ev, causal)


def local_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    E: np.ndarray,
    b: int,
    *,
    Ev: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """S5-S7: outputs (..., heads, L, dv) of relative attention in blocks of `b`.

    Arguments as in `global_attention`; E, and Ev if there is one, need min(2 b, L) rows.

    >>> x = np.zeros((1, 3, 1))
    >>> local_attention(x, x, np.eye(3)[None], np.ones((2, 1)), 1)[0, 2]
    array([0. , 0.5, 0.5])
    """
    check_self("k", q, k)
    check_self("v", q, v)
    check_integer("b", b, least=1)
    check_values_table(Ev, q, v, causal=True)
    if Ev is not None:
        check_local_rows("Ev", Ev, q.shape[-2], b)
    out, P = attend(local_logits(q, k, E, b, scale), None, v)
    return out if Ev is None else out + relative_values(P, Ev)


MECHANISM = Mechanism(
    title="Relative attention with skewing",
    idea="A learned vector a distance joins the logits, sheared into place in linear memory.",
    paper=Paper(
        title="Music Transformer: Generating Music with Long-Term Structure",
        authors=(
            "Cheng-Zhi Anna Huang",
            "Ashish Vaswani",
            "Jakob Uszkoreit",
            "Noam Shazeer",
            "Ian Simon",
            "Curtis Hawthorne",
            "Andrew M. Dai",
            "Matthew D. Hoffman",
            "Monica Dinculescu",
            "Douglas Eck",
        ),
        year=2019,
        arxiv="1809.04281",
        venue="ICLR 2019",
        code="tensorflow/tensor2tensor",
    ),
    operations=(
        Operation(relative_table_slice, clauses=("S1",)),
        Operation(relative_logits, clauses=("S2",)),
        Operation(relative_logits_gather, clauses=("S2",)),
        Operation(skew, clauses=("S3",)),
        Operation(unskew, clauses=("S3",)),
        Operation(skew_full, clauses=("S4",)),
        Operation(global_logits, clauses=("S2", "S3", "S4")),
        Operation(local_visibility, clauses=("S5",)),
        Operation(local_logits, clauses=("S5",)),
        Operation(attend, clauses=("S6",)),
        Operation(decode_relative, clauses=("S6",)),
        Operation(relative_values, clauses=("S7",)),
        Operation(table_gradient, clauses=("S8",)),
        Operation(
            global_attention,
            clauses=("S1", "S2", "S3", "S4", "S6", "S7"),
            gradient=global_attention_backward,
            differentiable=("q", "k", "v", "E"),
        ),
        Operation(
            local_attention,
            clauses=("S5", "S6", "S7"),
            gradient=local_attention_backward,
            differentiable=("q", "k", "v", "E"),
        ),
    ),
    headline="global_attention",
    coverage=Coverage(patterns=("causal self", "noncausal self"), gradient=True),
)
