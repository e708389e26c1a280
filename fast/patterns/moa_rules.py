"""The rules that a search may choose from, and what each of them hides and costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_integer,
    check_size,
    check_tensor,
    product,
    wide_dtype,
)
from attnspec.fast.patterns.moa_masks import check_rules


def rule_space(
    N_min: int,
    N_prof_max: int,
    N_max: int,
    n_alpha: int | None = None,
    n_beta: int = 9,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The values of alpha (n_alpha) and of beta (n_beta), and the rules (R, 2) kept: float64, CPU.

    `n_alpha` None is one value in 1024 tokens.
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
    # NumPy's own grid: whether a rule fits must not hang on the last bit of another one.
    alphas = torch.from_numpy(np.linspace(-N_min, N_prof_max, n_alpha))
    betas = torch.from_numpy(np.linspace(0, 1, n_beta))
    rules = torch.cartesian_prod(alphas, betas).reshape(-1, 2)
    alpha, beta = rules.unbind(1)
    kept = alpha + beta * N_min > 0
    for N in (N_prof_max, N_max):
        kept &= alpha + beta * N <= N
    rules = rules[kept]
    order = torch.argsort(rules[:, 0] + rules[:, 1] * N_max, stable=True)
    return alphas, betas, rules[order]


def layout(rule: Any, N: int, b: int = 64, *, backend: str | None = None) -> Tensor:
    """bool (nb, nb), the blocks that the rule (alpha, beta) keeps at length `N`; on the CPU."""
    shape = tuple(rule.shape) if isinstance(rule, Tensor) else np.shape(rule)
    if shape != (2,):
        raise ValueError(f"rule: got shape {shape}, expected (alpha, beta)")
    alpha, beta = (float(x) for x in check_rules(rule[0], rule[1]))
    check_integer("b", b, least=1)
    check_integer("N", N, least=0)
    if N % b:
        raise ValueError(f"N: got {N}, expected a multiple of {b} (b)")
    n = max(1, int(alpha // b + beta * (N // b)))
    row, column = torch.arange(N // b)[:, None], torch.arange(N // b)
    return (column <= row) & ((column == 0) | (row - column < n))


def predicted_loss(I: Tensor, layouts: Tensor, *, backend: str | None = None) -> Tensor:
    """(..., R), the influence I (..., nb, nb) of a head that each of `layouts` hides.

    `layouts` bool (R, nb, nb); entries above the diagonal count for nothing. One product of
    matrices, summed in float32 at least.
    """
    leading = ("...",) * max(0, I.dim() - 2) if isinstance(I, Tensor) else ()
    check_tensor("I", I, (*leading, "nb", "nb"), FLOATS)
    check_tensor("layouts", layouts, ("R", "nb", "nb"), (torch.bool,))
    for axis in (-1, -2):
        check_size("layouts", layouts.shape[axis], I.shape[axis], "nb, as in I")
    wide = wide_dtype(I)
    lower = torch.ones(I.shape[-2:], dtype=torch.bool, device=I.device).tril()
    hidden = (layouts.logical_not() & lower).flatten(1).to(wide)
    known = torch.where(lower, I.detach(), 0.0).to(wide).flatten(-2)
    return product(known, hidden.T).to(I.dtype)


def density(layout: Tensor, *, backend: str | None = None) -> Tensor:
    """float64 (...), the blocks in the fullest row of `layout` bool (..., nb, nb), over nb."""
    leading = ("...",) * max(0, layout.dim() - 2) if isinstance(layout, Tensor) else ()
    check_tensor("layout", layout, (*leading, "nb", "nb"), (torch.bool,))
    nb = layout.shape[-1]
    check_size("layout", nb, layout.shape[-2], "columns, as many as rows")
    if not nb:
        return torch.zeros(layout.shape[:-2], dtype=torch.float64, device=layout.device)
    return layout.sum(dim=-1).amax(dim=-1).double() / nb
