"""Based on the Taylor engine (linear attention) and the flash engine (the window layer).

The quadratic, the chunked and the recurrent form of the chapter are one computation here, linear in
the tokens, with the state in float32. On CUDA the features live in registers only. On the CPU a
state alone, without tokens of its own to attend to, is a matrix product in torch.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_bool,
    check_device,
    check_integer,
    check_same,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.taylor import (
    CANDIDATES,
    step,
    taylor,
    unpacked_count,
    unpacked_features,
    use_config,
)
from attnspec.fast.linear.based_layers import gated_convolution, layer_kinds

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
        "triton": {"graph": True, "dtypes": ("float32",)},
    },
    "based_packed": {"triton": {"dtypes": ("float32",)}},
    "based_decode_step": {"compiled": True, "triton": {"graph": True}},
    "based_state_update": {"numba": {"launches": None}, "triton": {"dtypes": ("float32",)}},
    "based_read": {"numba": {"launches": None}},
    "sliding_window_attend": {"blocks": (16, 64)},
}
"""What the suite is told beyond the defaults; what launches nothing is a few products in torch. On
CUDA the states of 16-bit keys are sums of rounded features, which the suite does not allow: there
they are claimed in float32."""


def taylor_features(
    x: Tensor, *, packed: bool = False, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Features (..., D) of x (..., d), D = 1 + d + d * d or, if `packed`, 1 + d + d (d + 1) / 2.

    Formed in float32 at least and returned in the dtype of x. Differentiable. Only to look at: no
    operation of ours needs them in memory.
    """
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError("x: got shape (), expected (..., d)")
    check_tensor("x", x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)
    check_bool("packed", packed)
    d = x.shape[-1]
    features = unpacked_features(wide(x), _scale(scale, d))
    if packed:
        row, column = torch.triu_indices(d, d, device=x.device)
        kept = features.index_select(-1, 1 + d + row * d + column)
        factor = 1 + (row < column).to(features.dtype) * (math.sqrt(2) - 1)
        features = torch.cat([features[..., : 1 + d], kept * factor], dim=-1)
    return features.to(x.dtype)


def taylor_weights(
    q: Tensor, k: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Weights (batch, heads, q_tokens, k_tokens) before any mask, in the dtype of q."""
    check_attention_inputs(q, k, k, FLOATS)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = _scale(scale, q.shape[3]) * product(wide(q), wide(keys).mT)
    return (1 + s + 0.5 * s * s).to(q.dtype)


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
        q, k, v, causal=causal, scale=_scale(scale, q.shape[3]), eps=_eps(eps), key_mask=key_mask,
        use_norm=use_norm, backend=backend,
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
    _check_shape("do", do, (*q.shape[:3], v.shape[3]))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = based_attend(
            *leaves, causal=causal, scale=scale, eps=eps, key_mask=key_mask, use_norm=use_norm,
            backend=backend,
        )  # fmt: skip
        dq, dk, dv = torch.autograd.grad(o, leaves, do)
    return dq, dk, dv


def based_state_update(
    S: Tensor,
    zk: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A new state, float32, with the tokens of k and v in it.

    S (batch, kv_heads, D, dv) and zk (batch, kv_heads, D) in any float dtype, D = 1 + d + d * d;
    k (batch, kv_heads, tokens, d), v (batch, kv_heads, tokens, dv). Differentiable.
    """
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), FLOATS)
    check_attention_inputs(k, k, v, FLOATS)
    _check_state("S", S, _state_shape(k, v), k)
    _check_state("zk", zk, _state_shape(k, v)[:-1], k)
    _, new_S, new_zk = taylor(
        k[:, :, :0], k, v, scale=_scale(scale, k.shape[3]), state=(S, zk), want_state=True,
        backend=backend,
    )  # fmt: skip
    assert new_S is not None
    assert new_zk is not None
    return new_S, new_zk


def based_read(
    q: Tensor,
    S: Tensor,
    zk: Tensor,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """o (batch, heads, q_tokens, dv), every query reading the same state. Differentiable.

    q (batch, heads, q_tokens, d), S (batch, kv_heads, D, dv), zk (batch, kv_heads, D).
    """
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_tensor("S", S, ("batch", "kv_heads", "D", "dv"), FLOATS)
    kv_heads = S.shape[1]
    if kv_heads < 1 or q.shape[1] % kv_heads:
        raise ValueError(
            f"S: got {kv_heads} kv heads for {q.shape[1]} query heads, "
            f"expected a divisor of {q.shape[1]}"
        )
    shape = (q.shape[0], kv_heads, unpacked_count(q.shape[3]))
    _check_state("S", S, (*shape, S.shape[3]), q)
    _check_state("zk", zk, shape, q)
    k, v = q.new_empty(*shape[:2], 0, q.shape[3]), q.new_empty(*shape[:2], 0, S.shape[3])
    return taylor(
        q, k, v, scale=_scale(scale, q.shape[3]), eps=_eps(eps), state=(S, zk), backend=backend
    )[0]


def based_decode_step(
    S: Tensor,
    zk: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o (batch, heads, 1, dv) of one token, and a new state, float32, with it.

    S (batch, kv_heads, D, dv), zk (batch, kv_heads, D), q (batch, heads, 1, d), k and v with
    kv_heads. On CUDA one kernel, which reads and writes the state once; nothing waits for the GPU.
    For inference: there is no gradient.
    """
    check_attention_inputs(q, k, v, FLOATS)
    _check_state("S", S, _state_shape(k, v), q)
    _check_state("zk", zk, _state_shape(k, v)[:-1], q)
    return step(S, zk, q, k, v, scale=_scale(scale, q.shape[3]), eps=_eps(eps), backend=backend)


def based_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int,
    S0: Tensor | None = None,
    zk0: Tensor | None = None,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal o (batch, heads, tokens, dv) and the state (S, zk), float32, behind the last token.

    q (batch, heads, tokens, d), k (batch, kv_heads, tokens, d), v (batch, kv_heads, tokens, dv); S0
    (batch, kv_heads, D, dv) and zk0 (batch, kv_heads, D) in any float dtype are the state before,
    each zero if None. No result depends on `chunk`: it is how many tokens the kernels leave between
    two states, rounded up to 16 on the CPU and to 64 on CUDA, where 512 is fast for d = 16.
    Differentiable in q, k, v, S0 and zk0.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_integer("chunk", chunk, least=1)
    state = None if S0 is None and zk0 is None else (S0, zk0)
    o, S, zk = taylor(
        q, k, v, causal=True, scale=_scale(scale, q.shape[3]), eps=_eps(eps), state=state,
        want_state=True, chunk=chunk, backend=backend,
    )  # fmt: skip
    assert S is not None
    assert zk is not None
    return o, S, zk


def based_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention inside each of the sequences laid end to end, and their last states.

    q (heads, total, d), k (kv_heads, total, d), v (kv_heads, total, dv), offsets int (sequences +
    1) increasing from 0 to total, which is checked on the CPU only. Returns o (heads, total, dv),
    S (sequences, kv_heads, D, dv) and zk (sequences, kv_heads, D). Differentiable.
    """
    for name, x, axes in (
        ("q", q, ("heads", "total", "d")),
        ("k", k, ("kv_heads", "total", "d")),
        ("v", v, ("kv_heads", "total", "dv")),
    ):
        check_tensor(name, x, axes, FLOATS)
    o, S, zk = taylor(
        q[None], k[None], v[None], causal=True, scale=_scale(scale, q.shape[2]), eps=_eps(eps),
        offsets=offsets, want_state=True, backend=backend,
    )  # fmt: skip
    assert S is not None
    assert zk is not None
    return o[0], S, zk


def sliding_window_attend(
    q: Tensor, k: Tensor, v: Tensor, left: int, *, backend: str | None = None
) -> Tensor:
    """o (batch, heads, q_tokens, dv) of softmax attention to the last left + 1 keys.

    Differentiable; q, k and v as in `based_attend`, but for the width of their own heads.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_integer("left", left, least=0)
    return flash(q, k, v, causal=True, window=left + 1, backend=backend)[0]


def _scale(scale: Any, d: int) -> float:
    if scale is None:
        return max(d, 1) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {scale!r}, expected a number above 0 or None")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, expected a number above 0")
    return float(scale)


def _eps(eps: Any) -> float:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {eps!r}, expected a number >= 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number >= 0")
    return float(eps)


def _state_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*k.shape[:2], unpacked_count(k.shape[3]), v.shape[3])


def _check_state(name: str, x: Any, shape: tuple[int, ...], like: Tensor) -> None:
    check_tensor(name, x, ("batch", "kv_heads", "D", "dv")[: len(shape)], FLOATS)
    _check_shape(name, x, shape)
    check_device(name, x, "the tokens", like)


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(shape)}")
