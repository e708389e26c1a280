"""A layer of a decoder as composite attention uses it: projections, FFN, aligner, and its cost.

The clauses are those of `ee_mllm`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_choice,
    check_integer,
)
from attnspec.reference.primitives.rms_norm import rms_norm
from attnspec.reference.primitives.rope import rope
from attnspec.reference.primitives.sigmoid import silu

MODES = ("self", "ffn", "frozen")


class Layer(NamedTuple):
    """The weights of a layer; vectors are multiplied from the left, ``x @ W``.

    norm1 and norm2 (D,), the gains of root-mean-square norms with `eps`; Wq (D, H d), Wk (D, Hk d),
    Wv (D, Hk dv), Wo (H dv, D); ffn = (gate (D, F), up (D, F), down (F, D)), a gated FFN with SiLU;
    H query heads, Hk kv heads, and the base of the rotary positions, or None.
    """

    norm1: np.ndarray
    Wq: np.ndarray
    Wk: np.ndarray
    Wv: np.ndarray
    Wo: np.ndarray
    norm2: np.ndarray
    ffn: tuple[np.ndarray, np.ndarray, np.ndarray]
    H: int
    Hk: int
    rope: float | None = 10000.0
    eps: float = 1e-6


def normalise(X: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """S1: X (..., D) by its root mean square, times the `gain` (D,).

    >>> normalise(np.array([3.0, 4.0]), np.ones(2), 0.0).round(3)
    array([0.849, 1.131])
    """
    return rms_norm(X, gain, eps)


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """S1: (..., tokens, heads * d) to (..., heads, tokens, d).

    >>> split_heads(np.arange(4.0).reshape(1, 4), 2)[:, 0]
    array([[0., 1.],
           [2., 3.]])
    """
    return np.swapaxes(x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads), -2, -3)


def join_heads(x: np.ndarray) -> np.ndarray:
    """S3: (..., heads, tokens, d) to (..., tokens, heads * d).

    >>> join_heads(np.arange(4.0).reshape(2, 1, 2))
    array([[0., 1., 2., 3.]])
    """
    x = np.swapaxes(x, -2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def project(
    X: np.ndarray, layer: Layer, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S1: q (..., H, tokens, d), k (..., Hk, tokens, d) and v (..., Hk, tokens, dv) of states X.

    >>> eye, one = np.eye(2), np.ones(2)
    >>> layer = Layer(one, eye, eye, eye, eye, one, (eye, eye, eye), 2, 2, None)
    >>> project(eye, layer, np.arange(2))[0].shape
    (2, 2, 1)
    """
    h = normalise(X, layer.norm1, layer.eps)
    q, k = split_heads(h @ layer.Wq, layer.H), split_heads(h @ layer.Wk, layer.Hk)
    if layer.rope is not None:
        q, k = rope(q, positions, layer.rope), rope(k, positions, layer.rope)
    return q, k, split_heads(h @ layer.Wv, layer.Hk)


def feed_forward(X: np.ndarray, layer: Layer) -> np.ndarray:
    """S3: X plus the gated FFN of its norm, shaped as X (..., D).

    >>> eye, one = np.eye(2), np.ones(2)
    >>> feed_forward(eye, Layer(one, eye, eye, eye, eye, one, (0 * eye, eye, eye), 1, 1))
    array([[1., 0.],
           [0., 1.]])
    """
    gate, up, down = layer.ffn
    h = normalise(X, layer.norm2, layer.eps)
    return X + (silu(h @ gate) * (h @ up)) @ down


def aligner_update(Xv: np.ndarray, layer: Layer, mode: str = "self") -> np.ndarray:
    """S4: the states of image tokens after a layer, shaped as Xv (..., Nv, D).

    >>> eye, one = np.eye(2), np.ones(2)
    >>> layer = Layer(one, eye, eye, eye, eye, one, (0 * eye, eye, eye), 1, 1)
    >>> aligner_update(eye, layer).round(3)[0], aligner_update(eye, layer, "ffn")[0]
    (array([2.414, 0.   ]), array([1., 0.]))
    """
    check_array("Xv", Xv, ("Nv", "D"))
    check_layer(layer, "Xv", Xv)
    check_choice("mode", mode, MODES)
    if mode == "frozen":
        return Xv
    if mode == "self":
        values = split_heads(normalise(Xv, layer.norm1, layer.eps) @ layer.Wv, layer.Hk)
        values = np.repeat(values, layer.H // layer.Hk, axis=-3)
        Xv = Xv + join_heads(values) @ layer.Wo
    return feed_forward(Xv, layer)


def flops(Nt: int, Nv: int, D: int, F: int, layers: int) -> dict[str, int]:
    """S8: operations of a prefill, ``{"dense": ..., "composite": ...}``.

    For as many kv heads as query heads, a gated FFN, images before the text, and mode `self`.

    >>> cost = flops(100, 576, 4096, 11008, 32)
    >>> round(1 - cost["composite"] / cost["dense"], 3)
    0.079
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


def check_layer(layer: Any, name: str, X: np.ndarray) -> None:
    """K14: the weights of `layer` fit one another and the states X (..., D) of argument `name`.

    >>> eye, one = np.eye(2), np.ones(2)
    >>> check_layer(Layer(one, eye, eye, eye, eye[:1], one, (eye, eye, eye), 1, 1), "Xv", eye)
    Traceback (most recent call last):
    ValueError: layer: got Wo of shape (1, 2), expected (2, 2)
    """
    if not isinstance(layer, Layer):
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
        check_array("layer", weights, ("D", "width"))
    d, dv, F = Wq.shape[-1] // layer.H, Wv.shape[-1] // layer.Hk, gate.shape[-1]
    shapes = {
        "norm1": (layer.norm1, (D,)), "norm2": (layer.norm2, (D,)),
        "Wq": (Wq, (D, layer.H * d)), "Wk": (layer.Wk, (D, layer.Hk * d)),
        "Wv": (Wv, (D, layer.Hk * dv)), "Wo": (layer.Wo, (layer.H * dv, D)),
        "gate": (gate, (D, F)), "up": (up, (D, F)), "down": (down, (F, D)),
    }  # fmt: skip
    for part, (weights, shape) in shapes.items():
        check_array("layer", weights, ("D",))
        if weights.shape != shape:
            raise ValueError(f"layer: got {part} of shape {weights.shape}, expected {shape}")
        if weights.dtype != X.dtype:
            raise TypeError(f"{name}: got dtype {X.dtype}, expected {weights.dtype}, as the layer")
    if layer.rope is not None and d % 2:
        raise ValueError(f"layer: got head size {d}, expected an even one for rotary positions")


def _check_numbers(base: Any, eps: Any) -> None:
    """K14: the numbers of a layer."""
    numbers = (int, float, np.floating)
    if base is not None and not (isinstance(base, numbers) and 0 < base < np.inf):
        raise ValueError(f"layer: got rope {base!r}, expected a number above 0 or None")
    if not (isinstance(eps, numbers) and 0 <= eps < np.inf):
        raise ValueError(f"layer: got eps {eps!r}, expected a number of at least 0")
