"""Gradients of EE-MLLM's layers: back through the FFN, the attention and the projections.

The gradient of a `Layer` is another, with those of its weights in their places. The clause is S7 of
`ee_mllm`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.patterns.ee_mllm_attention import (
    composite_attention,
    composite_attention_backward,
)
from attnspec.reference.patterns.ee_mllm_layers import (
    Layer,
    join_heads,
    normalise,
    project,
    split_heads,
)
from attnspec.reference.primitives.rms_norm import rms_norm_backward
from attnspec.reference.primitives.rope import rope_angles, rotate
from attnspec.reference.primitives.sigmoid import silu, silu_slope


def no_gradient(layer: Layer) -> Layer:
    """A layer of zeros.

    >>> eye, one = np.eye(1), np.ones(1)
    >>> no_gradient(Layer(one, eye, eye, eye, eye, one, (eye, eye, eye), 1, 1)).norm1
    array([0.])
    """
    return _weight_by_weight(np.zeros_like, layer)


def feed_forward_backward(X: np.ndarray, layer: Layer, dY: np.ndarray) -> tuple[np.ndarray, Layer]:
    """S7: dX (..., D) and the gradient of the layer, given dY of `feed_forward`.

    >>> eye, one = np.eye(1), np.ones(1)
    >>> layer = Layer(one, eye, eye, eye, eye, one, (eye, eye, eye), 1, 1)
    >>> dX, dlayer = feed_forward_backward(eye, layer, eye)
    >>> dX.round(3), dlayer.ffn[2].round(3)
    (array([[1.]]), array([[0.731]]))
    """
    gate, up, down = layer.ffn
    h = normalise(X, layer.norm2, layer.eps)
    a, u = h @ gate, h @ up
    opened, dproduct = silu(a), dY @ down.T
    da, du = dproduct * u * silu_slope(a), dproduct * opened
    dX, dnorm2 = rms_norm_backward(X, layer.norm2, layer.eps, da @ gate.T + du @ up.T)
    dffn = (_weights(h, da), _weights(h, du), _weights(opened * u, dY))
    return dY + dX, no_gradient(layer)._replace(norm2=dnorm2, ffn=dffn)


def project_backward(
    X: np.ndarray, layer: Layer, positions: np.ndarray, dq: np.ndarray | None, dk: np.ndarray,
    dv: np.ndarray,
) -> tuple[np.ndarray, Layer]:  # fmt: skip
    """S7: dX (..., D) and the gradient of the layer, given those of `project`; dq may be None.

    >>> eye, one = np.eye(2), np.ones(2)
    >>> layer = Layer(one, eye, eye, eye, eye, one, (eye, eye, eye), 1, 1, None)
    >>> project_backward(eye, layer, np.arange(2), None, 0 * eye[None], eye[None])[1].norm1.round(3)
    array([1.414, 1.414])
    """
    h = normalise(X, layer.norm1, layer.eps)
    if layer.rope is not None:
        # A rotation is turned back by its transpose.
        back = -rope_angles(positions, dk.shape[-1], layer.rope)
        dq, dk = None if dq is None else rotate(dq, back), rotate(dk, back)
    k, v = join_heads(dk), join_heads(dv)
    dlayer = no_gradient(layer)._replace(Wk=_weights(h, k), Wv=_weights(h, v))
    dh = k @ layer.Wk.T + v @ layer.Wv.T
    if dq is not None:
        q = join_heads(dq)
        dlayer = dlayer._replace(Wq=_weights(h, q))
        dh = dh + q @ layer.Wq.T
    dX, dnorm1 = rms_norm_backward(X, layer.norm1, layer.eps, dh)
    return dX, dlayer._replace(norm1=dnorm1)


def aligner_update_backward(
    Xv: np.ndarray, layer: Layer, dXv: np.ndarray, mode: str = "self"
) -> tuple[np.ndarray, Layer]:
    """S7: gradients of Xv and of the layer, given that of `aligner_update`'s result.

    >>> eye, one = np.eye(2), np.ones(2)
    >>> layer = Layer(one, eye, eye, eye, eye, one, (eye, eye, eye), 1, 1)
    >>> aligner_update_backward(eye, layer, eye, "frozen")[0]
    array([[1., 0.],
           [0., 1.]])
    """
    check_shaped("dXv", dXv, Xv.shape)
    if mode == "frozen":
        return dXv, no_gradient(layer)
    if mode == "ffn":
        return feed_forward_backward(Xv, layer, dXv)
    h, group = normalise(Xv, layer.norm1, layer.eps), layer.H // layer.Hk
    read = join_heads(np.repeat(split_heads(h @ layer.Wv, layer.Hk), group, axis=-3))
    dY, dlayer = feed_forward_backward(Xv + read @ layer.Wo, layer, dXv)
    dread = split_heads(dY @ layer.Wo.T, layer.H)
    # Query heads of a group read the same values.
    dread = dread.reshape(*dread.shape[:-3], layer.Hk, group, *dread.shape[-2:]).sum(axis=-3)
    dvalues = join_heads(dread)
    dX, dnorm1 = rms_norm_backward(Xv, layer.norm1, layer.eps, dvalues @ layer.Wv.T)
    own = dlayer._replace(norm1=dnorm1, Wv=_weights(h, dvalues), Wo=_weights(read, dY))
    return dY + dX, own


def layer_step_backward(
    Xt: np.ndarray,
    Xv: np.ndarray,
    layer: Layer,
    pos_t: np.ndarray,
    pos_v: np.ndarray,
    dXt: np.ndarray,
    dXv: np.ndarray,
    mode: str = "self",
    *,
    image_visible: str = "causal",
) -> tuple[np.ndarray, np.ndarray, Layer]:
    """S7: gradients of Xt, Xv and the layer, given those of `layer_step`'s two results.

    >>> eye, one, places = np.eye(2), np.ones(2), (np.array([0, 2]), np.array([1]))
    >>> layer = Layer(one, eye, eye, eye, eye, one, (0 * eye, eye, eye), 1, 1, None)
    >>> dXt, dXv, _ = layer_step_backward(eye, eye[:1], layer, *places, 0 * eye, eye[:1])
    >>> bool(dXt.any()), dXv.round(3)
    (False, array([[1., 0.]]))
    """
    for name, given, X in (("dXt", dXt, Xt), ("dXv", dXv, Xv)):
        check_shaped(name, given, X.shape)
    q, kt, vt = project(Xt, layer, pos_t)
    _, kv, vv = project(Xv, layer, pos_v)
    k, v = np.concatenate([kv, kt], axis=-2), np.concatenate([vv, vt], axis=-2)
    images = Xv.shape[-2]
    tokens = (np.arange(k.shape[-2]) < images, np.concatenate([pos_v, pos_t]), image_visible)
    read = join_heads(composite_attention(q, k, v, *tokens)[0])
    dY, dlayer = feed_forward_backward(Xt + read @ layer.Wo, layer, dXt)
    dlayer = dlayer._replace(Wo=_weights(read, dY))
    dread = split_heads(dY @ layer.Wo.T, layer.H)
    dq, dk, dv = composite_attention_backward(q, k, v, tokens[0], dread, None, *tokens[1:])
    text, image = (..., slice(images, None), slice(None)), (..., slice(images), slice(None))
    from_text, own = project_backward(Xt, layer, pos_t, dq, dk[text], dv[text])
    from_images, seen = project_backward(Xv, layer, pos_v, None, dk[image], dv[image])
    dX, aligned = aligner_update_backward(Xv, layer, dXv, mode)
    return dY + from_text, dX + from_images, _weight_by_weight(_sum, dlayer, own, seen, aligned)


def _weights(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The gradient of W in x @ W, of all tokens."""
    return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


def _sum(*gradients: np.ndarray) -> np.ndarray:
    return functools.reduce(operator.add, gradients)


def _weight_by_weight(combine: Callable[..., np.ndarray], *layers: Layer) -> Layer:
    """A layer of what `combine` makes of the weights that have the same place in all of them."""
    norm1, Wq, Wk, Wv, Wo, norm2 = map(combine, *(layer[:6] for layer in layers))
    gate, up, down = map(combine, *(layer.ffn for layer in layers))
    return Layer(norm1, Wq, Wk, Wv, Wo, norm2, (gate, up, down), *layers[0][7:])
