"""Neighborhood attention on an engine of its own, whose tiles are boxes of the grid.

A window that is a box covers many short runs of row-major tokens, so tiles of contiguous tokens, as
the flash engine has, would visit several times more keys than a query sees. Boxes are read straight
from the tensors, strides, dilation groups and all: nothing is permuted or copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    wide_dtype,
)
from attnspec.fast.engines.flash.checks import LARGEST_HEAD
from attnspec.fast.engines.merge import merge
from attnspec.fast.engines.neighborhood import (
    check_grid,
    neighborhood,
    window_scores,
    window_values,
)
from attnspec.fast.engines.neighborhood.grid import (
    Grid,
    check_axis,
    check_shape,
    per_axis,
    token_count,
    window_size,
)

WIDTHS = range(1, LARGEST_HEAD + 1)
CLAIMS = {
    "axis_window": {"launches": None},
    "axis_mask": {"launches": None},
    "na_mask": {"launches": None},
    "na_attend": {"gradient": True, "limits": {"d": WIDTHS, "dv": WIDTHS}},
    "na_qk": {"gradient": True, "limits": {"d": WIDTHS}},
    "na_av": {"gradient": True, "limits": {"dv": WIDTHS}},
    "token_permute": {"launches": None},
    "token_unpermute": {"launches": None},
    "merge_attentions": {"launches": None},
}

Sizes = int | Sequence[int]
Flags = bool | Sequence[bool]


def axis_window(
    x: int | Tensor, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Start, end (exclusive) and dilation group of the windows of coordinates x, int64.

    Starts and ends count inside the dilation group. The values of a CUDA tensor are not checked: a
    check would wait for the device.
    """
    check_axis(X, k, s, dil, causal)
    if not isinstance(x, (int, Tensor)) or isinstance(x, bool):
        raise TypeError(f"x: got {type(x).__name__}, expected an integer or an integer tensor")
    x = torch.as_tensor(x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x: got dtype {x.dtype}, expected an integer dtype")
    known = not x.is_cuda and not torch.compiler.is_compiling()
    if known and bool(((x < 0) | (x >= X)).any()):
        raise ValueError(f"x: got {x.min()}..{x.max()}, expected coordinates in [0, {X})")
    x = x.to(torch.int64)
    group, inside = x % dil, x // dil
    length = X // dil + (group < X % dil).to(torch.int64)
    if causal:
        leader = torch.minimum(inside // s * s + s - 1, length - 1)
        return (leader - k + 1).clamp(min=0), inside + 1, group
    left, right = k // 2, k // 2 + k % 2 - 1
    leader = torch.minimum(inside // s * s + s // 2, length - 1)
    centre = torch.minimum(leader.clamp(min=left), length - 1 - right)
    return centre - left, centre + right + 1, group


def axis_mask(X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False) -> Tensor:
    """bool (X, X) on the CPU, True where the query of a row sees the key of a column."""
    check_axis(X, k, s, dil, causal)
    at = torch.arange(X)
    start, end, group = axis_window(at, X, k, s, dil, causal)
    key = at // dil
    in_window = (key >= start[:, None]) & (key < end[:, None])
    return in_window & (at % dil == group[:, None])


def na_mask(
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
) -> Tensor:
    """bool (tokens, tokens) on the CPU: who sees whom, for other kernels and for looking at.

    The attention itself never makes it.
    """
    z, y, x = check_grid(shape, kernel, stride, dilation, causal)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in (z, y, x):
        if axis.k > 1:
            mask = torch.kron(mask, axis_mask(*axis))
    return mask


def na_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
    extra: int = 0,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, tokens, dv) and lse (batch, heads, tokens), float32.

    q (batch, heads, tokens, d), k (batch, kv_heads, tokens + extra, d), v (batch, kv_heads, tokens
    + extra, dv), with the tokens of a grid of `shape`, row-major; `kernel`, `stride`, `dilation`
    and `causal` are one value for all axes or one for each. The last `extra` keys are seen by all
    queries. Any strides; d and dv up to 256. Differentiable in q, k and v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_integer("extra", extra, least=0)
    grid = check_grid(shape, kernel, stride, dilation, causal)
    tokens = token_count(grid)
    check_size("q", q.shape[2], tokens, "tokens, as in shape")
    check_size("k", k.shape[2], tokens + extra, "tokens of shape, and extra ones")
    _check_width("q", q)
    _check_width("v", v)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return neighborhood(q, k, v, grid, scale=scale, backend=backend)


def na_qk(
    q: Tensor,
    k: Tensor,
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores (batch, heads, tokens, window) of the unfused form, in window order.

    q (batch, heads, tokens, d), k (batch, kv_heads, tokens, d); -inf behind the end of a causal
    axis. Differentiable in q and k.
    """
    grid = _check_unfused("q", q, "k", k, shape, kernel, stride, dilation, causal)
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return window_scores(q, k, grid, scale=scale, backend=backend)


def na_av(
    p: Tensor,
    v: Tensor,
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, tokens, dv) of the unfused form.

    Weights p (batch, heads, tokens, window) in window order, v (batch, kv_heads, tokens, dv);
    weights behind the end of a causal axis are not read. Differentiable in p and v.
    """
    grid = _check_unfused("p", p, "v", v, shape, kernel, stride, dilation, causal)
    check_size("p", p.shape[3], window_size(grid), "keys of a window")
    return window_values(p, v, grid, backend=backend)


def token_permute(x: Tensor, shape: Sequence[int], dil: Sizes) -> tuple[Tensor, Tensor]:
    """The tokens of x (..., tokens, d) dilation group after dilation group, and the groups' grid
    shapes (groups, axes), int64 on the CPU.
    """
    order, shapes = _token_order(x, shape, dil)
    return x.index_select(-2, order.to(x.device)), shapes


def token_unpermute(x: Tensor, shape: Sequence[int], dil: Sizes) -> Tensor:
    """The tokens of x (..., tokens, d), laid out by `token_permute`, back in their places."""
    order, _ = _token_order(x, shape, dil)
    return x.index_select(-2, torch.argsort(order).to(x.device))


def merge_attentions(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output (..., dv) and lse (...) over all keys, from those over disjoint sets of keys."""
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (tuple, list)):
            raise TypeError(f"{name}: got {type(parts).__name__}, expected a list of tensors")
        if not parts:
            raise ValueError(f"{name}: got no parts, expected at least one")
    check_size("lses", len(lses), len(outs), "as many as outs")
    for out, lse in zip(outs, lses, strict=True):
        for name, x in (("outs", out), ("lses", lse)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
            if not x.is_floating_point():
                raise TypeError(f"{name}: got dtype {x.dtype}, expected a floating-point one")
        if out.dim() < 1 or out.shape != outs[0].shape:
            raise ValueError(f"outs: got shape {tuple(out.shape)}, expected the first one's")
        if lse.shape != out.shape[:-1]:
            raise ValueError(f"lses: got shape {tuple(lse.shape)}, expected that of outs' rows")
    wide = wide_dtype(outs[0])
    out, lse = outs[0].to(wide), lses[0].to(wide)
    for more, more_lse in zip(outs[1:], lses[1:], strict=True):
        out, lse = merge(out, lse, more.to(wide), more_lse.to(wide))
    return out.to(outs[0].dtype), lse.to(lses[0].dtype)


def _check_unfused(
    name: str, rows: Any, key_name: str, keys: Any, shape: Any, kernel: Any, stride: Any,
    dilation: Any, causal: Any,
) -> Grid:  # fmt: skip
    check_tensor(name, rows, ("batch", "heads", "tokens", "width"), FLOATS)
    check_tensor(key_name, keys, ("batch", "kv_heads", "tokens", "width"), FLOATS)
    check_same(key_name, keys, name, rows)
    grid = check_grid(shape, kernel, stride, dilation, causal)
    check_size(name, rows.shape[2], token_count(grid), "tokens, as in shape")
    check_size(key_name, keys.shape[2], rows.shape[2], f"tokens, as in {name}")
    check_size(key_name, keys.shape[0], rows.shape[0], f"batch, as in {name}")
    if keys.shape[1] < 1 or rows.shape[1] % keys.shape[1]:
        raise ValueError(
            f"{key_name}: got {keys.shape[1]} kv heads for {rows.shape[1]} query heads, "
            f"expected a divisor of {rows.shape[1]}"
        )
    _check_width(key_name, keys)
    return grid


def _check_width(name: str, x: Tensor) -> None:
    if not 1 <= x.shape[3] <= LARGEST_HEAD:
        raise ValueError(f"{name}: got width {x.shape[3]}, expected 1..{LARGEST_HEAD}")


def _token_order(x: Any, shape: Any, dil: Any) -> tuple[Tensor, Tensor]:
    sizes = check_shape(shape)
    dils = per_axis("dil", dil, len(sizes))
    for X, step in zip(sizes, dils, strict=True):
        check_integer("dil", step, least=1)
        if step > X:
            raise ValueError(f"dil: got {step}, expected at most the {X} tokens of its axis")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {x.dtype}, expected a floating-point one")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., tokens, d)")
    tokens = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    check_size("x", x.shape[-2], tokens.numel(), "tokens, as in shape")
    groups = [tokens]
    for axis, step in enumerate(dils):
        cut = (slice(None),) * axis
        groups = [group[(*cut, slice(r, None, step))] for group in groups for r in range(step)]
    shapes = torch.tensor([group.shape for group in groups])
    return torch.cat([group.flatten() for group in groups]), shapes
