"""State space models of `dsf`: S6 on the selective scan, SSD on the chunked one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_tensor, wide
from attnspec.fast.engines.scan import scan, selective
from attnspec.fast.growing import checkable
from attnspec.fast.linear.lightning_attention_2_chunks import as_state, check_upstream


def s6_scan(
    Delta: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    u: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, T, dv) and the last h, float32 (batch, dv, n).

    Delta >= 0 and u (batch, T, dv), b, c (batch, T, n) of one dtype; A >= 0 (dv, n), D (dv,), h0
    (batch, dv, n) of any. Differentiable in all.
    """
    check_s6(Delta, A, b, c, D)
    check_upstream("u", u, tuple(Delta.shape), Delta)
    h0 = as_state("h0", h0, (Delta.shape[0], *A.shape), u)
    return selective(Delta, A, b, c, u, D, h0, backend=backend)


def ssd_scan(
    Delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    u: Tensor,
    h0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, heads, T, dv) and the last h, float32 (batch, heads, dv, n).

    Delta >= 0 (batch, heads, T), a >= 0 (heads,) of any float dtype, b, c (batch, heads, T, n), u
    (batch, heads, T, dv). Differentiable in all.
    """
    check_ssd(Delta, a, b, c)
    check_tensor("u", u, ("batch", "heads", "T", "dv"), FLOATS)
    check_upstream("u", u, (*Delta.shape, u.shape[3]), Delta)
    start = as_state("h0", h0, (*Delta.shape[:2], u.shape[3], b.shape[3]), u)
    start = None if start is None else start.mT
    log_decay = -wide(a)[:, None] * wide(Delta)
    # Sums that nothing normalises may leave float16's range on their way.
    dtype = torch.float32 if u.dtype == torch.float16 else u.dtype
    y, h = scan(
        c.to(dtype), b.to(dtype), u.to(dtype), log_decay=log_decay, writes=Delta, state=start,
        backend=backend,
    )  # fmt: skip
    return y.to(u.dtype), h.mT.contiguous()


def ssd_as_attention(
    Delta: Tensor, a: Tensor, b: Tensor, c: Tensor, u: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the log decay (batch, heads, T) of the linear attention that is this SSD."""
    check_ssd(Delta, a, b, c)
    check_tensor("u", u, ("batch", "heads", "T", "dv"), FLOATS)
    check_upstream("u", u, (*Delta.shape, u.shape[3]), Delta)
    v = (wide(Delta)[..., None] * wide(u)).to(u.dtype)
    log_decay = (-wide(a)[:, None] * wide(Delta)).to(Delta.dtype)
    return c.clone(), b.clone(), v, log_decay


def ssd_as_normalised(
    Delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """phi, psi (batch, heads, T, n) and eta (batch, heads, T), which grows as e^T."""
    check_ssd(Delta, a, b, c)
    eta = torch.exp(wide(a)[:, None] * torch.cumsum(wide(Delta), -1))
    psi = (eta * wide(Delta))[..., None] * wide(b)
    return c.clone(), psi.to(b.dtype), eta.to(Delta.dtype)


def is_ssd(eta: Tensor, psi: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """bool (...), whether separable attention with normalisers eta (..., T) is an SSD.

    With psi (..., T, n), eta must also grow at every token but the first whose psi is not 0.
    """
    check_tensor("eta", eta, ("...",) * max(1, getattr(eta, "ndim", 1)), FLOATS)
    if checkable(eta) and not bool((eta > 0).all()):
        raise ValueError("eta: got a value of 0 or less, or NaN, expected numbers > 0")
    before, after = eta[..., :-1], eta[..., 1:]
    fits = after >= before
    if psi is not None:
        check_tensor("psi", psi, ("...",) * (eta.ndim + 1), FLOATS)
        check_upstream("psi", psi, (*eta.shape, psi.shape[-1]), eta)
        fits = fits & ((after > before) | ~(psi[..., 1:, :] != 0).any(-1))
    return fits.all(-1)


def check_s6(Delta: Any, A: Any, b: Any, c: Any, D: Any) -> None:
    """The arguments of an S6 layer fit one another."""
    check_tensor("Delta", Delta, ("batch", "T", "dv"), FLOATS)
    check_tensor("A", A, ("dv", "n"), FLOATS)
    check_upstream("A", A, (Delta.shape[2], A.shape[1]), Delta, dtypes=FLOATS)
    for name, x in (("b", b), ("c", c)):
        check_upstream(name, x, (*Delta.shape[:2], A.shape[1]), Delta)
    if D is not None:
        check_upstream("D", D, (Delta.shape[2],), Delta, dtypes=FLOATS)
    check_positive("Delta", Delta)
    check_positive("A", A)


def check_ssd(Delta: Any, a: Any, b: Any, c: Any) -> None:
    """The arguments of an SSD layer fit one another."""
    check_tensor("Delta", Delta, ("batch", "heads", "T"), FLOATS)
    check_upstream("a", a, tuple(Delta.shape[1:2]), Delta, dtypes=FLOATS)
    check_tensor("b", b, ("batch", "heads", "T", "n"), FLOATS)
    check_upstream("b", b, (*Delta.shape, b.shape[3]), Delta)
    check_upstream("c", c, tuple(b.shape), Delta)
    check_positive("Delta", Delta)
    check_positive("a", a)


def check_positive(name: str, x: Tensor) -> None:
    """No number below 0, where looking costs nothing."""
    if checkable(x) and not bool((x >= 0).all()):
        raise ValueError(f"{name}: got a value below 0 or NaN, expected numbers >= 0")
