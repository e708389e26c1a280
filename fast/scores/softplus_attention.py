"""Softplus attention on the softplus engine: one sweep for LSSA, two for LSSAR.

The steps that hand out whole matrices are torch, in float32 for 16-bit inputs and rounded once.
Unit vectors are never written: the kernels multiply raw products by the inverse lengths.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_bool,
    check_choice,
    check_device,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.dense.attention import State
from attnspec.fast.engines.flash.checks import check_inputs
from attnspec.fast.engines.softplus import Sharpening, softplus
from attnspec.fast.growing import append

MATRIX = ("batch", "heads", "q_tokens", "k_tokens")
CLAIMS: dict[str, dict[str, Any]] = {
    "lssa": {"gradient": True, "blocks": (16, 64), "compiled": True, "triton": {"graph": True}},
    "lssar": {"gradient": True, "blocks": (16, 64)},
    **{
        name: {"launches": None}
        for name in (
            "visible_counts", "unit", "lssa_logits", "lssa_scores", "row_sum", "lssa_weights",
            "reweight", "log_weights", "attend",
        )
    },
}  # fmt: skip
CLAIMS["unit"]["gradient"] = True


def _check_number(name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number >= {least}")
    if not (math.isfinite(value) and float(value) >= least):
        raise ValueError(f"{name}: got {value}, expected a finite number >= {least}")
    return float(value)


def _check_counts(n: Any, rows: tuple[int, ...]) -> Tensor:
    """The counts of queries with a head axis, (batch, 1, q_tokens) or broadcastable to it."""
    if not isinstance(n, Tensor):
        raise TypeError(f"n: got {type(n).__name__}, expected torch.Tensor")
    if n.dtype == torch.bool:
        raise TypeError("n: got dtype bool, expected numbers")
    shape = (1,) * (len(rows) - n.dim()) + tuple(n.shape)
    if len(shape) > len(rows) or any(a not in (1, b) for a, b in zip(shape, rows, strict=True)):
        raise ValueError(f"n: got shape {tuple(n.shape)}, expected one that broadcasts to {rows}")
    return n.reshape(shape)[..., None, :] if len(rows) == 2 else n.reshape(shape)


def visible_counts(
    visible: bool | Tensor, q_tokens: int = 0, k_tokens: int = 0, offset: int | None = None
) -> Tensor:
    """How many keys each query sees, int64 (q_tokens,) or, of a mask, (..., q_tokens).

    `visible` is True for the causal order with `offset` keys before the first query, False for all
    keys, or a bool mask (..., q_tokens, k_tokens).
    """
    if isinstance(visible, Tensor):
        if visible.dtype != torch.bool:
            raise TypeError(f"visible: got dtype {visible.dtype}, expected bool")
        if visible.dim() < 2:
            raise ValueError(
                f"visible: got shape {tuple(visible.shape)}, expected (..., q_tokens, k_tokens)"
            )
        return visible.sum(-1)
    if not isinstance(visible, bool):
        raise TypeError(f"visible: got {visible!r}, expected True, False or a bool tensor")
    check_integer("q_tokens", q_tokens, least=0)
    check_integer("k_tokens", k_tokens, least=0)
    if offset is not None:
        check_integer("offset", offset, least=0)
    return _counts(visible, q_tokens, k_tokens, offset, torch.device("cpu"))


def _counts(
    causal: bool, q_tokens: int, k_tokens: int, offset: int | None, device: torch.device
) -> Tensor:
    """`visible_counts`, made on `device`: a copy would end the capture of a graph."""
    if not causal:
        return torch.full((q_tokens,), k_tokens, device=device)
    offset = k_tokens - q_tokens if offset is None else offset
    return (torch.arange(q_tokens, device=device) + (offset + 1)).clamp(0, k_tokens)


def unit(x: Tensor) -> Tensor:
    """x (batch, heads, tokens, d) over its length, which counts as at least 1e-12.

    Differentiable.
    """
    check_tensor("x", x, ("batch", "heads", "tokens", "d"), FLOATS)
    rows = wide(x)
    return (rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12)).to(
        x.dtype
    )


def _factor(d: int, normalise_qk: bool) -> float:
    return math.log(d) * (1.0 if normalise_qk else d**-0.5) if d else 0.0


def lssa_logits(q: Tensor, k: Tensor, n: Tensor, *, normalise_qk: bool = True) -> Tensor:
    """Logits (batch, heads, q_tokens, k_tokens); `n` are the counts, (batch, q_tokens)."""
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_tensor("k", k, ("batch", "kv_heads", "k_tokens", "d"), FLOATS)
    check_same("k", k, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} kv heads, expected a divisor of the heads")
    counts = _check_counts(n, (q.shape[0], q.shape[2]))
    check_bool("normalise_qk", normalise_qk)
    a, b = wide(q), wide(k)
    if normalise_qk:
        a, b = unit(a), unit(b)
    lengths = torch.log(counts.to(a.dtype).clamp(min=1.0)) * _factor(q.shape[3], normalise_qk)
    b = b.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (product(a, b.transpose(-1, -2)) * lengths[..., None]).to(q.dtype)


def lssa_scores(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softplus of logits (batch, heads, q_tokens, k_tokens), 0 where `mask` is False."""
    check_tensor("logits", logits, MATRIX, FLOATS)
    x = wide(logits)
    scores = torch.logaddexp(x, torch.zeros_like(x)).to(logits.dtype)
    if mask is None:
        return scores
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: got {type(mask).__name__}, expected a bool tensor")
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) > 4 or any(a not in (1, b) for a, b in zip(shape, logits.shape, strict=True)):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to "
            f"{tuple(logits.shape)}"
        )
    return torch.where(mask, scores, 0.0)


def row_sum(scores: Tensor) -> Tensor:
    """Sums (batch, heads, q_tokens) of scores (batch, heads, q_tokens, k_tokens)."""
    check_tensor("scores", scores, MATRIX, FLOATS)
    return wide(scores).sum(-1).to(scores.dtype)


def lssa_weights(scores: Tensor, row_sum: Tensor, eps: float = 1e-8) -> Tensor:
    """The weights a, shaped as scores; rows without any mass are 0."""
    check_tensor("scores", scores, MATRIX, FLOATS)
    check_tensor("row_sum", row_sum, MATRIX[:3], FLOATS)
    if row_sum.shape != scores.shape[:3]:
        raise ValueError(
            f"row_sum: got shape {tuple(row_sum.shape)}, expected {tuple(scores.shape[:3])}"
        )
    total = wide(row_sum) + _check_number("eps", eps, 0)
    return (wide(scores) / _divisor(total)[..., None]).to(scores.dtype)


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1.0)


def _excess(weights: Tensor, n: Any, warm: Any, dead: float) -> tuple[Tensor, Tensor, Tensor]:
    """Excesses over the largest of each row, the largest (1 if there is none), and dead rows."""
    check_tensor("weights", weights, MATRIX, FLOATS)
    check_integer("warm", warm, least=1)
    counts = _check_counts(n, (weights.shape[0], weights.shape[2])).to(wide(weights).dtype)
    excess = counts[..., None] * wide(weights) - (counts > warm).to(counts.dtype)[..., None]
    if weights.shape[3]:
        most = excess.amax(-1, keepdim=True)
    else:
        most = excess.new_zeros(*excess.shape[:3], 1)
    return excess / _divisor(most), _divisor(most), ~(most > dead)[..., 0]


def reweight(
    weights: Tensor, n: Tensor, p: float = 15, eps: float = 1e-8, warm: int = 3
) -> tuple[Tensor, Tensor]:
    """Sharpened weights, shaped as `weights`, and which rows (batch, heads, q_tokens) are dead.

    `n` are the counts (batch, q_tokens). The powers are taken of the excess over the largest one.
    """
    p, eps = _check_number("p", p, 1), _check_number("eps", eps, 0)
    excess, most, dead = _excess(weights, n, warm, 0.0)
    powers = torch.where(excess > 0, excess.clamp(min=0) ** p, 0.0)
    total = powers.sum(-1, keepdim=True)
    if eps:
        total = total + torch.exp(math.log(eps) - p * torch.log(most))
    return (powers / _divisor(total)).to(weights.dtype), dead


def log_weights(
    weights: Tensor, n: Tensor, p: float = 15, warm: int = 3, dead_tol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The log of sharpened weights without eps, -inf where clipped or dead, and the dead rows."""
    p, tolerance = _check_number("p", p, 1), _check_number("dead_tol", dead_tol, 0)
    excess, _, dead = _excess(weights, n, warm, tolerance)
    live = (excess > 0) & ~dead[..., None]
    logs = p * torch.log(torch.where(live, excess, 1.0))
    total = torch.where(live, torch.exp(logs), 0.0).sum(-1, keepdim=True)
    return torch.where(live, logs - torch.log(_divisor(total)), -torch.inf).to(weights.dtype), dead


def attend(weights: Tensor, v: Tensor) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv) of weights and v (batch, kv_heads, k_tokens, dv)."""
    check_tensor("weights", weights, MATRIX, FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "k_tokens", "dv"), FLOATS)
    check_same("v", v, "weights", weights)
    check_size("v", v.shape[0], weights.shape[0], "batch, as in weights")
    check_size("v", v.shape[2], weights.shape[3], "k_tokens, as in weights")
    if v.shape[1] < 1 or weights.shape[1] % v.shape[1]:
        raise ValueError(f"v: got {v.shape[1]} kv heads, expected a divisor of the heads")
    values = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    unread = (weights == 0).all(-2)[..., None]
    return product(weights, torch.where(unread, 0.0, values))


def _masked(q: Tensor, k: Tensor, causal: Any, mask: Any) -> tuple[Tensor, dict[str, Any]]:
    """The counts float32 (batch, q_tokens), and the engine's options for who sees whom.

    A mask of one row for all queries, which is padding, is never spread over the queries.
    """
    check_bool("causal", causal)
    batch, q_tokens, k_tokens = q.shape[0], q.shape[2], k.shape[2]
    if mask is None:
        counts = _counts(causal, q_tokens, k_tokens, None, q.device)
        return counts.float().expand(batch, -1), {"causal": causal}
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, expected torch.Tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected bool")
    check_device("mask", mask, "q", q)
    rows_fit = mask.dim() in (2, 3) and mask.shape[-2] in (1, q_tokens)
    if not rows_fit or mask.shape[-1] != k_tokens or mask.shape[:-2] not in ((), (batch,)):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected ({batch}, {q_tokens}, {k_tokens}), "
            "with one row for all queries or without batch if they are the same"
        )
    mask = mask.expand(batch, *mask.shape[-2:])
    shift = k_tokens - q_tokens
    if mask.shape[1] == 1 and q_tokens != 1:
        if not causal:
            counts = mask.sum(-1).expand(batch, q_tokens)
        else:
            so_far = torch.nn.functional.pad(mask[:, 0].cumsum(-1), (1, 0))
            last = (torch.arange(q_tokens, device=q.device) + (shift + 1)).clamp(0, k_tokens)
            counts = so_far[:, last]
        return counts.float(), {"causal": causal, "key_mask": mask[:, 0]}
    seen = mask
    if causal:
        rows = torch.arange(q_tokens, device=q.device)[:, None]
        seen = mask & (torch.arange(k_tokens, device=q.device) <= rows + shift)
    return seen.sum(-1).float(), {"causal": causal, "mask": mask[:, None]}


def lssa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    normalise_qk: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv) of length-scaled softplus attention.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv), d and dv up to 256; `mask` bool (batch, q_tokens or 1, k_tokens) or without batch, True =
    visible. Differentiable in q, k and v.
    """
    check_inputs(q, k, v, "numba")
    eps = _check_number("eps", eps, 0)
    check_bool("normalise_qk", normalise_qk)
    counts, options = _masked(q, k, causal, mask)
    return softplus(
        q, k, v, counts, factor=_factor(q.shape[3], normalise_qk), normalise=normalise_qk, eps=eps,
        backend=backend, **options,
    )  # fmt: skip


def lssar(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    p: float = 15,
    causal: bool = False,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    warm: int = 3,
    normalise_qk: bool = True,
    eps_mode: str = "additive",
    dead_tol: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv) of softplus attention with re-weighting.

    Arguments as in `lssa`. A whole `p` up to 32 is multiplied out, and compiled in on CUDA; others
    go through logarithms. Differentiable in q, k and v.
    """
    check_inputs(q, k, v, "numba")
    p, eps = _check_number("p", p, 1), _check_number("eps", eps, 0)
    check_integer("warm", warm, least=1)
    check_choice("eps_mode", eps_mode, ("additive", "logspace"))
    tolerance = _check_number("dead_tol", dead_tol, 0)
    check_bool("normalise_qk", normalise_qk)
    second = Sharpening(p, warm, eps) if eps_mode == "additive" else None
    counts, options = _masked(q, k, causal, mask)
    return softplus(
        q, k, v, counts, factor=_factor(q.shape[3], normalise_qk), normalise=normalise_qk, eps=eps,
        sharpening=second or Sharpening(p, warm, 0.0, tolerance), backend=backend, **options,
    )  # fmt: skip


def step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    p: float | None = None,
    eps: float = 1e-8,
    warm: int = 3,
    normalise_qk: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Outputs (batch, heads, tokens, dv) of new tokens, and the state that includes them.

    The state is dense attention's and grows **in place**; the first one is `attention.init_state`.
    Without `p` it is LSSA. For inference: there is no gradient.
    """
    check_inputs(q, k, v, "numba")
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    for name, cached, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        check_same(name, cached, "q", q)
        if cached.shape[:2] != new.shape[:2] or cached.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name}: got shape {tuple(cached.shape)}, expected that of {tuple(new.shape)}"
            )
    if p is not None:
        _check_number("p", p, 1)
    check_integer("warm", warm, least=1)
    _check_number("eps", eps, 0)
    check_bool("normalise_qk", normalise_qk)
    room = getattr(state, "room", None)
    (keys, values), room = append(room, (state.k, state.v), (k.detach(), v.detach()))
    options: dict[str, Any] = {"causal": True, "eps": eps, "normalise_qk": normalise_qk}
    if p is None:
        out = lssa(q.detach(), keys, values, backend=backend, **options)
    else:
        out = lssar(q.detach(), keys, values, p=p, warm=warm, backend=backend, **options)
    return out, State(keys, values, room)
