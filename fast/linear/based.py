"""Based on the Taylor engine (linear attention) and the flash engine (the window layer).

The quadratic, the chunked and the recurrent form of the chapter are one computation here, linear in
the tokens, with the state in float32. On CUDA the features live in registers only. On the CPU a
state alone, without tokens of its own to attend to, is a matrix product in torch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_bool,
    check_integer,
    check_same,
    check_shape,
    check_tensor,
)
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.taylor import CANDIDATES, taylor, use_config
from attnspec.fast.linear.based_features import (
    checked_eps,
    chosen_scale,
    taylor_features,
    taylor_weights,
)
from attnspec.fast.linear.based_layers import gated_convolution, layer_kinds
from attnspec.fast.linear.based_state import (
    based_chunk,
    based_decode_step,
    based_packed,
    based_read,
    based_state_update,
)

__all__ = [
    "based_attend",
    "based_backward",
    "based_chunk",
    "based_decode_step",
    "based_packed",
    "based_read",
    "based_state_update",
    "gated_convolution",
    "layer_kinds",
    "sliding_window_attend",
    "taylor_features",
    "taylor_weights",
]

EXACT_STATES = {"dtypes": ("float32", "float16")}
CONFIGS = {str(c): functools.partial(use_config, c) for c in CANDIDATES}
CLAIMS = {
    "taylor_features": {"gradient": True, "launches": None},
    "taylor_weights": {"launches": None},
    "gated_convolution": {"launches": None},
    "based_attend": {
        "gradient": True,
        "compiled": True,
        "blocks": (16, 64, 128),
        "triton": {"graph": True, "configs": CONFIGS},
    },
    "based_chunk": {
        "gradient": True,
        "compiled": True,
        "blocks": (16, 64, 128),
        "triton": {"graph": True, **EXACT_STATES},
    },
    "based_packed": {"gradient": True, "triton": EXACT_STATES},
    "based_decode_step": {"compiled": True, "triton": {"graph": True}},
    "based_state_update": {"numba": {"launches": None}, "triton": EXACT_STATES},
    "based_read": {"numba": {"launches": None}},
    "sliding_window_attend": {"gradient": True, "blocks": (16, 64)},
}
"""What the suite is told beyond the defaults; what launches nothing is a few products in torch. On
CUDA the features of bfloat16 keys are rounded before they are summed to states, which the suite
does not allow of float32 outputs; those of float16 keys, whose products are float32, are not."""


def based_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-12,
    key_mask: Tensor | None = None,
    use_norm: bool = True,
    backend: str | None = None,
) -> Tensor:
    """o (batch, heads, q_tokens, dv), in time linear in the tokens.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv), `key_mask` bool (batch, k_tokens), True = a real key; d and dv up to 256, d = 16 being what
    the method is for. Differentiable in q, k and v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_bool("causal", causal)
    check_bool("use_norm", use_norm)
    return taylor(
        q, k, v, causal=causal, scale=chosen_scale(scale, q.shape[3]), eps=checked_eps(eps),
        key_mask=key_mask, use_norm=use_norm, backend=backend,
    )[0]  # fmt: skip


def based_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-12,
    key_mask: Tensor | None = None,
    use_norm: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `based_attend`; do (batch, heads, q_tokens, dv)."""
    check_attention_inputs(q, k, v, FLOATS)
    check_tensor("do", do, ("batch", "heads", "q_tokens", "dv"), FLOATS)
    check_same("do", do, "q", q)
    check_shape("do", do, (*q.shape[:3], v.shape[3]))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = based_attend(
            *leaves, causal=causal, scale=scale, eps=eps, key_mask=key_mask, use_norm=use_norm,
            backend=backend,
        )  # fmt: skip
        dq, dk, dv = torch.autograd.grad(o, leaves, do)
    return dq, dk, dv


def sliding_window_attend(
    q: Tensor, k: Tensor, v: Tensor, left: int, *, backend: str | None = None
) -> Tensor:
    """o (batch, heads, q_tokens, dv) of softmax attention to the last left + 1 keys.

    Differentiable; q, k and v as in `based_attend`, but for the width of their own heads.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_integer("left", left, least=0)
    return flash(q, k, v, causal=True, window=left + 1, backend=backend)[0]
