"""LSSA as a score function of FlexAttention: the log of softplus, whose softmax it is.

LSSAR is two calls: what it sharpens are the weights, which only a finished row has, so the score
function of the second captures the lse that the first returns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_bool,
    check_integer,
    check_size,
    check_tensor,
)
from attnspec.fast.flex import ScoreMod, by_token, check_by_token
from attnspec.fast.scores.softplus_attention_steps import check_number

FAR = -60.0
"""Below it the log of softplus is its argument, to the last bit of float64."""


def score_mod(n: Tensor, d: int, normalise_qk: bool = True) -> ScoreMod:
    """For rows that see `n` (q_tokens) or (batch, q_tokens) keys, their `visible_counts`.

    Queries and keys of width `d` come as `unit` vectors, or as they are without `normalise_qk`; the
    attention's scale is 1. This is `lssa` with eps = 0. n lies on the device of the attention.
    """
    check_by_token("n", n, "q_tokens", (*INTEGERS, *FLOATS))
    check_integer("d", d, least=1)
    check_bool("normalise_qk", normalise_qk)
    scale = math.log(d) / (1.0 if normalise_qk else math.sqrt(d))
    factor = n.double().clamp(min=1).log() * scale

    def softened(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        x = score * by_token(factor, batch, query).to(score.dtype)
        near = x.clamp(min=FAR)
        softplus = near.clamp(min=0) + torch.log1p(torch.exp(-near.abs()))
        return torch.where(x < FAR, x, torch.log(softplus))

    return softened


def reweighted_score_mod(
    n: Tensor,
    d: int,
    lse: Tensor,
    p: float = 15,
    eps: float = 1e-8,
    warm: int = 3,
    normalise_qk: bool = True,
    dead_tol: float = 1e-6,
) -> ScoreMod:
    """The second call of `lssar`, after one with `score_mod` that gave `lse`; all else alike.

    n, `d` and `normalise_qk` as there; lse (batch, heads, q_tokens) lies on the device of the
    attention. This is ``eps_mode="logspace"``, but for excesses of at most `dead_tol` in live rows:
    they are dropped, each at most (dead_tol / largest excess)^p of what the largest weighs. With
    `dead_tol` 0 and the output multiplied by ``sigmoid(lse2 - log(eps))``, lse2 that of this call,
    it is ``eps_mode="additive"``. Differentiable, through lse too.
    """
    softened = score_mod(n, d, normalise_qk)
    check_tensor("lse", lse, ("batch", "heads", "q_tokens"), FLOATS)
    check_size("lse", lse.shape[2], n.shape[-1], "q_tokens, as in n")
    if n.dim() == 2:
        check_size("lse", lse.shape[0], n.shape[0], "batch, as in n")
    p, eps = check_number("p", p, 1), check_number("eps", eps, 0)
    check_integer("warm", warm, least=1)
    tolerance = check_number("dead_tol", dead_tol, 0)
    # A row that sees nothing has no mass: any finite number does, since its n is 0.
    total = torch.where(torch.isneginf(lse), 0.0, lse)
    if eps:
        total = torch.logaddexp(total, torch.full_like(lse, math.log(eps)))

    def sharpened(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = by_token(n, batch, query).to(score.dtype)
        normaliser = total[batch, head, query].to(score.dtype)
        weight = torch.exp(softened(score, batch, head, query, key) - normaliser)
        excess = seen * weight - (seen > warm).to(score.dtype)
        live = excess > tolerance
        over = torch.where(live, excess, torch.ones_like(excess))
        return torch.where(live, p * torch.log(over), torch.full_like(over, -math.inf))

    return sharpened
