"""The arguments that softplus attention accepts (K14)."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_bool,
    check_choice,
    check_integer,
    check_size,
    group_size,
)


def check_number(name: str, value: Any, least: float) -> None:
    """K14: `value` is a finite number, at least `least`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number >= {least}")
    if not (math.isfinite(value) and float(value) >= least):
        raise ValueError(f"{name}: got {value}, expected a finite number >= {least}")


def check_row_numbers(name: str, x: Any, rows: tuple[int, ...]) -> None:
    """K14: `x` holds one number for each row, of `rows` or broadcastable to it."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: got {type(x).__name__}, expected numpy.ndarray")
    if x.dtype.kind not in "fiu":
        raise TypeError(f"{name}: got dtype {x.dtype}, expected numbers")
    check_broadcast(name, x, rows)


def check_broadcast(name: str, x: np.ndarray, shape: tuple[int, ...]) -> None:
    """K14: `x` broadcasts to `shape`."""
    padded = (1,) * (len(shape) - x.ndim) + x.shape
    if len(padded) > len(shape) or any(a not in (1, b) for a, b in zip(padded, shape, strict=True)):
        raise ValueError(f"{name}: got shape {x.shape}, expected one that broadcasts to {shape}")


def check_mask(mask: Any, leading: tuple[int, ...], q_tokens: int, k_tokens: int) -> None:
    """K14: `mask` is bool (..., q_tokens or 1, k_tokens), with the leading axes or none."""
    check_array("mask", mask, ("q_tokens", "k_tokens"), dtype="bool")
    rows_fit = mask.shape[-2] in (1, q_tokens) and mask.shape[-1] == k_tokens
    if not rows_fit or mask.shape[:-2] not in ((), leading):
        raise ValueError(
            f"mask: got shape {mask.shape}, expected {(*leading, q_tokens, k_tokens)}, with one "
            "row for all queries or without leading axes if they are the same"
        )


def check_products(q: Any, k: Any) -> None:
    """K7, K14: queries and keys can be multiplied."""
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_array("k", k, ("kv_heads", "k_tokens", "d"))
    if k.dtype != q.dtype:
        raise TypeError(f"k: got dtype {k.dtype}, expected {q.dtype}, as q")
    if k.shape[:-3] != q.shape[:-3]:
        raise ValueError(f"k: got leading axes {k.shape[:-3]}, expected {q.shape[:-3]}, as q")
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    group_size(q.shape[-3], k.shape[-3])


def check_values(weights: Any, v: Any) -> None:
    """K7, K14: there is a value for every weight."""
    check_array("weights", weights, ("heads", "q_tokens", "k_tokens"))
    check_array("v", v, ("kv_heads", "k_tokens", "dv"))
    if v.dtype != weights.dtype:
        raise TypeError(f"v: got dtype {v.dtype}, expected {weights.dtype}, as weights")
    if v.shape[:-3] != weights.shape[:-3]:
        raise ValueError(f"v: got leading axes {v.shape[:-3]}, expected {weights.shape[:-3]}")
    check_size("v", v.shape[-2], weights.shape[-1], "k_tokens, as in weights")
    if v.shape[-3] < 1 or weights.shape[-3] % v.shape[-3]:
        raise ValueError(f"v: got {v.shape[-3]} kv heads, expected a divisor of the heads")


def check_first(
    q: Any, k: Any, v: Any, causal: Any, mask: Any, eps: Any, normalise_qk: Any
) -> None:
    """S1-S5, K14: the arguments of the first stage."""
    check_attention_inputs(q, k, v)
    check_bool("causal", causal)
    if mask is not None:
        check_mask(mask, q.shape[:-3], q.shape[-2], k.shape[-2])
    check_number("eps", eps, least=0)
    check_bool("normalise_qk", normalise_qk)


def check_second(p: Any, warm: Any, eps_mode: Any, dead_tol: Any) -> None:
    """S6, S7, K14: the options of the second stage."""
    check_number("p", p, least=1)
    check_integer("warm", warm, least=1)
    check_choice("eps_mode", eps_mode, ("additive", "logspace"))
    check_number("dead_tol", dead_tol, least=0)
