"""Giraffe's positions: frequencies as tensor operations, rotations by the rows engine.

Angles are float64 and their sines and cosines float32, or float64 for float64 inputs; half inputs
are turned in float32 and rounded once. A rotation reads and writes what attention reads anyway.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_device,
    check_integer,
    check_tensor,
)
from attnspec.fast.engines.rows import turn
from attnspec.fast.growing import checkable

AXES = ("batch", "heads", "tokens", "d")


def check_number(name: str, value: Any, least: float, strict: bool = False) -> None:
    """`value` is a finite number, at least `least` or above it (`strict`)."""
    expected = f"a number {'>' if strict else '>='} {least}"
    if least == -math.inf:
        expected = "a finite number"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    inside = float(value) > least if strict else float(value) >= least
    if not inside or math.isinf(value):
        raise ValueError(f"{name}: got {value}, expected {expected}")


def check_width(name: str, d: int) -> None:
    """The head size of argument `name` is even and above 0."""
    if d < 2 or d % 2:
        raise ValueError(f"{name}: got d {d}, expected an even head size")


def check_places(name: str, p: Any) -> None:
    """`p` (..., tokens) are positions, whole or real numbers."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{name}: got {type(p).__name__}, expected torch.Tensor")
    if p.dtype not in (*INTEGERS, *FLOATS):
        raise TypeError(f"{name}: got dtype {p.dtype}, expected integers or real numbers")
    if p.dim() < 1:
        raise ValueError(f"{name}: got shape (), expected (..., tokens)")


def check_positions(name: str, p: Any, x: Tensor) -> None:
    """`p` is (tokens) or (batch, tokens) for `x` (batch, heads, tokens, d)."""
    check_places(name, p)
    whole = (x.shape[0], x.shape[2])
    if tuple(p.shape) not in (whole, whole[1:]):
        raise ValueError(f"{name}: got shape {tuple(p.shape)}, expected {whole} or {whole[1:]}")
    check_device(name, p, "the tokens", x)


def check_frequencies(f: Any, x: Tensor) -> None:
    """`f` (d/2) has a frequency for each pair of the channels of `x`."""
    check_tensor("f", f, ("d/2",), FLOATS)
    check_device("f", f, "the tokens", x)
    if 2 * f.shape[0] != x.shape[-1]:
        raise ValueError(f"f: got {f.shape[0]}, expected half of the {x.shape[-1]} channels")


def rope_basis(
    d: int,
    base: float = 10000.0,
    scale: float = 1.0,
    power: float = 0.0,
    truncate: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Frequencies (d/2), float64 on the CPU: divided by `scale`, bent by `power`, then truncated.

    A `scale` up to 1, a `power` of 0 and a training length `truncate` up to 0 change nothing.
    """
    check_integer("d", d, least=2)
    check_width("d", d)
    check_number("base", base, 1, strict=True)
    check_number("scale", scale, 0, strict=True)
    check_number("power", power, 0)
    check_number("truncate", truncate, -math.inf)
    f = plain_basis(d, base, torch.device("cpu")) / max(float(scale), 1.0)
    f = f * (1 - torch.arange(d // 2, dtype=torch.float64) / (d // 2)) ** float(power)
    if truncate <= 0:
        return f
    cut = 2 * math.pi / float(truncate)
    low = (f >= cut / 8).double() * (cut / 16)
    return torch.where(f >= cut, f, low)


def plain_basis(d: int, base: float, device: torch.device) -> Tensor:
    """The frequencies (d/2) of rotary positions, float64."""
    pairs = torch.arange(d // 2, device=device, dtype=torch.float64)
    return float(base) ** (-2 * pairs / d)


def positions(T: int, *, backend: str | None = None) -> Tensor:
    """The positions (T) of evaluation, int64 on the CPU."""
    check_integer("T", T, least=0)
    return torch.arange(T)


def random_positions(u: Tensor, *, backend: str | None = None) -> Tensor:
    """Positions (..., T) from uniform draws `u` (..., T) of each sequence, float32 or float64.

    Half precision, in which positions beyond a few hundred are no longer distinct, is refused.
    Draws outside of [0, 1) are found on CPU tensors only.
    """
    if not isinstance(u, Tensor):
        raise TypeError(f"u: got {type(u).__name__}, expected torch.Tensor")
    if u.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"u: got dtype {u.dtype}, expected float32 or float64")
    if u.dim() < 1:
        raise ValueError("u: got shape (), expected (..., T)")
    if checkable(u) and not bool(((u >= 0) & (u < 1)).all()):
        raise ValueError("u: got draws outside of it, expected [0, 1)")
    T = u.shape[-1]
    p = (2 * u.double()).cumsum(-1)
    return (p * (T / p[..., -1:].clamp(min=T)) if T else p).to(u.dtype)


def rotate_half_split(x: Tensor, p: Tensor, f: Tensor, *, backend: str | None = None) -> Tensor:
    """`x` (batch, heads, T, d) turned to `p` (T) or (batch, T), channels m and m + d/2 a pair.

    `p` whole or real numbers, `f` (d/2) angles for a step of one position. Positions in half
    precision are taken as what they are: whole ones are exact up to 256 (bfloat16) or 2048.
    Differentiable in x.
    """
    _check_rotation(x, p, f)
    return turn(x, None, p, None, f, backend=backend)[0]


def rotate_interleaved(x: Tensor, p: Tensor, f: Tensor, *, backend: str | None = None) -> Tensor:
    """As `rotate_half_split`, but with neighbouring channels 2m and 2m + 1 as a pair."""
    _check_rotation(x, p, f)
    return turn(x, None, p, None, f, neighbours=True, backend=backend)[0]


def _check_rotation(x: Any, p: Any, f: Any) -> None:
    check_tensor("x", x, AXES, FLOATS)
    check_width("x", x.shape[3])
    check_positions("p", p, x)
    check_frequencies(f, x)
