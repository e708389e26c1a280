"""The scan engine's Python surface: argument checks, then one custom op each."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_device,
    check_integer,
    check_size,
    check_tensor,
    choose_backend,
    unobserved,
    wide_dtype,
)
from attnspec.fast.engines.scan.op import (
    outputs_op,
    run_scan,
    scan_backward_op,
    scan_op,
    states_op,
    step_op,
)
from attnspec.fast.engines.scan.replay import alias, kind, known

WIDEST = 256


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Tensor | None = None,
    log_decay: Tensor | None = None,
    reads: Tensor | None = None,
    writes: Tensor | None = None,
    state: Tensor | None = None,
    scale: float = 1.0,
    offsets: Tensor | None = None,
    block: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = scale r_t S_t^T q_t with S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T; o and the last state.

    q (batch, heads, tokens, d), k (batch, kv_heads, tokens, d), v (batch, kv_heads, tokens, dv);
    o (batch, heads, tokens, dv). g is 0, or -`slopes` (heads,) >= 0, or `log_decay` <= 0, either
    (batch, heads, tokens) or, with a decay for every channel of k, (batch, heads, tokens, d); -inf
    forgets everything. r and w are 1, or `reads` (batch, heads, tokens) and `writes` (batch,
    kv_heads, tokens), not beside a decay for every channel. `state` and the last state are float32
    (batch, heads, d, dv). `offsets` int (sequences + 1), increasing from 0 to tokens, packs
    sequences in a batch of one, and the states are then (sequences, heads, d, dv).

    Differentiable in q, k, v, slopes, log_decay, reads, writes and state. The state is kept in
    float32 and rounded to the dtype of q only where it enters a matrix product. `block` is a hint:
    the rows of a matrix product, rounded to a power of two from 16 to 128; 16 for float32 on
    Triton. Values that are not as stated above raise on the CPU; on CUDA they are not read.
    """
    tensors = (q, k, v, slopes, log_decay, reads, writes, state, offsets)
    direct = unobserved(*tensors)
    key: Hashable = None
    if direct and isinstance(q, Tensor) and (q.is_cuda or backend == "triton"):
        key = kind(tensors, (scale, block, backend))
        replay = known(key)
        if replay is not None:
            o, last = replay(tensors)
            return o, last
    backend = _check(q, k, v, backend)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    _check_decay(q, q.shape[1], slopes, log_decay)
    _check_weights("reads", reads, q, q.shape[1], log_decay)
    _check_weights("writes", writes, q, k.shape[1], log_decay)
    sequences = q.shape[0]
    if offsets is not None:
        check_tensor("offsets", offsets, ("sequences + 1",), (torch.int64, torch.int32))
        check_size("q", q.shape[0], 1, "batch, with offsets")
        if offsets.shape[0] < 2:
            raise ValueError(f"offsets: got {offsets.shape[0]} numbers, expected 2 or more")
        check_device("offsets", offsets, "q", q)
        sequences = offsets.shape[0] - 1
    if state is not None:
        _check_state("state", state, (sequences, q.shape[1], q.shape[3], v.shape[3]), q)
    if block is not None:
        check_integer("block", block, least=1)
    options = (float(scale), block or 0)
    result = (run_scan if direct else scan_op)(*tensors, *options, backend)
    if key is not None:
        alias(key, kind(tensors, options))
    return result


def scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dfinal: Tensor | None = None,
    *,
    slopes: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    scale: float = 1.0,
    offsets: Tensor | None = None,
    block: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, the gradient of the decay (empty if there is none) and of the state, from the
    gradients `do` of o and `dfinal` of the last state of `scan` without weights; not
    differentiable.
    """
    with torch.no_grad():
        options: dict[str, Any] = {"scale": scale, "offsets": offsets, "block": block}
        options |= {"slopes": slopes, "log_decay": log_decay, "state": state}
        _, final = scan(q, k, v, **options, backend=backend)
        check_tensor("do", do, ("batch", "heads", "tokens", "dv"), (q.dtype,))
        _check_shape("do", do, (*q.shape[:3], v.shape[3]))
        if dfinal is None:
            dfinal = torch.zeros_like(final)
        _check_state("dfinal", dfinal, tuple(final.shape), q)
        wanted = slopes is not None or log_decay is not None
        dq, dk, dv, ddecay, _, _, dstate = scan_backward_op(
            do, dfinal, q, k, v, slopes, log_decay, None, None, state, offsets, final, float(scale),
            block or 0, wanted, choose_backend(backend, q),
        )  # fmt: skip
        return dq, dk, dv, ddecay, dstate


def segment_states(
    k: Tensor,
    v: Tensor,
    segment: int,
    *,
    heads: int | None = None,
    slopes: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The states (batch, heads, ceil(tokens / segment), d, dv) of `scan` before every `segment`
    tokens, and the last state. `heads` is the number of states, kv_heads by default; not
    differentiable.
    """
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), FLOATS)
    backend = _check(k, k, v, backend)
    check_integer("segment", segment, least=1)
    heads = k.shape[1] if heads is None else heads
    check_integer("heads", heads, least=1)
    if heads % k.shape[1]:
        raise ValueError(f"heads: got {heads}, expected a multiple of {k.shape[1]} (kv_heads)")
    _check_decay(k, heads, slopes, log_decay)
    if state is not None:
        _check_state("state", state, (k.shape[0], heads, k.shape[3], v.shape[3]), k)
    return states_op(k, v, slopes, log_decay, state, heads, segment, backend)


def segment_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entering: Tensor,
    segment: int,
    *,
    slopes: Tensor | None = None,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """o of `scan` from the states before every `segment` tokens; not differentiable."""
    backend = _check(q, k, v, backend)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    check_integer("segment", segment, least=1)
    _check_decay(q, q.shape[1], slopes, log_decay)
    many = (q.shape[2] + segment - 1) // segment
    _check_state("entering", entering, (*q.shape[:2], many, q.shape[3], v.shape[3]), q)
    return outputs_op(q, k, v, slopes, log_decay, entering, float(scale), segment, backend)


def step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Tensor | None = None,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o (batch, heads, 1, dv) of one more token after `state`, and the state with it: one kernel, a
    new state, no host synchronisation; not differentiable.
    """
    backend = _check(q, k, v, backend)
    check_size("q", q.shape[2], 1, "one token")
    check_size("k", k.shape[2], 1, "one token")
    _check_decay(q, q.shape[1], slopes, log_decay)
    _check_state("state", state, (*q.shape[:2], q.shape[3], v.shape[3]), q)
    tensors = (state, q, k, v, slopes, log_decay)
    return step_op(*tensors, float(scale), backend)


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


def _check_decay(q: Tensor, heads: int, slopes: Any, log_decay: Any) -> None:
    if slopes is not None and log_decay is not None:
        raise ValueError("log_decay: got one beside slopes, expected one of the two")
    if slopes is not None:
        check_tensor("slopes", slopes, ("heads",), FLOATS)
        check_size("slopes", slopes.shape[0], heads, "heads")
        check_device("slopes", slopes, "q", q)
    if log_decay is not None:
        wide = isinstance(log_decay, Tensor) and log_decay.dim() == 4
        axes = ("batch", "heads", "tokens", "d") if wide else ("batch", "heads", "tokens")
        check_tensor("log_decay", log_decay, axes, FLOATS)
        shape = (q.shape[0], heads, *q.shape[2:]) if wide else (q.shape[0], heads, q.shape[2])
        _check_shape("log_decay", log_decay, shape)
        check_device("log_decay", log_decay, "q", q)


def _check_weights(name: str, weights: Any, q: Tensor, heads: int, log_decay: Any) -> None:
    if weights is None:
        return
    check_tensor(name, weights, ("batch", "heads", "tokens"), FLOATS)
    _check_shape(name, weights, (q.shape[0], heads, q.shape[2]))
    check_device(name, weights, "q", q)
    if log_decay is not None and log_decay.dim() == 4:
        raise ValueError(f"{name}: got weights beside a decay for every channel, expected None")


def _check_state(name: str, state: Any, shape: tuple[int, ...], q: Tensor) -> None:
    axes = ("batch", "heads", "d", "dv") if len(shape) == 4 else (
        "batch", "heads", "segments", "d", "dv",
    )  # fmt: skip
    check_tensor(name, state, axes, (wide_dtype(q),))
    _check_shape(name, state, shape)
    check_device(name, state, "q", q)


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(shape)}")
