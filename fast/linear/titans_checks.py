"""What the forms of Titans share on the fast path: checks of arguments, padded tokens put last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_choice,
    check_device,
    check_integer,
    check_size,
    check_tensor,
    wide,
)
from attnspec.fast.growing import checkable

READS = ("inclusive", "exclusive")
RATES = ("theta", "eta", "alpha")
Layers = tuple[Tensor, ...]


class Tokens(NamedTuple):
    """Tokens in the order in which they count, those that are not stored last and zero."""

    k: Tensor
    v: Tensor
    q: Tensor
    rates: tuple[Tensor, Tensor, Tensor]
    stored: Tensor  # (batch, T)
    where: Tensor  # (batch, 1, T, 1): the place a token has got

    def back(self, y: Tensor) -> Tensor:
        """Rows (batch, heads, T, width) where they were, 0 for what was not stored."""
        y = torch.where(self.stored[:, None, :, None], y, 0)
        return y.gather(2, self.where.expand(*y.shape[:2], -1, y.shape[3]))


def in_order(
    k: Tensor, v: Tensor, q: Tensor, rates: tuple[Tensor, Tensor, Tensor], valid: Tensor
) -> Tokens:
    """The tokens as `Tokens`; what is kept at a padded one is not read."""
    order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)
    stored = valid.gather(1, order)
    where = torch.argsort(order, dim=1)[:, None, :, None]

    def sort(x: Tensor) -> Tensor:
        index = order[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])
        return torch.where(stored[:, None, :, None], x.gather(2, index), 0)

    theta, eta, alpha = (sort(x[..., None])[..., 0] for x in rates)
    return Tokens(sort(k), sort(v), sort(q), (theta, eta, alpha), stored, where)


def check_memory_inputs(
    W0: Any, S0: Any, k: Any, v: Any, q: Any, rates: Any, b: Any, loss_scale: Any, read: Any,
    valid: Any,
) -> tuple[Layers, Layers, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """W0 and S0 with the leading axes of k, and rates of every token."""
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    W, S = check_states(W0, S0, k)
    check_size("v", v.shape[3], W[-1].shape[-1], "dv, the width of the last layer of W0")
    check_integer("b", b, least=1)
    check_scale(loss_scale)
    check_choice("read", read, READS)
    if valid is not None:
        check_tensor("valid", valid, ("batch", "T"), (torch.bool,))
        expected = (k.shape[0], k.shape[2])
        if tuple(valid.shape) != expected:
            raise ValueError(f"valid: got shape {tuple(valid.shape)}, expected {expected}")
    return W, S, token_rates(rates, k, valid)


def check_states(W0: Any, S0: Any, k: Tensor) -> tuple[Layers, Layers]:
    """Weights and momentum of every layer, (..., inputs, outputs) with the leading axes of k."""
    check_layers("W0", W0, k, "k")
    leading = k.shape[:-2]
    W = tuple(w.expand(*leading, *w.shape[-2:]) for w in W0)
    if S0 is None:
        return W, tuple(torch.zeros(w.shape, dtype=wide(k).dtype, device=k.device) for w in W)
    check_layers("S0", S0, k, "k")
    if [s.shape[-2:] for s in S0] != [w.shape[-2:] for w in W]:
        shapes, wanted = ([tuple(x.shape) for x in y] for y in (S0, W))
        raise ValueError(f"S0: got shapes {shapes}, expected those of W0, {wanted}")
    return W, tuple(s.expand(w.shape) for s, w in zip(S0, W, strict=True))


def check_layers(name: str, W: Any, x: Tensor, of: str) -> None:
    """`W` holds layers, in any float dtype, that fit one another and the rows `x`."""
    if not isinstance(W, (tuple, list)):
        raise TypeError(f"{name}: got {type(W).__name__}, expected a tuple of torch.Tensor")
    if not W:
        raise ValueError(f"{name}: got no layer, expected one or more")
    width, what = x.shape[-1], f"d of {of}"
    for layer, weights in enumerate(W, 1):
        if isinstance(weights, Tensor) and weights.dim() < 2:
            shape = tuple(weights.shape)
            raise ValueError(f"{name}: got shape {shape}, expected (..., inputs, outputs)")
        axes = ("...",) * weights.dim() if isinstance(weights, Tensor) else ()
        check_tensor(name, weights, axes, FLOATS)
        check_device(name, weights, of, x)
        check_size(name, weights.shape[-2], width, f"inputs of layer {layer}, {what}")
        if weights.shape[:-2] not in ((), x.shape[:-2]):
            raise ValueError(
                f"{name}: got leading axes {tuple(weights.shape[:-2])}, expected none or "
                f"{tuple(x.shape[:-2])}, as {of}"
            )
        width, what = weights.shape[-1], f"outputs of layer {layer}"


def check_scale(loss_scale: Any) -> None:
    """A finite number > 0."""
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float)):
        raise TypeError(f"loss_scale: got {loss_scale!r}, expected a finite number > 0")
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"loss_scale: got {loss_scale}, expected a finite number > 0")


def token_rates(
    rates: Any, k: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """theta, eta, alpha (batch, kv_heads, T); a number is that of every token."""
    if not isinstance(rates, (tuple, list)):
        raise TypeError(f"rates: got {type(rates).__name__}, expected a tuple of three")
    if len(rates) != 3:
        raise ValueError(f"rates: got {len(rates)}, expected three: theta, eta, alpha")
    full = []
    for name, x in zip(RATES, rates, strict=True):
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            x = torch.full(k.shape[:3], float(x), dtype=wide(k).dtype, device=k.device)
        check_tensor(f"rates.{name}", x, ("batch", "kv_heads", "T"), FLOATS)
        check_device(f"rates.{name}", x, "k", k)
        if x.shape != k.shape[:3]:
            shape, wanted = tuple(x.shape), tuple(k.shape[:3])
            raise ValueError(f"rates.{name}: got shape {shape}, expected {wanted}")
        full.append(x)
    seen = full
    if valid is not None and checkable(k):
        seen = [torch.where(valid[:, None], x, 0) for x in full]
    _check_values(seen, prefix="rates.")
    return full[0], full[1], full[2]


def check_rates(theta: Any, eta: Any, alpha: Any) -> None:
    """theta >= 0, eta and alpha in [0, 1], of one shape (..., C); values on the CPU only."""
    for name, x in zip(RATES, (theta, eta, alpha), strict=True):
        if isinstance(x, Tensor) and x.dim() < 1:
            raise ValueError(f"{name}: got shape (), expected (..., C)")
        check_tensor(name, x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)
        if x.dtype != theta.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {theta.dtype}, as theta")
        if x.shape != theta.shape:
            shape, wanted = tuple(x.shape), tuple(theta.shape)
            raise ValueError(f"{name}: got shape {shape}, expected {wanted}, as theta")
    _check_values((theta, eta, alpha))


def _check_values(rates: Sequence[Tensor], prefix: str = "") -> None:
    for name, x in zip(RATES, rates, strict=True):
        if not checkable(x):
            continue
        most = math.inf if name == "theta" else 1.0
        if not bool((torch.isfinite(x) & (x >= 0) & (x <= most)).all()):
            wanted = "finite values >= 0" if name == "theta" else "values from 0 to 1"
            low, high = float(x.min()), float(x.max())
            raise ValueError(f"{prefix}{name}: got values from {low} to {high}, expected {wanted}")
