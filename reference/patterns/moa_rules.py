r"""MoA: the rules that a search may choose from, and what each of them hides and costs.

Definition
----------
S12. **Rule space.** The lengths of the profiles run from :math:`N_{min}` to :math:`N_{prof}`;
:math:`N_{max}` is the longest that a density is bounded for. Candidates are n_alpha values of
:math:`\alpha`, evenly from :math:`-N_{min}` to :math:`N_{prof}`, by n_beta values of :math:`\beta`
from 0 to 1. A rule is kept if :math:`\alpha + \beta N \le N` at :math:`N_{prof}` and at
:math:`N_{max}`, and :math:`\alpha + \beta N_{min} > 0`; rules are sorted, stably, by
:math:`\alpha + \beta N_{max}`.

S13. **Layout.** At length N, with nb = N / b blocks, a rule keeps block (I, J), J <= I, if J = 0 or
I - J < n, with n = max(1, int(:math:`\lfloor \alpha / b \rfloor + \beta\, nb`)): the division by b
is rounded down first, the sum is cut towards 0. Its *predicted loss* for a head is the influence of
the blocks J <= I that it does not keep. Its *density* is the largest number of blocks kept by a row
of blocks, divided by nb; its cost at N is density times N.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.patterns.moa_masks import check_rules


def rule_space(
    N_min: int,
    N_prof_max: int,
    N_max: int,
    n_alpha: int | None = None,
    n_beta: int = 9,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S12: the values of alpha (n_alpha) and of beta (n_beta), and the rules (R, 2) kept.

    `n_alpha` None is one value in 1024 tokens.

    >>> rule_space(2, 4, 8, n_alpha=4, n_beta=2)[2]
    array([[2., 0.],
           [4., 0.],
           [0., 1.]])
    """
    for name, value in (("N_min", N_min), ("N_prof_max", N_prof_max), ("N_max", N_max)):
        check_integer(name, value, least=1)
    for name, value, below in (
        ("N_prof_max", N_prof_max, N_min),
        ("N_max", N_max, N_prof_max),
    ):
        if value < below:
            raise ValueError(f"{name}: got {value}, expected at least {below}")
    if n_alpha is None:
        n_alpha = (N_prof_max + N_min) // 1024 + 1
    check_integer("n_alpha", n_alpha, least=1)
    check_integer("n_beta", n_beta, least=1)
    alphas = np.linspace(-N_min, N_prof_max, n_alpha)
    betas = np.linspace(0, 1, n_beta)
    alpha, beta = (x.ravel() for x in np.meshgrid(alphas, betas, indexing="ij"))
    kept = alpha + beta * N_min > 0
    for N in (N_prof_max, N_max):
        kept &= alpha + beta * N <= N
    rules = np.stack([alpha, beta], axis=-1)[kept]
    order = np.argsort(rules[:, 0] + rules[:, 1] * N_max, kind="stable")
    return alphas, betas, rules[order]


def layout(rule: Any, N: int, b: int = 64) -> np.ndarray:
    """S13: bool (nb, nb), the blocks that the rule (alpha, beta) keeps at length `N`.

    >>> layout((-1.0, 0.75), N=8, b=2).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 0, 1, 1]])
    """
    if np.shape(rule) != (2,):
        raise ValueError(f"rule: got shape {np.shape(rule)}, expected (alpha, beta)")
    check_rules(*rule)
    check_integer("b", b, least=1)
    check_integer("N", N, least=0)
    if N % b:
        raise ValueError(f"N: got {N}, expected a multiple of {b} (b)")
    alpha, beta = (float(x) for x in rule)
    n = max(1, int(alpha // b + beta * (N // b)))
    row, column = np.arange(N // b)[:, None], np.arange(N // b)
    return (column <= row) & ((column == 0) | (row - column < n))


def predicted_loss(I: np.ndarray, layouts: np.ndarray) -> np.ndarray:
    """S13: (..., R), the influence I (..., nb, nb) of a head that each of `layouts` hides.

    `layouts` bool (R, nb, nb); entries above the diagonal count for nothing.

    >>> predicted_loss(np.ones((2, 3, 3)), np.stack([np.eye(3) > 0, np.ones((3, 3)) > 0]))
    array([[3., 0.],
           [3., 0.]])
    """
    check_array("I", I, ("nb", "nb"))
    _check_layouts(layouts, ("R", "nb", "nb"))
    for axis in (-1, -2):
        check_size("layouts", layouts.shape[axis], I.shape[axis], "nb, as in I")
    hidden = np.tril(~layouts)
    kept = np.where(hidden, I[..., None, :, :], np.zeros_like(I[..., None, :, :]))
    return kept.sum(axis=(-1, -2))


def density(layout: np.ndarray) -> np.ndarray:
    """S13: float64 (...), the blocks in the fullest row of `layout` bool (..., nb, nb), over nb.

    >>> density(np.stack([np.eye(4) > 0, np.tril(np.ones((4, 4), bool))]))
    array([0.25, 1.  ])
    """
    _check_layouts(layout, ("nb", "nb"), "layout")
    return layout.sum(axis=-1).max(axis=-1, initial=0) / max(layout.shape[-1], 1)


def _check_layouts(layouts: Any, axes: tuple[str, ...], name: str = "layouts") -> None:
    check_array(name, layouts, axes, dtype="bool")
    check_size(name, layouts.shape[-1], layouts.shape[-2], "columns, as many as rows")
