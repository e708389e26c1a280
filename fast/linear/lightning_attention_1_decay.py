"""TransNormerLLM's attention: every form of it is a plan for the scan engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_choice,
    check_integer,
    check_size,
)
from attnspec.fast.engines.scan import scan, scan_backward
from attnspec.fast.linear import lightning_attention_2 as lightning
from attnspec.fast.linear.lightning_attention_2_chunks import as_state, check_slopes, check_upstream

DECAY_RULES = ("geometric", "linear")


def slopes(H: int, *, backend: str | None = None) -> Tensor:
    """The base slopes (H,) of H heads, float64 on the CPU."""
    check_integer("H", H, least=1)
    return lightning.slopes(H)


def layer_slopes(
    H: int, l: int, L: int, *, decay_rule: str = "geometric", backend: str | None = None
) -> Tensor:
    """The slopes (H,) of layer `l` of `L`, float64 on the CPU; "linear" is the paper's rule."""
    for name, value, least in (("H", H, 1), ("L", L, 1), ("l", l, 0)):
        check_integer(name, value, least=least)
    if l >= L:
        raise ValueError(f"l: got {l}, expected an integer below {L} (L)")
    check_choice("decay_rule", decay_rule, DECAY_RULES)
    if decay_rule == "linear":
        return 8.0 * torch.arange(1, H + 1, dtype=torch.float64) / H * (1 - l / L)
    return lightning.layer_slopes(H, l, L)


def decay_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    S0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o (batch, H, T, e) and the last state S, float32 (batch, H, d', e); linear in the tokens.

    q and k (batch, H, T, d'), v (batch, H, T, e), slopes (H,), S0 (batch, H, d', e) in any float
    dtype. Differentiable in all of them.
    """
    S0 = _check(q, k, v, slopes, S0)
    return scan(q, k, v, slopes=slopes, state=S0, backend=backend)


def decay_attend_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    block: int,
    S0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What `decay_attend` returns; `block` is a hint for the kernels. Differentiable."""
    S0 = _check(q, k, v, slopes, S0)
    check_integer("block", block, least=1)
    return scan(q, k, v, slopes=slopes, state=S0, block=block, backend=backend)


def decay_attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    do: Tensor,
    block: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from a zero state, the state behind the last token unused."""
    _check(q, k, v, slopes, None)
    check_integer("block", block, least=1)
    check_upstream("do", do, (*q.shape[:3], v.shape[3]), q)
    return scan_backward(q, k, v, do, slopes=slopes, block=block, backend=backend)[:3]


def norm_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """o (batch, H, T, e), the causal product without a decay and a norm. Differentiable."""
    _check_heads(q, k, v)
    return scan(q, k, v, backend=backend)[0]


def _check(q: Any, k: Any, v: Any, slopes: Any, S0: Any) -> Tensor | None:
    """S0 in the dtype of states, once all arguments fit one another."""
    _check_heads(q, k, v)
    check_slopes(slopes, q.shape[1], "slopes")
    return as_state("S0", S0, (*q.shape[:2], q.shape[3], v.shape[3]), q)


def _check_heads(q: Any, k: Any, v: Any) -> None:
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[1], q.shape[1], "heads, as in q")
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
