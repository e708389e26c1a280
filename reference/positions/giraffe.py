r"""Giraffe: change what a position is, and see how far a model still reads.

A rotary model has only met the angles of its training length. A survey of ways to give it others:
divide the positions (linear scaling), slow down low frequencies most (power), remove those that
never complete a turn in training (truncated), train on random positions, or let logits fade with
the distance (xPos). Each is judged by tasks whose answers can be checked, where linear scaling
comes out first and still works at larger scales than those of its training.

Definition
----------
S1 to S6, frequencies, positions and the rotation, are in `giraffe_rotation`; S7 to S9, xPos, in
`giraffe_xpos`; S10 and S11, who sees whom and from where, in `giraffe_masks`.

S12. **Attend.** Queries and keys are turned by S5 (half-split) or S7, keys before they are repeated
for their group (K7); then :math:`o = \mathrm{softmax}(q' k'^\top / \sqrt d)\, v`, causal by index
(S10). Without positions those of S11.

S13. **Gradient.** That of dense attention in the turned queries and keys, turned back.

S14. **Decode.** The state holds turned keys and values. A step turns its own by their absolute
positions, which it is given (K13), and attends to all; decoding equals prefill. The same holds for
keys turned by S7, if N stays as it is (S8).

The tasks: S15 to S17, lines to look up, are in `giraffe_lines`; S18 to S21, questions on documents,
in `giraffe_questions`.

Complexity
----------
:math:`O(T d)` beside dense attention; frequencies and positions do not change its cost.

Paper and code
--------------
The evaluation found linear scaling best, with a larger scale at evaluation than in training (12
after 16) still working. Passing frequencies as one array, so that S1 to S3 are one operation and
attention another, and causal order by index are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_attention_inputs, check_size
from attnspec.reference.dense import attention as dense
from attnspec.reference.positions.giraffe_lines import first_integer, make_lines, score_lines
from attnspec.reference.positions.giraffe_masks import default_positions, visible
from attnspec.reference.positions.giraffe_questions import (
    alter_document,
    alter_number,
    place_answer,
    presence,
)
from attnspec.reference.positions.giraffe_rotation import (
    check_frequencies,
    check_width,
    positions,
    random_positions,
    relative_kernel,
    rope_basis,
    rotate_half_split,
    rotate_half_split_backward,
    rotate_interleaved,
    rotate_interleaved_backward,
)
from attnspec.reference.positions.giraffe_xpos import (
    xpos,
    xpos_attend,
    xpos_attend_backward,
    xpos_backward,
    xpos_scale,
)
from attnspec.reference.spec import PATTERNS, PHASES, Coverage, Mechanism, Operation, Paper


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pq: np.ndarray | None = None,
    pk: np.ndarray | None = None,
    f: np.ndarray | None = None,
    *,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S5, S12: output (..., heads, T, dv) and lse (..., heads, T).

    q (..., heads, T, d), k (..., kv_heads, S, d), v (..., kv_heads, S, dv), not yet turned, d even;
    `pq` (T) or (..., T) and `pk` (S) or (..., S), whole or real numbers, keys at 0..S-1 and queries
    at the last T of them by default; `f` (d/2), by default those of `rope_basis`; `key_mask` bool
    (..., S), True = a real key.

    >>> x = np.ones((1, 2, 2))
    >>> attend(x, x, x, f=np.array([np.pi / 3]))[1].round(4)
    array([[1.4142, 1.815 ]])
    """
    check_attention_inputs(q, k, v)
    turned = _turn_both(q, k, pq, pk, f)
    return dense.attend(*turned, v, mask=visible(q.shape[-2], k.shape[-2], causal, key_mask))


def attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pq: np.ndarray | None,
    pk: np.ndarray | None,
    f: np.ndarray | None,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S13: gradients dq, dk, dv, shaped as q, k, v; `dlse` None means lse is not used.

    >>> one = np.ones((1, 1, 2))
    >>> [x.ravel() for x in attend_backward(one, one, one, None, None, None, one)]
    [array([0., 0.]), array([0., 0.]), array([1., 1.])]
    """
    check_attention_inputs(q, k, v)
    turned = _turn_both(q, k, pq, pk, f)
    mask = visible(q.shape[-2], k.shape[-2], causal, key_mask)
    dq, dk, dv = dense.attend_backward(*turned, v, dout, dlse, mask=mask)
    pq, pk = default_positions(q, k, pq, pk)
    f = rope_basis(q.shape[-1]) if f is None else f
    dq = rotate_half_split_backward(q, pq, f, dq)
    return dq, rotate_half_split_backward(k, pk, f, dk), dv


class State(NamedTuple):
    """S14: the turned keys (..., kv_heads, seen, d) and values (..., kv_heads, seen, dv) so far."""

    k: np.ndarray
    v: np.ndarray


def init_state(k: np.ndarray, v: np.ndarray) -> State:
    """S14: an empty state for tokens shaped as `k` and `v`.

    >>> init_state(np.ones((1, 5, 4)), np.ones((1, 5, 2))).k.shape
    (1, 0, 4)
    """
    return State(k[..., :0, :], v[..., :0, :])


def step(
    state: State,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    p: np.ndarray,
    f: np.ndarray | None = None,
) -> tuple[np.ndarray, State]:
    """S14: outputs (..., heads, T, dv) of new tokens at `p` (T) or (..., T), and the state after.

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv), not yet turned; `f`
    (d/2) that of every step before.

    >>> x = np.ones((1, 1, 2))
    >>> out, state = step(init_state(x, x), x, x, x, np.array([0]))
    >>> state.k.shape
    (1, 1, 2)
    """
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    for name, old, new in (("k", state.k, k), ("v", state.v, v)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"{name}: got shape {new.shape}, expected that of state {old.shape}")
    check_width("q", q.shape[-1])
    f = rope_basis(q.shape[-1]) if f is None else f
    check_frequencies(f, q.shape[-1])
    keys = np.concatenate([state.k, rotate_half_split(k, p, f)], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    out, _ = dense.attend(rotate_half_split(q, p, f), keys, values, causal=True)
    return out, State(keys, values)


def _turn_both(
    q: np.ndarray,
    k: np.ndarray,
    pq: np.ndarray | None,
    pk: np.ndarray | None,
    f: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """S5: q and k turned to their positions."""
    check_width("q", q.shape[-1])
    pq, pk = default_positions(q, k, pq, pk)
    f = rope_basis(q.shape[-1]) if f is None else f
    return rotate_half_split(q, pq, f), rotate_half_split(k, pk, f)


MECHANISM = Mechanism(
    title="Giraffe",
    idea="Scale, bend, truncate or randomise rotary positions, and check the reading by tasks.",
    paper=Paper(
        title="Giraffe: Adventures in Expanding Context Lengths in LLMs",
        authors=(
            "Arka Pal",
            "Deep Karkhanis",
            "Manley Roberts",
            "Samuel Dooley",
            "Arvind Sundararajan",
            "Siddartha Naidu",
        ),
        year=2023,
        arxiv="2308.10882",
        code="abacusai/Long-Context",
    ),
    operations=(
        Operation(rope_basis, clauses=("S1", "S2", "S3")),
        Operation(positions, clauses=("S4",)),
        Operation(random_positions, clauses=("S4",)),
        Operation(
            rotate_half_split,
            clauses=("S5",),
            gradient=rotate_half_split_backward,
            differentiable=("x",),
        ),
        Operation(
            rotate_interleaved,
            clauses=("S5",),
            gradient=rotate_interleaved_backward,
            differentiable=("x",),
        ),
        Operation(relative_kernel, clauses=("S6",)),
        Operation(xpos_scale, clauses=("S7",)),
        Operation(xpos, clauses=("S7",), gradient=xpos_backward, differentiable=("q", "k")),
        Operation(
            xpos_attend,
            clauses=("S7", "S10", "S11", "S12"),
            gradient=xpos_attend_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(
            attend,
            clauses=("S5", "S10", "S11", "S12"),
            gradient=attend_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(step, clauses=("S5", "S14")),
        Operation(make_lines, clauses=("S15",)),
        Operation(first_integer, clauses=("S16",)),
        Operation(score_lines, clauses=("S16",)),
        Operation(place_answer, clauses=("S18",)),
        Operation(presence, clauses=("S20",)),
        Operation(alter_number, clauses=("S21",)),
        Operation(alter_document, clauses=("S21",)),
    ),
    headline="attend",
    coverage=Coverage(
        patterns=PATTERNS, phases=PHASES, paddings=("none", "left", "right"), gradient=True
    ),
)
