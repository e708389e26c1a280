"""Recurrent mixers of `dsf` on the elementwise scan, its gates in the kernels or in torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, softplus

from attnspec.fast.backend import FLOATS, check_same, check_tensor, product, wide
from attnspec.fast.engines.scan import elementwise, gated_scan
from attnspec.fast.linear.lightning_attention_2_chunks import as_state, check_upstream

LayerState = tuple[Tensor, Tensor]


def elementwise_scan(
    a: Tensor, x: Tensor, h0: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Every h (batch, T, N) of h_t = a_t h_(t-1) + x_t, and the last in float32 (batch, N).

    a and x (batch, T, N), h0 (batch, N) in any float dtype; differentiable.
    """
    check_tensor("a", a, ("batch", "T", "N"), FLOATS)
    check_upstream("x", x, tuple(a.shape), a)
    return elementwise(a, x, as_state("h0", h0, _last(x), x), backend=backend)


def qlstm(
    f: Tensor,
    i: Tensor,
    o: Tensor,
    z: Tensor,
    alpha: float = 1.0,
    reversed: bool = False,
    h0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, T, N) and the last h, float32 (batch, N), of pre-activations f, i, o and inputs z.

    Differentiable, also in an `alpha` that is a tensor of no axes.
    """
    check_gates(f, i, o, alpha, reversed)
    check_upstream("z", z, tuple(f.shape), f)
    h0 = as_state("h0", h0, _last(z), z)
    return gated_scan(f, i, o, z, alpha, reversed, h0, backend=backend)


def qlstm_layer(
    x: Tensor,
    input_weight: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gates_weight: Tensor,
    gates_bias: Tensor,
    output_weight: Tensor,
    alpha: float = 1.0,
    reversed: bool = False,
    state: LayerState | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, LayerState]:
    """(batch, T, d_model) and the state: h, float32 (batch, hidden), and the last rows of the
    branch (batch, width - 1, hidden). Weights as in the reference. Differentiable.
    """
    _check_layer(x, input_weight, conv_weight, conv_bias, gates_weight, gates_bias, output_weight)
    hidden, width = conv_weight.shape
    h0, rows = _layer_state(state, x, hidden, width)
    gate, branch = product(x, input_weight.mT).split(hidden, -1)
    seen = torch.cat([rows, branch], 1)
    T = x.shape[1]
    z = wide(conv_bias) + torch.zeros_like(wide(branch))
    for n in range(width):
        z = z + wide(seen[:, n : n + T]) * wide(conv_weight[:, n])
    gates = product(z, wide(gates_weight).mT) + wide(gates_bias)
    f, i, o = gates.split(hidden, -1)
    y, h = qlstm(f, i, o, z, alpha, reversed, h0, backend=backend)
    out = product((gelu(wide(gate)) * y).to(x.dtype), output_weight.mT)
    return out, (h, seen[:, seen.shape[1] - width + 1 :].clone())


def rg_lru(
    u: Tensor,
    r: Tensor,
    g: Tensor,
    lam: Tensor,
    *,
    c: float = 8.0,
    h0: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, T, N) and the last h, float32 (batch, N); u, r, g (batch, T, N), lam (N,), h0
    (batch, N). Differentiable.
    """
    check_tensor("u", u, ("batch", "T", "N"), FLOATS)
    check_rg_lru(r, g, lam, c, u)
    h0 = as_state("h0", h0, _last(u), u)
    log_decay, strength = rg_lru_gates(r, g, lam, c)
    y, last = elementwise(torch.exp(log_decay), strength * wide(u), h0, backend=backend)
    return y.to(u.dtype), last


def rg_lru_gates(r: Tensor, g: Tensor, lam: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """The log of Lambda and the diagonal of B (batch, T, N), in float32 at least."""
    log_decay = -c * softplus(wide(lam)) * torch.sigmoid(wide(r))
    # expm1 differentiates to its result plus 1, which cancels where the decay is strong.
    doubled = 2 * log_decay
    left = torch.where(doubled < -1, 1 - torch.exp(doubled), -torch.expm1(doubled))
    # A gate that never forgets lets nothing in: its root is 0, with no slope.
    root = torch.where(left > 0, torch.sqrt(torch.where(left > 0, left, 1.0)), 0.0)
    return log_decay, root * torch.sigmoid(wide(g))


def _last(x: Tensor) -> tuple[int, ...]:
    return x.shape[0], x.shape[2]


def check_gates(f: Any, i: Any, o: Any, alpha: Any, reversed: Any) -> None:
    """Gates have one shape."""
    check_tensor("f", f, ("batch", "T", "N"), FLOATS)
    for name, x in (("i", i), ("o", o)):
        check_upstream(name, x, tuple(f.shape), f)
    check_number("alpha", alpha)
    if not isinstance(reversed, bool):
        raise TypeError(f"reversed: got {type(reversed).__name__}, expected a bool")


def check_rg_lru(r: Any, g: Any, lam: Any, c: Any, like: Tensor) -> None:
    """Gates and rates fit the input."""
    for name, x in (("r", r), ("g", g)):
        check_upstream(name, x, tuple(like.shape), like)
    check_upstream("lam", lam, tuple(like.shape[2:]), like, dtypes=FLOATS)
    check_number("c", c)
    if not c > 0:
        raise ValueError(f"c: got {c}, expected a number > 0")


def check_number(name: str, value: Any) -> None:
    """A finite number, or a tensor of no axes."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")


def _check_layer(x: Any, wi: Any, wc: Any, bc: Any, wg: Any, bg: Any, wo: Any) -> None:
    check_tensor("x", x, ("batch", "T", "d_model"), FLOATS)
    check_tensor("conv_weight", wc, ("hidden", "width"), FLOATS)
    check_same("conv_weight", wc, "x", x)
    if wc.shape[1] < 1:
        raise ValueError(f"conv_weight: got shape {tuple(wc.shape)}, expected a width >= 1")
    d_model, hidden = x.shape[2], wc.shape[0]
    for name, w, shape in (
        ("input_weight", wi, (2 * hidden, d_model)),
        ("conv_bias", bc, (hidden,)),
        ("gates_weight", wg, (3 * hidden, hidden)),
        ("gates_bias", bg, (3 * hidden,)),
        ("output_weight", wo, (d_model, hidden)),
    ):
        check_upstream(name, w, shape, x)


def _layer_state(state: Any, x: Tensor, hidden: int, width: int) -> tuple[Tensor | None, Tensor]:
    shape = (x.shape[0], width - 1, hidden)
    if state is None:
        return None, x.new_zeros(shape)
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected (h, rows)")
    h0 = as_state("state", state[0], (x.shape[0], hidden), x)
    check_upstream("state", state[1], shape, x, dtypes=FLOATS)
    return h0, state[1].to(x.dtype)
