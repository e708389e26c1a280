"""TempScale on the flash engine: the temperature is folded into the softmax scale and is free.

The steps that hand out whole matrices, and the diagnostics, are torch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.backend import FLOATS, check_attention_inputs, check_positive, wide_dtype
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash, mask_options
from attnspec.fast.scores.tempscale_collapse import (
    attention_entropy,
    centre_distance,
    dc,
    filter_gain,
    hc,
    pairwise_cosine,
    retention,
    token_spectrum,
)
from attnspec.fast.scores.tempscale_steps import (
    attend,
    check_temperatures,
    scores,
    softmax_rows,
    temper,
)

__all__ = [
    "attend",
    "attention_entropy",
    "centre_distance",
    "dc",
    "filter_gain",
    "hc",
    "pairwise_cosine",
    "retention",
    "scores",
    "softmax_rows",
    "temper",
    "tempered_attention",
    "token_spectrum",
]

CLAIMS: dict[str, dict[str, Any]] = {
    **{name: {"launches": None} for name in __all__},
    "temper": {"gradient": True, "launches": None},
    "tempered_attention": {
        "gradient": True,
        "limits": {"bias": (False,)},
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
}


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

    One temperature for each head costs a copy of q, and in float16 and bfloat16, where a query
    divided and rounded again would move large scores, the whole attention runs in float32. A `bias`
    is refused.
    """
    check_attention_inputs(q, k, v, FLOATS)
    if bias is not None:
        raise ValueError("bias: got one, expected None: the flash engine adds no bias")
    if scale is not None:
        check_positive("scale", scale)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    options = {"causal": causal, "backend": backend, **mask_options(k, mask)}
    if not isinstance(tau, Tensor):
        check_positive("tau", tau)
        return flash(q, k, v, scale=scale / float(tau), **options)
    check_temperatures(tau, q)
    wide = wide_dtype(q)
    tempered = q.to(wide) / tau.to(wide)[:, None, None]
    out, lse = flash(tempered, k.to(wide), v.to(wide), scale=scale, **options)
    return out.to(q.dtype), lse
