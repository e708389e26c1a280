"""TempScale on the flash engine: the temperature is folded into the softmax scale and is free."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import check_attention_inputs
from attnspec.fast.dense.attention import mask_options
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.flash.checks import FLOATS, LARGEST_HEAD, check_heads

CLAIMS = {"tempered_attention": {"gradient": True, "limits": {"bias": (False,)}}}


def tempered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float | Tensor = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, q_tokens, dv) and lse (batch, heads, q_tokens), float32, at `tau`.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv); `tau` is a number, or a tensor (heads,) whose values are checked on CPU tensors only: a
    check on a CUDA device would wait for it. `mask` is bool and broadcasts to the scores, True =
    visible. lse is that of the tempered scores. Differentiable in q, k, v and a tensor `tau`.

    One temperature for each head costs a copy of q, and in float16 and bfloat16 scores of twice the
    width, so that d is at most 128 there. A `bias` is refused.
    """
    check_attention_inputs(q, k, v, FLOATS)
    if bias is not None:
        raise ValueError("bias: got one, expected None: the flash engine adds no bias")
    if scale is not None:
        _check_positive("scale", scale)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if isinstance(tau, Tensor):
        q, k = _fold(q, k, tau)
    else:
        _check_positive("tau", tau)
        scale /= float(tau)
    return flash(q, k, v, causal=causal, scale=scale, backend=backend, **mask_options(k, mask))


def _fold(q: Tensor, k: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """q / tau beside the k that goes with it.

    A quotient rounded to 16 bits would move large scores, so what rounding takes off is kept as a
    second half of the width, against the same keys again.
    """
    _check_temperatures(q, tau)
    if q.dtype not in (torch.float16, torch.bfloat16):
        return q / tau[:, None, None], k
    if 2 * q.shape[3] > LARGEST_HEAD:
        raise ValueError(
            f"tau: got one for each head with d {q.shape[3]} in {q.dtype}, "
            f"expected d <= {LARGEST_HEAD // 2}"
        )
    exact = q.float() / tau.float()[:, None, None]
    high = exact.to(q.dtype)
    low = (exact - high.float()).to(q.dtype)
    return torch.cat((high, low), dim=3), torch.cat((k, k), dim=3)


def _check_temperatures(q: Tensor, tau: Tensor) -> None:
    check_heads(q, "tau", tau)
    if tau.dtype != q.dtype:
        raise TypeError(f"tau: got dtype {tau.dtype}, expected {q.dtype}, as q")
    known = not tau.is_cuda and not torch.compiler.is_compiling()
    if known and not bool(((tau > 0) & torch.isfinite(tau)).all()):
        raise ValueError(f"tau: got {tau.tolist()}, expected finite numbers > 0")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a finite number > 0")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: got {value}, expected a finite number > 0")
