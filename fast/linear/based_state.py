"""Based as a recurrence on the Taylor engine: a state between any two tokens, in float32."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_device,
    check_integer,
    check_shape,
    check_tensor,
)
from attnspec.fast.engines.taylor import step, taylor, unpacked_count
from attnspec.fast.linear.based_features import checked_eps, chosen_scale


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
        k[:, :, :0], k, v, scale=chosen_scale(scale, k.shape[3]), state=(S, zk), want_state=True,
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
        q, k, v, scale=chosen_scale(scale, q.shape[3]), eps=checked_eps(eps), state=(S, zk),
        backend=backend,
    )[0]  # fmt: skip


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
    return step(
        S, zk, q, k, v, scale=chosen_scale(scale, q.shape[3]), eps=checked_eps(eps), backend=backend
    )


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
        q, k, v, causal=True, scale=chosen_scale(scale, q.shape[3]), eps=checked_eps(eps),
        state=state, want_state=True, chunk=chunk, backend=backend,
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
        q[None], k[None], v[None], causal=True, scale=chosen_scale(scale, q.shape[2]),
        eps=checked_eps(eps), offsets=offsets, want_state=True, backend=backend,
    )  # fmt: skip
    assert S is not None
    assert zk is not None
    return o[0], S, zk


def _state_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*k.shape[:2], unpacked_count(k.shape[3]), v.shape[3])


def _check_state(name: str, x: Any, shape: tuple[int, ...], like: Tensor) -> None:
    check_tensor(name, x, ("batch", "kv_heads", "D", "dv")[: len(shape)], FLOATS)
    check_shape(name, x, shape)
    check_device(name, x, "the tokens", like)
