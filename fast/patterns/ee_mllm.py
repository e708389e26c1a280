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
    product,
)
from attnspec.fast.engines.flash import flash
from attnspec.fast.growing import checkable
from attnspec.fast.patterns.ee_mllm_attention import (
    TOKENS,
    VISIBILITIES,
    composite_attention,
    composite_mask,
)
from attnspec.fast.patterns.ee_mllm_layers import (
    MODES,
    Layer,
    aligner_update,
    check_layer,
    feed_forward,
    flops,
    join_heads,
    normalise,
    own_values,
    project,
    project_keys,
    rotations,
    split_heads,
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
    "composite_attention": {"gradient": True, "blocks": (16, 64), "compiled": True},
    "layer_step": {"blocks": (16, 64), "compiled": True},
    "run_layers": {"dtypes": ("float32",)},
    **{name: {"launches": None} for name in ("aligner_update", "composite_mask", "flops")},
}
"""The aligner is products of torch's. In 16 bits layers are judged one by one: the rounding of one
is amplified by those behind it, more than a budget made of a few rounded runs foresees.
"""


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
    pos = torch.cat([pos_v, pos_t])
    X = torch.cat([Xv, Xt], dim=1)
    # Weights are read once for both kinds of token; queries are of text alone.
    h = normalise(X, layer.norm1, layer.eps)
    turns = rotations(layer, pos, X)
    text_turns = None if turns is None else (turns[0][images:], turns[1][images:])
    q = project_keys(h[:, images:], layer.Wq, layer.H, text_turns)
    k = project_keys(h, layer.Wk, layer.Hk, turns)
    v = split_heads(product(h, layer.Wv), layer.Hk)
    is_visual = torch.arange(images + text, device=Xt.device) < images
    out, _ = composite_attention(q, k, v, is_visual, pos, image_visible, backend=backend)
    read = join_heads(out)
    if mode == "self":
        read = torch.cat([own_values(v[:, :, :images], layer), read], dim=1)
        X = feed_forward(X + product(read, layer.Wo), layer)
        return X[:, images:], X[:, :images]
    Xt = Xt + product(read, layer.Wo)
    if mode == "frozen":
        return feed_forward(Xt, layer), Xv
    X = feed_forward(torch.cat([Xv, Xt], dim=1), layer)
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
    images = Xv.shape[1]
    pos = torch.cat([pos_v, pos_t])
    order = torch.argsort(pos)
    X = torch.cat([Xv, Xt], dim=1)
    q, k, v = (x.index_select(TOKENS, order) for x in project(X, layer, pos))
    out, _ = flash(q, k, v, causal=True, backend=backend)
    out = out.index_select(TOKENS, torch.argsort(order))
    X = feed_forward(X + product(join_heads(out), layer.Wo), layer)
    return X[:, images:], X[:, :images]


def _check_options(mode: Any, image_visible: Any) -> None:
    check_choice("mode", mode, MODES)
    check_choice("image_visible", image_visible, VISIBILITIES)


def _check_states(Xt: Any, Xv: Any, layer: Any, pos_t: Any, pos_v: Any) -> None:
    for name, X, tokens in (("Xt", Xt, "Nt"), ("Xv", Xv, "Nv")):
        check_tensor(name, X, ("batch", tokens, "D"), FLOATS)
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
