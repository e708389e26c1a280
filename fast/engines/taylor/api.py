"""The Taylor engine's Python surface: argument checks, then a plan or a custom op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_device,
    check_integer,
    check_size,
    check_tensor,
    choose_backend,
    wide_dtype,
)
from attnspec.fast.engines.taylor import numba_plan
from attnspec.fast.engines.taylor.layout import pack, packed_count, unpack, unpacked_count
from attnspec.fast.engines.taylor.op import taylor_op, taylor_step_op

WIDEST = 256


def taylor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    eps: float = 1e-12,
    causal: bool = False,
    key_mask: Tensor | None = None,
    use_norm: bool = True,
    state: tuple[Tensor | None, Tensor | None] | None = None,
    offsets: Tensor | None = None,
    want_state: bool = False,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention with the weights 1 + s + s^2 / 2, s = scale q . k, in time linear in the tokens.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv), d and dv up to 256. Returns o, shaped as q but dv wide, and the state (S, zk) with all
    keys, float32 (float64 for float64 inputs), (batch, kv_heads, 1 + d + d * d, dv) and without dv,
    or None unless `want_state`. `causal` is aligned at the end (K3), `key_mask` bool (batch,
    k_tokens) is True for a real key, a row that sees nothing is 0 (K4). `state` holds earlier
    tokens, with equal lengths if causal. `offsets` (sequences + 1) packs sequences in a batch of
    one: causal, equal lengths, no mask and no state before; states are then one for each sequence.

    Differentiable in q, k, v and the state. `chunk` is a hint: the tokens between two states that
    the kernels keep, rounded up to 16 on the CPU and to 64 on CUDA.
    """
    backend = _check(q, k, v, backend)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, ("batch", "k_tokens"), (torch.bool,))
        expected = (k.shape[0], k.shape[2])
        if tuple(key_mask.shape) != expected:
            raise ValueError(f"key_mask: got shape {tuple(key_mask.shape)}, expected {expected}")
        check_device("key_mask", key_mask, "q", q)
    if chunk is not None:
        check_integer("chunk", chunk, least=1)
    if offsets is not None:
        check_tensor("offsets", offsets, ("sequences + 1",), (torch.int64, torch.int32))
        if offsets.shape[0] < 2:
            raise ValueError(f"offsets: got {offsets.shape[0]} numbers, expected 2 or more")
        check_size("q", q.shape[0], 1, "batch, with offsets")
        check_device("offsets", offsets, "q", q)
    if causal and (state is not None or offsets is not None or want_state):
        check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    full = None if state is None else _full_state(state, q, k, v)
    if causal and q.shape[2] > k.shape[2]:
        unseeing = q.shape[2] - k.shape[2]
        o, S, zk = taylor(
            q[:, :, unseeing:], k, v, scale=scale, eps=eps, causal=True, key_mask=key_mask,
            use_norm=use_norm, chunk=chunk, backend=backend,
        )  # fmt: skip
        return pad(o, (0, 0, unseeing, 0)), S, zk
    if backend == "numba":
        if offsets is None:
            o, last = numba_plan.attend(
                q, k, v, key_mask, full, causal, scale, eps, use_norm, want_state, chunk or 0
            )
        else:
            o, last = numba_plan.attend_packed(
                q, k, v, offsets, scale, eps, use_norm, want_state, chunk or 0
            )
        return (o, None, None) if last is None else (o, *last)
    d, dv = q.shape[3], v.shape[3]
    first = None
    if full is not None:
        first = torch.cat([pack(full[0], d, -2).flatten(-2), pack(full[1], d, -1)], dim=-1)
    o, _, total = taylor_op(
        q, k, v, key_mask, first, offsets, causal, scale, eps, use_norm, want_state, chunk or 0
    )
    if not want_state:
        return o, None, None
    many = packed_count(d) * dv
    S = unpack(total[..., :many].unflatten(-1, (-1, dv)), d, -2)
    zk = unpack(total[..., many:], d, -1)
    if full is not None:
        # What a packed state cannot hold, the difference of two features that are always equal.
        S = S + (full[0] - unpack(pack(full[0], d, -2), d, -2))
        zk = zk + (full[1] - unpack(pack(full[1], d, -1), d, -1))
    return o, S, zk


def step(
    S: Tensor,
    zk: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    eps: float = 1e-12,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o (batch, heads, 1, dv) of one more token after the state, and the state with it: one kernel
    on CUDA, which reads and writes the state once; not differentiable.
    """
    backend = _check(q, k, v, backend)
    check_size("q", q.shape[2], 1, "one token")
    check_size("k", k.shape[2], 1, "one token")
    for name, x, shape in zip(("S", "zk"), (S, zk), _state_shapes(k, v), strict=True):
        _check_state(name, x, shape, q)
    if backend == "numba":
        return numba_plan.step(S, zk, q, k, v, scale, eps)
    return taylor_step_op(S, zk, q, k, v, scale, eps)


def _state_shapes(k: Tensor, v: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = (*k.shape[:2], unpacked_count(k.shape[3]))
    return (*shape, v.shape[3]), shape


def _full_state(
    state: tuple[Tensor | None, Tensor | None], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Both parts of a state in the dtype of states, zeros for one that is not given."""
    parts = []
    for name, x, shape in zip(("S0", "zk0"), state, _state_shapes(k, v), strict=True):
        if x is None:
            parts.append(torch.zeros(shape, dtype=wide_dtype(q), device=q.device))
        else:
            _check_state(name, x, shape, q)
            parts.append(x.to(wide_dtype(q)))
    return parts[0], parts[1]


def _check(q: Any, k: Any, v: Any, backend: str | None) -> str:
    """The backend, once q, k and v fit one another."""
    chosen = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    check_attention_inputs(q, k, v, *([FLOATS] if chosen == "numba" else []))
    for name, width in (("q", q.shape[3]), ("v", v.shape[3])):
        if not 1 <= width <= WIDEST:
            raise ValueError(f"{name}: got {width} channels, expected 1 to {WIDEST}")
    if chosen == "triton" and not q.is_cuda and q.dtype == torch.bfloat16:
        raise TypeError("q: got dtype torch.bfloat16, expected another in Triton's interpreter")
    return chosen


def _check_state(name: str, x: Any, shape: tuple[int, ...], q: Tensor) -> None:
    axes = ("batch", "kv_heads", "D", "dv")[: len(shape)]
    check_tensor(name, x, axes, FLOATS)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(shape)}")
    check_device(name, x, "q", q)
