"""Mixers as systems, in torch: what `dsf_scan` takes. To be looked at; any leading axes."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_choice, check_integer, check_tensor, wide
from attnspec.fast.engines.scan import forget_gate
from attnspec.fast.growing import checkable
from attnspec.fast.linear.dsf_rnn import check_gates, check_rg_lru, rg_lru_gates
from attnspec.fast.linear.dsf_ssm import check_positive, check_s6
from attnspec.fast.linear.lightning_attention_2_chunks import check_upstream

System = tuple[Tensor, Tensor, Tensor, Tensor]


def from_attention(
    phi_q: Tensor, psi_k: Tensor, eta: Tensor, dv: int, form: int = 2, *, backend: str | None = None
) -> System:
    """Lam, B, C, D of separable attention; phi_q, psi_k (..., T, n), eta (..., T) > 0."""
    _check_rows("phi_q", phi_q, 2)
    check_upstream("psi_k", psi_k, tuple(phi_q.shape), phi_q)
    check_upstream("eta", eta, tuple(phi_q.shape[:-1]), phi_q)
    check_integer("dv", dv, least=1)
    check_choice("form", form, (1, 2))
    if checkable(eta) and not bool((eta > 0).all()):
        raise ValueError("eta: got a value of 0 or less, or NaN, expected numbers > 0")
    eta, phi, psi = wide(eta), wide(phi_q), wide(psi_k)
    if form == 2:
        return _separable(torch.ones_like(eta), psi, phi / eta[..., None], dv, phi_q.dtype)
    ratio = torch.cat([torch.ones_like(eta[..., :1]), eta[..., :-1] / eta[..., 1:]], -1)
    return _separable(ratio[..., : eta.shape[-1]], psi / eta[..., None], phi, dv, phi_q.dtype)


def from_normalised_attention(
    q: Tensor, k: Tensor, n: Tensor, dv: int, *, backend: str | None = None
) -> System:
    """Lam, B, C, D of normalised attention; q, k (..., T, d), n (..., T)."""
    _check_rows("q", q, 2)
    check_upstream("k", k, tuple(q.shape), q)
    check_upstream("n", n, tuple(q.shape[:-1]), q)
    check_integer("dv", dv, least=1)
    phi = wide(q) * torch.exp(-wide(n))[..., None]
    return _separable(torch.ones_like(wide(n)), wide(k), phi, dv, q.dtype)


def from_s6(
    Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor | None = None, *,
    backend: str | None = None,
) -> System:  # fmt: skip
    """Lam, B, C, D of S6; Delta (batch, T, dv), A (dv, n), b, c (batch, T, n), D (dv,) or None."""
    check_s6(Delta, A, b, c, D)
    d = wide(Delta)
    Lam = torch.exp(-d[..., None] * wide(A)).flatten(-2)
    B = _placed(d[..., None] * wide(b)[..., None, :])
    C = _placed(wide(c)[..., None, :].expand(*d.shape, A.shape[1])).mT
    skip = torch.zeros_like(d) if D is None else wide(D).expand(d.shape)
    return _narrow((Lam, B, C, torch.diag_embed(skip)), Delta.dtype)


def from_ssd(
    Delta: Tensor, a: Tensor, b: Tensor, c: Tensor, dv: int, *, backend: str | None = None
) -> System:
    """Lam, B, C, D of SSD; Delta (..., T), a of no axes or one rate a head, b, c (..., T, n)."""
    _check_rows("Delta", Delta, 1)
    if not isinstance(a, Tensor):
        raise TypeError(f"a: got {type(a).__name__}, expected torch.Tensor")
    if a.shape not in ((), Delta.shape[-2:-1]):
        raise ValueError(f"a: got shape {tuple(a.shape)}, expected () or the heads")
    check_upstream("a", a, tuple(a.shape), Delta, dtypes=FLOATS)
    _check_rows("b", b, 2)
    check_upstream("b", b, (*Delta.shape, b.shape[-1]), Delta)
    check_upstream("c", c, tuple(b.shape), Delta)
    check_positive("Delta", Delta)
    check_positive("a", a)
    check_integer("dv", dv, least=1)
    d = wide(Delta)
    Lam = torch.exp(-wide(a)[..., None] * d)
    return _separable(Lam, d[..., None] * wide(b), wide(c), dv, Delta.dtype)


def from_qlstm(
    f: Tensor, i: Tensor, o: Tensor, alpha: float = 1.0, reversed: bool = False, *,
    backend: str | None = None,
) -> System:  # fmt: skip
    """Lam, B, C, D of the qLSTM; pre-activations f, i, o (batch, T, N). The input is z."""
    check_gates(f, i, o, alpha, reversed)
    B, C = (torch.diag_embed(torch.sigmoid(wide(x))) for x in (i, o))
    return _narrow((forget_gate(f, alpha, reversed), B, C, torch.zeros_like(B)), f.dtype)


def from_rg_lru(
    r: Tensor, g: Tensor, lam: Tensor, *, c: float = 8.0, backend: str | None = None
) -> System:
    """Lam, B, C, D of the RG-LRU; pre-activations r, g (batch, T, N), lam (N,)."""
    check_tensor("r", r, ("batch", "T", "N"), FLOATS)
    check_rg_lru(r, g, lam, c, r)
    log_decay, strength = rg_lru_gates(r, g, lam, c)
    B = torch.diag_embed(strength)
    C = torch.diag_embed(torch.ones_like(strength))
    return _narrow((torch.exp(log_decay), B, C, torch.zeros_like(B)), r.dtype)


def taylor_features(
    x: Tensor, P: int, packed: bool = False, *, backend: str | None = None
) -> Tensor:
    """Features (..., n) of x (..., d) up to order P, by degree, in the dtype of x."""
    _check_rows("x", x, 1)
    check_integer("P", P, least=0)
    if not isinstance(packed, bool):
        raise TypeError(f"packed: got {type(packed).__name__}, expected a bool")
    d = x.shape[-1]
    if d < 1:
        raise ValueError("x: got 0 channels, expected 1 or more")
    wider = wide(x)
    product = torch.ones_like(wider[..., :1])
    features = [product]
    for p in range(1, P + 1):
        unit = d ** (p / 4) * math.sqrt(math.factorial(p))
        if packed:
            chosen = list(combinations_with_replacement(range(d), p))
            orders = [math.sqrt(_orders(channels)) / unit for channels in chosen]
            product = wider[..., torch.tensor(chosen, device=x.device)].prod(-1)
            features.append(product * torch.tensor(orders, dtype=wider.dtype, device=x.device))
        else:
            product = (product[..., :, None] * wider[..., None, :]).flatten(-2)
            features.append(product / unit)
    return torch.cat(features, -1).to(x.dtype)


def _orders(chosen: tuple[int, ...]) -> int:
    """How many orders the same channels can have."""
    alike = math.prod(math.factorial(chosen.count(channel)) for channel in set(chosen))
    return math.factorial(len(chosen)) // alike


def _separable(Lam: Tensor, psi: Tensor, phi: Tensor, dv: int, dtype: torch.dtype) -> System:
    """A decay (..., T) for all of the state, input psi and read-out phi (..., T, n)."""
    B, C = (_placed(x[..., None, :].expand(*x.shape[:-1], dv, x.shape[-1])) for x in (psi, phi))
    D = torch.zeros(*psi.shape[:-1], dv, dv, dtype=psi.dtype, device=psi.device)
    return _narrow((Lam[..., None].expand(B.shape[:-1]).clone(), B, C.mT, D), dtype)


def _placed(x: Tensor) -> Tensor:
    """(..., dv * n, dv): row (j, s) has x (..., dv, n) at [j, s] in column j."""
    dv = x.shape[-2]
    eye = torch.eye(dv, dtype=x.dtype, device=x.device)
    return (x[..., None] * eye[:, None, :]).flatten(-3, -2)


def _narrow(system: System, dtype: torch.dtype) -> System:
    Lam, B, C, D = (x.to(dtype) for x in system)
    return Lam, B, C, D


def _check_rows(name: str, x: Any, axes: int) -> None:
    """A float tensor of so many axes or more."""
    check_tensor(name, x, ("...",) * max(axes, getattr(x, "ndim", axes)), FLOATS)
