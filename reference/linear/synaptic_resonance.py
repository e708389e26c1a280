r"""Synaptic Resonance (reconstruction): a memory reinforced by what fits the recent context.

Beside softmax attention every head carries a matrix that decays and takes in the outer product of
each key and value. A gate decides how strongly: it is the cosine of the key and a moving average of
the keys before it, so that tokens in tune with the context leave the deeper trace. What the matrix
answers to the query is added to the output of the attention; without it, this is attention.

**This is not the paper's algorithm.** We could read only the paper's abstract, which gives no
equation, no shape of a state, no rule of update, no constant and no measured number. All clauses
below are ours: the smallest mechanism we found that is consistent with it. Nothing here supports or
contradicts a claim of the paper.

Definition
----------
Per batch entry, tokens t = 0 .. T-1: queries q (d) of a query head, keys k (d) and values v (dv) of
its kv head, a matrix S (d, dv) and a trace c (d) for each kv head, both 0 at the start unless
given. Every clause is our choice.

S1. **Directions.** :math:`\hat k_t = k_t / \max(|k_t|, 10^{-6})` and alike :math:`\hat q_t`. Rotary
positions, if any, are for the softmax alone; the memory takes queries and keys without them.

S2. **Read**, before the write of t: :math:`m_t = S^T \hat q_t`.

S3. **Relevance.** :math:`\rho_t = \max(0, \hat k_t \cdot c / \max(|c|, 10^{-6}))`. While c is
exactly 0, as at the first token of a fresh state, :math:`\rho_t = 1`.

S4. **Reinforce.** :math:`S \leftarrow \lambda S + \eta \rho_t \hat k_t v_t^T`.

S5. **Trace.** :math:`c \leftarrow \mu c + (1 - \mu) \hat k_t`.

S6. **Attention.** :math:`o_t` is causal softmax attention with scale :math:`1/\sqrt d` (K2, K3). A
`window` of w limits it to the last w real tokens, the own one included (K8); S then holds the rest
as well as those inside.

S7. **Output.** :math:`y_t = o_t + \beta m_t`.

S8. **Padding.** At a padded token nothing happens: S and c stay, without decay, :math:`m_t = 0`,
:math:`\rho_t = 0`, :math:`y_t = 0`, and no query sees its key.

S9. **Heads.** S, c and :math:`\rho` belong to a kv head; its query heads read the same S (K7).

S10. **Decode.** The memory's state is S and c, which a later call may take up; the softmax needs
its keys and values beside them. A step is the same computation on one token or more.

S11. **Closed form.** :math:`m_t = \eta \sum_{j<t} \lambda^{t-1-j} \rho_j (\hat q_t \cdot \hat k_j)
v_j` and, from a state, :math:`\lambda^t S_0^T \hat q_t` more. With S entering a chunk, its n-th row
reads :math:`\lambda^n S`, the pairs of the chunk are a masked product, and S leaves as in S4
(:math:`\lambda^0 = 1`, for :math:`\lambda = 0` too). From :math:`S_0 = 0` the size of what t writes
into, :math:`|S|_F`, is at most :math:`\eta \sum_{j<t} \lambda^{t-1-j} \rho_j |v_j|`, and so is
:math:`|m_t|`; for :math:`\lambda < 1` both are at most :math:`\eta \max_j |v_j| / (1 - \lambda)`.

S12. **Gradient.** With dS the gradient of the matrix behind t: :math:`d\hat k_t = \eta \rho_t\,
dS\, v_t`, :math:`dv_t = \eta \rho_t\, dS^T \hat k_t`, :math:`d\rho_t = \eta\, \hat k_t^T dS\, v_t`,
:math:`d\hat q_t = S\, dm_t` with the S read, then :math:`dS \leftarrow \lambda dS + \hat q_t
dm_t^T`. With dc that of the trace behind t and :math:`g_t = d\rho_t` where :math:`\hat k_t \cdot c
> 0`, else 0: :math:`d\hat k_t` gains :math:`(1 - \mu) dc + g_t c / |c|`, then :math:`dc \leftarrow
\mu dc + g_t (\hat k_t - (\hat k_t \cdot c) c / |c|^2) / |c|`. Below the floors of S1 and S3 the
norm is a constant. :math:`\rho` has no gradient where it is 1 by rule.

S13. **Packed sequences.** Laid end to end, sequences have a state each: every one is S1 to S9 by
itself, so that the trace, the first token of S3, the matrix and the window begin anew with it.

Complexity
----------
:math:`O(T\, d\, dv)` a head for the memory, :math:`O(T\, w\, (d + dv))` for the softmax, w = T
without a window. The state beside the cache is :math:`d\, dv + d` numbers a kv head.

Paper and code
--------------
The source leaves open where the memory sits, what a synaptic weight matrix is, how relevance is
measured, how weights are updated and decay, where they start, how they meet positions, how they are
trained, and every constant: the defaults are ours. No code was found, and neither the arXiv number
nor the authors' given names were confirmed. Other readings fit the abstract as well and are not
here: a bonus on the logits of keys that drew much attention before, or a slow update of the
projection weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.dense.attention import attend, attend_backward
from attnspec.reference.linear.synaptic_resonance_batches import (
    synaptic_resonance_packed,
    synaptic_resonance_packed_backward,
)
from attnspec.reference.linear.synaptic_resonance_decode import (
    check_inputs,
    recent_tokens,
    step,
)
from attnspec.reference.linear.synaptic_resonance_gradients import (
    memory_backward,
    relevance_backward,
)
from attnspec.reference.linear.synaptic_resonance_memory import (
    memory_chunked,
    memory_recurrent,
    real_tokens,
    relevance,
    repeat_rows,
)
from attnspec.reference.spec import (
    HEADS,
    PADDINGS,
    PHASES,
    Coverage,
    Mechanism,
    Operation,
    Paper,
)


def synaptic_resonance(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, S0: np.ndarray | None = None,
    c0: np.ndarray | None = None, *, eta: float = 0.1, lam: float = 0.99, mu: float = 0.9,
    beta: float = 0.5, window: int | None = None, valid: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """S1-S9: y (..., heads, T, dv), and the state: S (..., kv_heads, d, dv), c (..., kv_heads, d).

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv); S0 and c0 are a state;
    `valid` bool (..., T), without heads, True at real tokens. eta >= 0 is the strength of a write,
    lam in [0, 1] what a step keeps, mu in [0, 1) the trace's decay, beta the share of the memory.

    >>> x = np.ones((1, 3, 1))
    >>> y, (S, c) = synaptic_resonance(x, x, x, eta=1.0, lam=0.5, mu=0.5, beta=0.1)
    >>> y.ravel(), S.ravel(), c.ravel()
    (array([1.  , 1.1 , 1.15]), array([1.75]), array([0.875]))
    """
    check_inputs(q, k, v, beta, window)
    rho, c = relevance(k, mu, valid, c0)
    m, S = memory_chunked(q, k, v, rho, eta, lam, S0, valid)
    o = attend(*_blank(q, k, v, valid), mask=recent_tokens(k, window, valid))[0]
    return o + beta * m, (S, c)


def synaptic_resonance_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, S0: np.ndarray | None, c0: np.ndarray | None,
    dy: np.ndarray, dS: np.ndarray | None = None, dc: np.ndarray | None = None, *,
    eta: float = 0.1, lam: float = 0.99, mu: float = 0.9, beta: float = 0.5,
    window: int | None = None, valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """S12: dq, dk, dv, dS0, dc0 of `synaptic_resonance`, from the gradients of y, S and c.

    >>> x = np.ones((1, 2, 1))
    >>> synaptic_resonance_backward(x, x, x, None, None, x, eta=1.0, beta=0.5)[2].ravel()
    array([2. , 0.5])
    """
    check_inputs(q, k, v, beta, window)
    check_shaped("dy", dy, (*q.shape[:-1], v.shape[-1]))
    rho, _ = relevance(k, mu, valid, c0)
    seen = repeat_rows(real_tokens(k, valid), q.shape[-3])[..., None]
    dy = np.where(seen, dy, np.zeros_like(dy))
    mask = recent_tokens(k, window, valid)
    plain_q, plain_k, plain_v = _blank(q, k, v, valid)
    of_softmax = attend_backward(plain_q, plain_k, plain_v, dy, mask=mask)
    dq, dk, dv, drho, dS0 = memory_backward(q, k, v, rho, eta, lam, S0, valid, beta * dy, dS)
    of_relevance, dc0 = relevance_backward(k, mu, valid, c0, drho, dc)
    return dq + of_softmax[0], dk + of_relevance + of_softmax[1], dv + of_softmax[2], dS0, dc0


def _blank(q: np.ndarray, k: np.ndarray, v: np.ndarray, valid: Any) -> list[np.ndarray]:
    """S8: q, k and v with 0 in the rows of padded tokens."""
    real = real_tokens(k, valid)
    seen = repeat_rows(real, q.shape[-3])
    return [np.where(r[..., None], x, 0) for r, x in ((seen, q), (real, k), (real, v))]


MECHANISM = Mechanism(
    title="Synaptic Resonance (reconstruction)",
    idea="A decaying matrix memory beside softmax attention, written in tune with the context.",
    paper=Paper(
        title="Exploring Synaptic Resonance in Large Language Models: A Novel Approach to "
        "Contextual Memory Integration",
        authors=("Applegarth", "Weatherstone", "Hollingsworth", "Middlebrook", "Irvin"),
        year=2025,
        arxiv="2502.10699",
    ),
    operations=(
        Operation(
            relevance,
            clauses=("S1", "S3", "S5", "S8"),
            gradient=relevance_backward,
            differentiable=("k", "c0"),
        ),
        Operation(
            memory_recurrent,
            clauses=("S1", "S2", "S4", "S8", "S9"),
            gradient=memory_backward,
            differentiable=("q", "k", "v", "rho", "S0"),
        ),
        Operation(memory_chunked, clauses=("S11", "S1", "S8", "S9")),
        Operation(
            synaptic_resonance,
            clauses=("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9"),
            gradient=synaptic_resonance_backward,
            differentiable=("q", "k", "v", "S0", "c0"),
        ),
        Operation(
            synaptic_resonance_packed,
            clauses=("S13",),
            gradient=synaptic_resonance_packed_backward,
            differentiable=("q", "k", "v", "S0", "c0"),
        ),
        Operation(step, clauses=("S10",)),
    ),
    headline="synaptic_resonance",
    coverage=Coverage(
        patterns=("causal self",),
        phases=PHASES,
        paddings=PADDINGS,
        heads=HEADS,
        gradient=True,
    ),
)
