r"""Softplus attention: weights that keep their sharpness as the context grows, and no exponential.

Softmax is a positive map and a normaliser, and the paper argues that only the second is needed.
Length-scaled softplus attention (LSSA) keeps the normaliser and takes softplus for the map, of
logits multiplied by the logs of the width and of the number of keys seen, so that a longer context
does not flatten the weights. Its re-weighted form (LSSAR) sharpens them: what is not above the
uniform weight vanishes exactly, and the rest is raised to a large power.

Definition
----------
S1. **Count.** :math:`N_i` is the number of keys that query i sees: i + 1 for the first pass over a
sequence in causal order, more behind a cache, all of them without an order; hidden keys do not
count. The count goes into the logits, so that repeating every key changes the output.

S2. **Unit.** :math:`\hat q_i = q_i / \max(\|q_i\|, 10^{-12})`, the keys likewise, after any
rotation by position, so that the lengths of queries and keys do not matter. Query head h reads kv
head h // group (K7).

S3. **Score.** :math:`x_{ij} = \ln d\, \ln N_i\, \hat q_i \cdot \hat k_j` with d the width of a
head and :math:`\ln 0 = 0` here. There is no 1/sqrt(d) besides; without unit vectors it takes their
place. A row that sees one key, and every row if d = 1, has x = 0 and so equal scores.

S4. **Soften.** :math:`s_{ij} = \ln(1 + e^{x_{ij}})` over visible keys and 0 elsewhere: hidden keys
are dropped after the map, since softplus(0) is not 0.

S5. **Weigh.** :math:`a_{ij} = s_{ij} / (\sum_j s_{ij} + \epsilon)`, the weights of LSSA. They are
those of a softmax over :math:`\ln s_{ij}`.

S6. **Sharpen.** :math:`r_{ij} = \max(N_i a_{ij} - O_i, 0)^p`, where :math:`O_i` is 0 if
:math:`N_i \le` warm and else 1, whatever the row's index, and :math:`b_{ij} = r_{ij} / (\sum_j
r_{ij} + \epsilon)`: the weights of LSSAR. A row without any excess above 0, as one of equal scores
or one that sees nothing, is *dead*: weights 0.

S7. **In log space.** :math:`\ln b = p \ln(N a - O) - \operatorname{logsumexp}`, without the second
:math:`\epsilon`, so that every live row sums to 1; rows whose largest excess is at most dead_tol
are dead, because equal scores leave an excess as large as rounding.

S8. **Combine.** :math:`o_i = \sum_j a_{ij} v_j`, or b. Nothing visible means 0, gradients too (K4).

S9. **Gradient.** :math:`do_i` is the gradient of :math:`o_i`, :math:`g_{ij} = do_i \cdot v_j`, and
:math:`dv_j = \sum_i a_{ij} do_i`, or b. LSSA has :math:`ds_{ij} = (g_{ij} - do_i \cdot o_i) /
(\sum s + \epsilon)`. LSSAR has the same for r and b, without :math:`\epsilon` in log space,
:math:`da = p N \max(N a - O, 0)^{p - 1} dr`, 0 where clipped even if p = 1, and :math:`ds_{ij} =
(da_{ij} - \sum_k a_{ik} da_{ik}) / (\sum s + \epsilon)`. Then :math:`dx = ds / (1 + e^{-x})`,
:math:`d\hat q_i = \ln d\, \ln N_i \sum_j dx_{ij} \hat k_j`, the keys likewise, and a unit vector
passes on :math:`(I - \hat q \hat q^T) / \|q\|`.

S10. **Decode.** A new query needs its own row only, with the keys and values so far: a pass for the
sum of s, and for LSSAR a second one. Older rows never change; keys may be kept as unit vectors.

Complexity
----------
Time :math:`O(q\_tokens \cdot k\_tokens \cdot d)` a head, as attention, without a running maximum;
LSSAR reads the keys twice.

Paper and code
--------------
Neither the paper's full text nor the authors' code was at hand: the steps, :math:`\epsilon` =
1e-8, the unit vectors and the three warm rows are read from an independent implementation that
agrees with the abstract, p = 15 is what it calls the paper's default, and `normalise_qk` False is
what an earlier version of the paper may have done (unverified). Padding, N = 0, noncausal and cross
attention, S7 and `dead_tol` are ours. With additive :math:`\epsilon` a row of small excesses sums
to clearly less than 1 (0.3 to the power 15 is 1.4e-8): a property of the source, kept; where that
matters, S7 is the better choice. There are no parameters: the first abstract applies the second
stage to a trained model, later versions train with it, and LSSA itself has to be trained with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_attention_inputs, check_size
from attnspec.reference.dense.attention import State, combine
from attnspec.reference.scores.softplus_attention_checks import check_second
from attnspec.reference.scores.softplus_attention_gradients import (
    first_stage,
    lssa_backward,
    lssar_backward,
    second_stage,
)
from attnspec.reference.scores.softplus_attention_steps import (
    attend,
    log_weights,
    lssa_logits,
    lssa_scores,
    lssa_weights,
    reweight,
    row_sum,
    unit,
    unit_backward,
    visible_counts,
)
from attnspec.reference.spec import HEADS, PATTERNS, PHASES, Coverage, Mechanism, Operation, Paper


def lssa(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    mask: np.ndarray | None = None,
    eps: float = 1e-8,
    normalise_qk: bool = True,
) -> np.ndarray:
    """S1-S5, S8: outputs (..., heads, q_tokens, dv) of length-scaled softplus attention.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), v (..., kv_heads, k_tokens, dv);
    `mask` bool (..., q_tokens or 1, k_tokens), without a head axis, True = visible.

    >>> lssa(np.ones((1, 2, 4)), np.ones((1, 2, 4)), np.eye(2)[None], causal=True).round(3)
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    return combine(first_stage(q, k, v, causal, mask, eps, normalise_qk).weights, v)


def lssar(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    p: float = 15,
    causal: bool = False,
    mask: np.ndarray | None = None,
    eps: float = 1e-8,
    warm: int = 3,
    normalise_qk: bool = True,
    eps_mode: str = "additive",
    dead_tol: float = 1e-6,
) -> np.ndarray:
    """S1-S8: outputs (..., heads, q_tokens, dv) of softplus attention with re-weighting.

    Arguments as in `lssa`; `p` >= 1, and `warm` >= 1 rows' counts without an offset. `eps_mode` is
    "additive" or "logspace" (S7); `dead_tol` matters in log space alone.

    >>> q = k = np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.2]]])
    >>> lssar(q, k, np.eye(4)[None], p=1, causal=True)[0, -1].round(3)
    array([0.312, 0.   , 0.34 , 0.349])
    """
    check_second(p, warm, eps_mode, dead_tol)
    rows = first_stage(q, k, v, causal, mask, eps, normalise_qk)
    return combine(second_stage(rows, p, eps, warm, eps_mode, dead_tol), v)


def step(
    state: State,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    p: float | None = None,
    eps: float = 1e-8,
    warm: int = 3,
    normalise_qk: bool = True,
) -> tuple[np.ndarray, State]:
    """S10: outputs (..., heads, tokens, dv) of new tokens, and the state that includes them.

    Without `p` it is LSSA. The first state is dense attention's `init_state`.

    >>> one = np.ones((1, 1, 1))
    >>> out, state = step(State(one[:, :0], one[:, :0]), one, one, 5 * one)
    >>> out.round(6), state.k.shape
    (array([[[5.]]]), (1, 1, 1))
    """
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    for name, old, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"{name}: got shape {old.shape}, expected that of {new.shape}")
    keys = np.concatenate([state.k, k], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    options: dict[str, Any] = {"causal": True, "eps": eps, "normalise_qk": normalise_qk}
    if p is None:
        out = lssa(q, keys, values, **options)
    else:
        out = lssar(q, keys, values, p=p, warm=warm, **options)
    return out, State(keys, values)


MECHANISM = Mechanism(
    title="Softplus attention with re-weighting",
    idea="Softplus and a sum replace softmax; a second stage drops what is not above the mean.",
    paper=Paper(
        title="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language "
        "Models",
        authors=("Bo Gao", "Michael W. Spratling"),
        year=2025,
        arxiv="2501.13428",
        venue="ICML 2026",
        code="iminfine/freeatten",
    ),
    operations=(
        Operation(visible_counts, clauses=("S1",)),
        Operation(unit, clauses=("S2",), gradient=unit_backward, differentiable=("x",)),
        Operation(lssa_logits, clauses=("S3",)),
        Operation(lssa_scores, clauses=("S4",)),
        Operation(row_sum, clauses=("S5",)),
        Operation(lssa_weights, clauses=("S5",)),
        Operation(reweight, clauses=("S6",)),
        Operation(log_weights, clauses=("S7",)),
        Operation(attend, clauses=("S8",)),
        Operation(
            lssa,
            clauses=("S1", "S2", "S3", "S4", "S5", "S8"),
            gradient=lssa_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(
            lssar,
            clauses=("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8"),
            gradient=lssar_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(step, clauses=("S10",)),
    ),
    headline="lssar",
    coverage=Coverage(
        patterns=PATTERNS,
        phases=PHASES,
        paddings=("none", "left", "right"),
        heads=HEADS,
        gradient=True,
    ),
)
