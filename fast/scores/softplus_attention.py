"""Softplus attention on the softplus engine: one sweep for LSSA, two for LSSAR.

The steps that hand out whole matrices are torch, in float32 for 16-bit inputs and rounded once.
Unit vectors are never written: the kernels multiply raw products by the inverse lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    check_bool,
    check_choice,
    check_device,
    check_integer,
    check_same,
    check_size,
)
from attnspec.fast.dense.attention import State
from attnspec.fast.engines.flash.checks import check_inputs
from attnspec.fast.engines.softplus import Sharpening, softplus
from attnspec.fast.growing import append
from attnspec.fast.scores.softplus_attention_steps import (
    attend,
    check_number,
    counts_on,
    log_weights,
    logit_factor,
    lssa_logits,
    lssa_scores,
    lssa_weights,
    reweight,
    row_sum,
    unit,
    visible_counts,
)

__all__ = [
    "attend",
    "log_weights",
    "lssa",
    "lssa_logits",
    "lssa_scores",
    "lssa_weights",
    "lssar",
    "reweight",
    "row_sum",
    "step",
    "unit",
    "visible_counts",
]

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


def _masked(q: Tensor, k: Tensor, causal: Any, mask: Any) -> tuple[Tensor, dict[str, Any]]:
    """The counts float32 (batch, q_tokens), and the engine's options for who sees whom.

    A mask of one row for all queries, which is padding, is never spread over the queries.
    """
    check_bool("causal", causal)
    batch, q_tokens, k_tokens = q.shape[0], q.shape[2], k.shape[2]
    if mask is None:
        counts = counts_on(causal, q_tokens, k_tokens, None, q.device)
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
    eps = check_number("eps", eps, 0)
    check_bool("normalise_qk", normalise_qk)
    counts, options = _masked(q, k, causal, mask)
    return softplus(
        q, k, v, counts, factor=logit_factor(q.shape[3], normalise_qk), normalise=normalise_qk,
        eps=eps, backend=backend, **options,
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
    p, eps = check_number("p", p, 1), check_number("eps", eps, 0)
    check_integer("warm", warm, least=1)
    check_choice("eps_mode", eps_mode, ("additive", "logspace"))
    tolerance = check_number("dead_tol", dead_tol, 0)
    check_bool("normalise_qk", normalise_qk)
    second = Sharpening(p, warm, eps) if eps_mode == "additive" else None
    counts, options = _masked(q, k, causal, mask)
    return softplus(
        q, k, v, counts, factor=logit_factor(q.shape[3], normalise_qk), normalise=normalise_qk,
        eps=eps, sharpening=second or Sharpening(p, warm, 0.0, tolerance), backend=backend,
        **options,
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
        check_number("p", p, 1)
    check_integer("warm", warm, least=1)
    check_number("eps", eps, 0)
    check_bool("normalise_qk", normalise_qk)
    room = getattr(state, "room", None)
    (keys, values), room = append(room, (state.k, state.v), (k.detach(), v.detach()))
    options: dict[str, Any] = {"causal": True, "eps": eps, "normalise_qk": normalise_qk}
    if p is None:
        out = lssa(q.detach(), keys, values, backend=backend, **options)
    else:
        out = lssar(q.detach(), keys, values, p=p, warm=warm, backend=backend, **options)
    return out, State(keys, values, room)
