"""Based's convolution layer and the order of layers, in torch: products and a short filter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from attnspec.fast.backend import (
    FLOATS,
    check_choice,
    check_same,
    check_size,
    check_tensor,
    product,
    wide_dtype,
)

PATTERNS = {
    27: ((1, 6, 11, 16, 21), (2, 7, 12, 17, 22)),
    36: ((1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34)),
}
"""The linear and the window layers of a model with so many layers; the others convolve."""


def gated_convolution(
    x: Tensor, W_in: Tensor, filters: Tensor, W_out: Tensor, *, backend: str | None = None
) -> Tensor:
    """y (batch, tokens, width) of x (batch, tokens, width).

    W_in (width, 2 inner), W_out (inner, width), filters (inner, taps), the last tap meeting the
    token itself. Computed in float32 at least. Differentiable.
    """
    check_tensor("x", x, ("batch", "tokens", "width"), FLOATS)
    for name, weight, axes in (
        ("W_in", W_in, ("width", "2 inner")),
        ("filters", filters, ("inner", "taps")),
        ("W_out", W_out, ("inner", "width")),
    ):
        check_tensor(name, weight, axes, FLOATS)
        check_same(name, weight, "x", x)
    inner, taps = filters.shape
    check_size("W_in", W_in.shape[0], x.shape[2], "width, as in x")
    check_size("W_in", W_in.shape[1], 2 * inner, "2 inner, as in filters")
    check_size("W_out", W_out.shape[0], inner, "inner, as in filters")
    wide = wide_dtype(x)
    mixed_in, gate = product(x.to(wide), W_in.to(wide)).split(inner, dim=-1)
    padded = pad(mixed_in, (0, 0, max(taps - 1, 0), 0))
    mixed = torch.zeros_like(mixed_in)
    for tap in range(taps):
        mixed = mixed + filters[:, tap].to(wide) * padded[:, tap : tap + x.shape[1]]
    return product(silu(mixed) * gate, W_out.to(wide)).to(x.dtype)


def layer_kinds(n_layers: int) -> tuple[str, ...]:
    """ "linear", "window" or "convolution" for each layer of a released model."""
    check_choice("n_layers", n_layers, tuple(PATTERNS))
    linear, window = PATTERNS[n_layers]
    kinds = dict.fromkeys(linear, "linear") | dict.fromkeys(window, "window")
    return tuple(kinds.get(layer, "convolution") for layer in range(n_layers))
