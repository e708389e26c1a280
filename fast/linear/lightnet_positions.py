"""LightNet's position encodings: tables of angles, and filters that are the scan with constant
decay and queries and keys that know only their head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_choice,
    check_integer,
    check_size,
    check_tensor,
    wide_dtype,
)
from attnspec.fast.engines.scan import scan
from attnspec.fast.growing import checkable
from attnspec.fast.linear.lightning_attention_2_chunks import as_state

Parameters = tuple[Tensor, Tensor, Tensor]
LRPE_TYPES = ("cosine", "rotary")


def md_angles(
    shape: Sequence[int], theta: Tensor, d: int, l: int = 0, *, backend: str | None = None
) -> Tensor:
    """Angles (heads, l + prod(shape), d) of theta (heads, ceil(d / len(shape))), in its dtype."""
    grid = _check_grid(shape)
    check_integer("d", d, least=1)
    check_integer("l", l, least=0)
    check_tensor("theta", theta, ("heads", "c"), FLOATS)
    if theta.shape[1] != -(-d // len(grid)):
        expected = f"(heads, {-(-d // len(grid))})"
        raise ValueError(f"theta: got shape {tuple(theta.shape)}, expected {expected}")
    wide = theta if theta.dtype == torch.float64 else theta.float()
    places = torch.cartesian_prod(*(torch.arange(n, device=theta.device) for n in grid))
    places = places.reshape(-1, len(grid), 1).to(wide.dtype)
    angles = (places * wide[:, None, None]).flatten(2)[..., :d]
    return torch.nn.functional.pad(angles, (0, 0, l, 0)).to(theta.dtype)


def md_lrpe(
    x: Tensor,
    theta: Tensor,
    shape: Sequence[int],
    l: int = 0,
    *,
    lrpe_type: str = "cosine",
    backend: str | None = None,
) -> Tensor:
    """x (batch, heads, l + prod(shape), d), encoded; twice as wide in the cosine form.

    theta (heads, ceil(d / len(shape))), or of half that d in the rotary form, whose d is even; it
    may be float32 beside an x of half precision. Differentiable.
    """
    check_tensor("x", x, ("batch", "heads", "tokens", "d"), FLOATS)
    check_choice("lrpe_type", lrpe_type, LRPE_TYPES)
    d = x.shape[3]
    if lrpe_type == "rotary" and d % 2:
        raise ValueError(f"x: got {d} channels, expected an even number (lrpe_type 'rotary')")
    check_tensor("theta", theta, ("heads", "c"), FLOATS)
    wide = theta if theta.dtype == torch.float64 else theta.float()
    angles = md_angles(shape, wide, d if lrpe_type == "cosine" else d // 2, l)
    check_size("theta", theta.shape[0], x.shape[1], "heads, as in x")
    check_size("x", x.shape[2], angles.shape[1], "tokens, as shape and l say")
    cos, sin = angles.cos(), angles.sin()
    if lrpe_type == "cosine":
        return torch.cat([x * cos, x * sin], -1).to(x.dtype)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def tpe(
    x: Tensor,
    qp: Tensor,
    kp: Tensor,
    lam: Tensor,
    state: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y, shaped as x (batch, heads, T, d_h), and the state, float32 (batch, heads, m, d_h).

    qp and kp (heads, m), lam (heads,) above 0 and at most 1. Differentiable. A scan whose queries
    and keys are qp and kp at every token.
    """
    check_tensor("x", x, ("batch", "heads", "T", "d_h"), FLOATS)
    _check_filter(qp, kp, lam, x.shape[1])
    state = as_state("state", state, (*x.shape[:2], qp.shape[1], x.shape[3]), x)
    shape = (x.shape[0], x.shape[1], x.shape[2], qp.shape[1])
    q, k = (p.to(x.dtype)[None, :, None].expand(shape) for p in (qp, kp))
    slopes = -(lam if lam.dtype == torch.float64 else lam.float()).log()
    return scan(q, k, x, slopes=slopes, state=state, backend=backend)


def md_tpe(
    x: Tensor,
    params: Sequence[Parameters],
    axes: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Shaped as x (batch, n_1, .., n_r, heads * d_h), filtered along `axes` of n_1 .. n_r, summed.

    params[i] = (qp, kp, lam) of axes[i], as in `tpe`. Differentiable.
    """
    _check_filters(x, params, axes)
    y = torch.zeros_like(x, dtype=wide_dtype(x))
    for (qp, kp, lam), axis in zip(params, axes, strict=True):
        rows = x.movedim(1 + axis, -2)
        split = rows.unflatten(-1, (qp.shape[0], -1)).movedim(-2, -3)
        filtered = tpe(split.flatten(0, -4), qp, kp, lam, backend=backend)[0]
        filtered = filtered.view(split.shape).movedim(-3, -2).flatten(-2)
        y = y + filtered.movedim(-2, 1 + axis)
    return y.to(x.dtype)


def _check_grid(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: got {type(shape).__name__}, expected a tuple of integers")
    if not shape or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"shape: got {tuple(shape)}, expected positive integers")
    return tuple(shape)


def _check_filter(qp: Any, kp: Any, lam: Any, heads: int) -> None:
    for name, x, axes in (
        ("qp", qp, ("heads", "m")), ("kp", kp, ("heads", "m")), ("lam", lam, ("heads",)),
    ):  # fmt: skip
        check_tensor(name, x, axes, FLOATS)
        check_size(name, x.shape[0], heads, "heads, as in x")
    check_size("kp", kp.shape[1], qp.shape[1], "m, as in qp")
    if checkable(lam) and not bool(((lam > 0) & (lam <= 1)).all()):
        raise ValueError("lam: got a value outside (0, 1], expected decays")


def _check_filters(x: Any, params: Any, axes: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected torch.Tensor")
    if x.dim() < 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (batch, n_1, .., width)")
    check_tensor("x", x, ("n",) * x.dim(), FLOATS)
    for name, value in (("params", params), ("axes", axes)):
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tuple or list")
    if not axes:
        raise ValueError("axes: got (), expected at least one axis")
    check_size("params", len(params), len(axes), "one for each of axes")
    for axis in axes:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"axes: got {axis!r}, expected integers")
        if not 0 <= axis < x.dim() - 2:
            raise ValueError(f"axes: got {axis}, expected an axis below {x.dim() - 2}")
    for one in params:
        if not isinstance(one, (tuple, list)) or len(one) != 3:
            raise TypeError(f"params: got {type(one).__name__}, expected (qp, kp, lam)")
        check_tensor("params", one[0], ("heads", "m"), FLOATS)
        if one[0].numel() == 0 or x.shape[-1] % one[0].shape[0]:
            heads = one[0].shape[0]
            raise ValueError(f"params: got {heads} heads, expected a divisor of {x.shape[-1]}")
