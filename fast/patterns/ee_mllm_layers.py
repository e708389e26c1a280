"""A layer of a decoder as composite attention uses it: projections, FFN and aligner.

Products are torch's, sums of squares float32 at least, and every step comes back in the dtype of
the states.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from attnspec.fast.backend import (
    FAR,
    FLOATS,
    check_choice,
    check_device,
    check_integer,
    check_tensor,
    product,
)
from attnspec.fast.engines.operation import operation
from attnspec.fast.engines.rows import silu_gate, turn

MODES = ("self", "ffn", "frozen")


class Layer(NamedTuple):
    """The weights of a layer; vectors are multiplied from the left, ``x @ W``.

    norm1 and norm2 (D,), the gains of root-mean-square norms with `eps`; Wq (D, H d), Wk (D, Hk d),
    Wv (D, Hk dv), Wo (H dv, D); ffn = (gate (D, F), up (D, F), down (F, D)), a gated FFN with SiLU;
    H query heads, Hk kv heads, and the base of the rotary positions, or None.
    """

    norm1: Tensor
    Wq: Tensor
    Wk: Tensor
    Wv: Tensor
    Wo: Tensor
    norm2: Tensor
    ffn: tuple[Tensor, Tensor, Tensor]
    H: int
    Hk: int
    rope: float | None = 10000.0
    eps: float = 1e-6


def normalise(X: Tensor, gain: Tensor, eps: float) -> Tensor:
    """X (..., D) by its root mean square, times the `gain` (D,)."""
    return functional.rms_norm(X, gain.shape, gain, eps)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., tokens, heads * d) to (..., heads, tokens, d), a view."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(-2, -3)


def join_heads(x: Tensor) -> Tensor:
    """(..., heads, tokens, d) to (..., tokens, heads * d)."""
    return x.transpose(-2, -3).flatten(-2)


def project_normed(
    h: Tensor,
    rows: Tensor,
    layer: Layer,
    positions: Tensor,
    row_positions: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (batch, H, rows, d) of the normalised states `rows` (batch, rows, D), and k (batch, Hk,
    tokens, d) and v (batch, Hk, tokens, dv) of h (batch, tokens, D); q and k are rotated.
    """
    q = split_heads(product(rows, layer.Wq), layer.H)
    k = split_heads(product(h, layer.Wk), layer.Hk)
    if layer.rope is not None:
        q, k = turn(q, k, row_positions, positions, base=layer.rope, backend=backend)
    return q, k, split_heads(product(h, layer.Wv), layer.Hk)


def add_product(X: Tensor, a: Tensor, W: Tensor, ours: bool = False) -> Tensor:
    """X + a @ W; X (batch, tokens, D) may be written over if it is `ours`, and contiguous."""
    if not ours:
        return X + product(a, W)
    if torch.compiler.is_compiling():
        added: Tensor = _added(X, a, W)
        return added
    return _onto(X, a, W)


def _onto(X: Tensor, a: Tensor, W: Tensor) -> Tensor:
    """X with a @ W added in the product itself: one launch, and one rounding."""
    W = W.contiguous() if max(W.stride()) >= FAR else W
    X.view(-1, X.shape[-1]).addmm_(a.reshape(-1, a.shape[-1]), W)
    return X


@operation("attnspec::add_product")
def _added(X: Tensor, a: Tensor, W: Tensor) -> Tensor:
    """The same for `torch.compile`, which would choose another way to add a product."""
    return _onto(X.clone(), a, W)


@_added.register_fake
def _(X: Tensor, a: Tensor, W: Tensor) -> Tensor:
    return torch.empty_like(X)


def add_feed_forward(
    X: Tensor, layer: Layer, *, backend: str | None = None, ours: bool = False
) -> Tensor:
    """X (..., D) plus the gated FFN of its norm; X may be written over as in `add_product`."""
    gate, up, down = layer.ffn
    h = normalise(X, layer.norm2, layer.eps)
    opened = silu_gate(product(h, gate), product(h, up), backend=backend)
    return add_product(X, opened, down, ours)


def aligner_update(
    Xv: Tensor, layer: Layer, mode: str = "self", *, backend: str | None = None
) -> Tensor:
    """The states of image tokens after a layer, shaped as Xv (batch, Nv, D). Differentiable."""
    check_tensor("Xv", Xv, ("batch", "Nv", "D"), FLOATS)
    check_layer(layer, "Xv", Xv)
    check_choice("mode", mode, MODES)
    if mode == "frozen":
        return Xv
    if mode == "self":
        h = normalise(Xv, layer.norm1, layer.eps)
        values = split_heads(product(h, layer.Wv), layer.Hk)
        Xv = Xv + product(own_values(values, layer), layer.Wo)
    return add_feed_forward(Xv, layer, backend=backend)


def own_values(values: Tensor, layer: Layer) -> Tensor:
    """What tokens read that see themselves alone: (batch, tokens, H dv) of their values (batch, Hk,
    tokens, dv).
    """
    group = layer.H // layer.Hk
    return join_heads(values if group == 1 else values.repeat_interleave(group, -3))


def flops(
    Nt: int, Nv: int, D: int, F: int, layers: int, *, backend: str | None = None
) -> dict[str, int]:
    """Operations of a prefill, ``{"dense": ..., "composite": ...}``, a multiply-add being two.

    For as many kv heads as query heads, a gated FFN, images before the text, and mode `self`.
    """
    for name, size in (("Nt", Nt), ("Nv", Nv)):
        check_integer(name, size, least=0)
    for name, size in (("D", D), ("F", F), ("layers", layers)):
        check_integer(name, size, least=1)
    S = Nt + Nv
    text, image = 8 * D * D + 6 * D * F, 6 * D * D + 6 * D * F
    dense = S * text + 2 * D * S * (S + 1)
    composite = Nt * text + Nv * image + 4 * D * Nt * Nv + 2 * D * Nt * (Nt + 1)
    return {"dense": layers * dense, "composite": layers * composite}


def check_layer(layer: Any, name: str, X: Tensor) -> None:
    """The weights of `layer` fit one another and the states X (..., D) of argument `name`."""
    if not all(hasattr(layer, name) for name in Layer._fields):
        raise TypeError(f"layer: got {type(layer).__name__}, expected a Layer")
    check_integer("layer", layer.H, least=1)
    check_integer("layer", layer.Hk, least=1)
    if layer.H % layer.Hk:
        raise ValueError(f"layer: got {layer.Hk} kv heads, expected a divisor of {layer.H} heads")
    if not isinstance(layer.ffn, (tuple, list)) or len(layer.ffn) != 3:
        raise TypeError("layer: got another ffn, expected the weights (gate, up, down)")
    _check_numbers(layer.rope, layer.eps)
    D = X.shape[-1]
    (gate, up, down), Wq, Wv = layer.ffn, layer.Wq, layer.Wv
    for weights in (gate, Wq, Wv):
        check_tensor("layer", weights, ("D", "width"), FLOATS)
    d, dv, F = Wq.shape[1] // layer.H, Wv.shape[1] // layer.Hk, gate.shape[1]
    shapes = {
        "norm1": (layer.norm1, (D,)), "norm2": (layer.norm2, (D,)),
        "Wq": (Wq, (D, layer.H * d)), "Wk": (layer.Wk, (D, layer.Hk * d)),
        "Wv": (Wv, (D, layer.Hk * dv)), "Wo": (layer.Wo, (layer.H * dv, D)),
        "gate": (gate, (D, F)), "up": (up, (D, F)), "down": (down, (F, D)),
    }  # fmt: skip
    for part, (weights, shape) in shapes.items():
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"layer: got {type(weights).__name__} for {part}, expected torch.Tensor"
            )
        if tuple(weights.shape) != shape:
            raise ValueError(f"layer: got {part} of shape {tuple(weights.shape)}, expected {shape}")
        if weights.dtype != X.dtype:
            raise TypeError(f"{name}: got dtype {X.dtype}, expected {weights.dtype}, as the layer")
        check_device(name, X, "layer", weights)
    if layer.rope is not None and d % 2:
        raise ValueError(f"layer: got head size {d}, expected an even one for rotary positions")


def _check_numbers(base: Any, eps: Any) -> None:
    if base is not None and not (isinstance(base, (int, float)) and 0 < base < math.inf):
        raise ValueError(f"layer: got rope {base!r}, expected a number above 0 or None")
    if not (isinstance(eps, (int, float)) and 0 <= eps < math.inf):
        raise ValueError(f"layer: got eps {eps!r}, expected a number of at least 0")
