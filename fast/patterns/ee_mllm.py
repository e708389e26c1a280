"""EE-MLLM's composite attention on the flash engine, and a decoder's layer around it.

Image tokens have no query: their keys and values come from the same products as the text's, and
their own update is a product with Wo and the FFN.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_integer,
    check_size,
    check_tensor,
    choose_by_dtype,
    product,
    underivable,
)
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.engines.rows import join_normed, join_read
from attnspec.fast.engines.select import places, take_tokens
from attnspec.fast.growing import checkable
from attnspec.fast.patterns.ee_mllm_attention import (
    VISIBILITIES,
    composite_attention,
    composite_mask,
)
from attnspec.fast.patterns.ee_mllm_layers import (
    MODES,
    Layer,
    add_feed_forward,
    add_product,
    aligner_update,
    check_layer,
    flops,
    join_heads,
    normalise,
    project_normed,
)

__all__ = [
    "Layer",
    "aligner_update",
    "composite_attention",
    "composite_mask",
    "dense_step",
    "flops",
    "layer_step",
    "run_layers",
]
CLAIMS: dict[str, dict[str, Any]] = {
    "composite_attention": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
    "layer_step": {"gradient": True, "blocks": (16, 64), "compiled": True},
    "run_layers": {"dtypes": ("float32",)},
    "aligner_update": {"gradient": True, "launches": None},
    **{name: {"launches": None} for name in ("composite_mask", "flops")},
}
"""The aligner is products of torch's. In 16 bits layers are judged one by one: the rounding of one
is amplified by those behind it, more than a budget made of a few rounded runs foresees.
"""

WEIGHTS = ("norm1", "Wq", "Wk", "Wv", "Wo", "norm2")


def layer_step(
    Xt: Tensor,
    Xv: Tensor,
    layer: Layer,
    pos_t: Tensor,
    pos_v: Tensor,
    mode: str = "self",
    *,
    image_visible: str = "causal",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The states of text (batch, Nt, D) and of images (batch, Nv, D) after a layer.

    `pos_t` int (Nt,) and `pos_v` int (Nv,), all different, which is checked on CPU tensors only.
    Differentiable in the states and the weights.
    """
    _check_states(Xt, Xv, layer, pos_t, pos_v)
    _check_options(mode, image_visible)
    images, text = Xv.shape[1], Xt.shape[1]
    weights = (getattr(layer, name) for name in WEIGHTS)
    # Where no gradient can be asked for, the residual stream is a buffer that products add to.
    on_gpu = choose_by_dtype(backend, "Xt", Xt) == "triton"
    ours = on_gpu and underivable(Xt, Xv, *weights, *layer.ffn)
    ahead = image_visible == "all"
    at = places(None, pos_v, pos_t, rows=text, ahead=ahead, backend=backend)
    # Weights are read once for both kinds of token; queries are of text alone.
    X, h, rows = join_normed(
        Xv, Xt, layer.norm1, layer.eps, at.order, at.place, at.row_order, at.row_place,
        backend=backend,
    )  # fmt: skip
    q, k, v = project_normed(h, rows, layer, at.position, at.row_position, backend)
    out, _ = flash(q, k, v, row_end=at.ends, backend=backend)
    if mode == "self":
        read = join_read(v, out, at.place, at.row_place, backend=backend)
        X = add_product(X, read, layer.Wo, ours)
        X = add_feed_forward(X, layer, backend=backend, ours=ours)
        return X[:, images:], X[:, :images]
    out, _ = take_tokens(out, None, at.row_place, at.row_order, backend=backend)
    Xt = (Xt + product(join_heads(out), layer.Wo)).contiguous()
    if mode == "frozen":
        return add_feed_forward(Xt, layer, backend=backend, ours=ours), Xv
    X = add_feed_forward(torch.cat([Xv, Xt], dim=1), layer, backend=backend, ours=ours)
    return X[:, images:], X[:, :images]


def run_layers(
    Xt: Tensor,
    Xv: Tensor,
    stack: Sequence[Layer],
    pos_t: Tensor,
    pos_v: Tensor,
    layers: Collection[int] | None = None,
    mode: str = "self",
    *,
    image_visible: str = "causal",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The states after all layers of a `stack`; those numbered in `layers` are composite.

    The others are plain causal attention of all tokens; by default none are.
    """
    chosen = range(len(stack)) if layers is None else layers
    for number in chosen:
        check_integer("layers", number, least=0)
        if number >= len(stack):
            raise ValueError(f"layers: got {number}, expected numbers below {len(stack)}")
    _check_options(mode, image_visible)
    for layer in stack:
        _check_states(Xt, Xv, layer, pos_t, pos_v)
    for number, layer in enumerate(stack):
        if number in chosen:
            Xt, Xv = layer_step(
                Xt, Xv, layer, pos_t, pos_v, mode, image_visible=image_visible, backend=backend
            )
        else:
            Xt, Xv = dense_step(Xt, Xv, layer, pos_t, pos_v, backend=backend)
    return Xt, Xv


def dense_step(
    Xt: Tensor,
    Xv: Tensor,
    layer: Layer,
    pos_t: Tensor,
    pos_v: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `layer_step` for a layer in which all tokens attend causally to all."""
    _check_states(Xt, Xv, layer, pos_t, pos_v)
    choose_by_dtype(backend, "Xt", Xt)
    images = Xv.shape[1]
    at = places(None, pos_v, pos_t, rows=0, backend=backend)
    X = torch.cat([Xv, Xt], dim=1)
    h = normalise(X, layer.norm1, layer.eps).index_select(1, at.order)
    q, k, v = project_normed(h, h, layer, at.position, at.position, backend)
    out, _ = flash(q, k, v, causal=True, backend=backend)
    out, _ = take_tokens(out, None, at.place, at.order, backend=backend)
    X = add_feed_forward(X + product(join_heads(out), layer.Wo), layer, backend=backend)
    return X[:, images:], X[:, :images]


def _check_options(mode: Any, image_visible: Any) -> None:
    check_choice("mode", mode, MODES)
    check_choice("image_visible", image_visible, VISIBILITIES)


def _check_states(Xt: Any, Xv: Any, layer: Any, pos_t: Any, pos_v: Any) -> None:
    for name, X, tokens in (("Xt", Xt, "Nt"), ("Xv", Xv, "Nv")):
        check_tensor(name, X, ("batch", tokens, "D"), FLOATS)
        # What fits the one fits the other if they are alike.
        if X is Xt or (X.shape[2], X.dtype, X.device) != (Xt.shape[2], Xt.dtype, Xt.device):
            check_layer(layer, name, X)
    check_size("Xv", Xv.shape[0], Xt.shape[0], "batch, as in Xt")
    for name, pos, X in (("pos_t", pos_t, Xt), ("pos_v", pos_v, Xv)):
        check_tensor(name, pos, ("tokens",), INTEGERS)
        check_size(name, pos.shape[0], X.shape[1], "tokens")
        check_device(name, pos, "the tokens", X)
    if checkable(pos_t) and checkable(pos_v):
        pos = torch.cat([pos_v, pos_t])
        if len(torch.unique(pos)) < len(pos):
            raise ValueError("pos_t: got a position twice, expected all different")
