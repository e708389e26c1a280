"""Composite attention itself: who sees whom, and the text's one softmax over images and text.

The clauses are those of `ee_mllm`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_choice,
    check_size,
)
from attnspec.reference.dense.attention import attend, attend_backward

VISIBILITIES = ("causal", "all")


def composite_mask(
    is_visual: np.ndarray, positions: np.ndarray, image_visible: str = "causal"
) -> np.ndarray:
    """S2: bool (S, S), which tokens each token sees, both in the order they are stored in.

    `is_visual` bool (S,), `positions` int (S,), all different.

    >>> composite_mask(np.array([False, True, True, False]), np.arange(4)).astype(int)
    array([[1, 0, 0, 0],
           [0, 1, 0, 0],
           [0, 0, 1, 0],
           [1, 1, 1, 1]])
    """
    positions = check_tokens(is_visual, positions, image_visible)
    seen = positions[None, :] <= positions[:, None]
    if image_visible == "all":
        seen = seen | is_visual[None, :]
    alone: np.ndarray = np.eye(len(positions), dtype=bool)
    return np.where(is_visual[:, None], alone, seen)


def composite_attention(
    qt: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    is_visual: np.ndarray,
    pos: np.ndarray | None = None,
    image_visible: str = "causal",
    *,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S2, S3: output (..., heads, q_tokens, dv) and lse (..., heads, q_tokens) of text tokens.

    k (..., kv_heads, S, d) and v (..., kv_heads, S, dv) are of all tokens; the rows of qt (...,
    heads, q_tokens, d) are those of the last q_tokens text tokens, usually all, in the order they
    are stored in. `is_visual` bool (S,); `pos` int (S,), 0 to S - 1 unless given; `key_mask` bool
    (..., S), True = a real key.

    >>> q, v = np.zeros((1, 2, 1)), np.array([[[3.0], [5.0], [7.0]]])
    >>> composite_attention(q, v, v, np.array([False, True, False]))[0].ravel()
    array([3., 5.])
    """
    mask = _visible(qt, k, v, is_visual, pos, image_visible, key_mask)
    return attend(qt, k, v, mask=mask, scale=scale)


def composite_attention_backward(
    qt: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    is_visual: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    pos: np.ndarray | None = None,
    image_visible: str = "causal",
    *,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S7: gradients dqt, dk, dv of `composite_attention`, shaped as qt, k, v.

    >>> one, visual = np.ones((1, 1, 1)), np.array([True, False])
    >>> keys = np.ones((1, 2, 1))
    >>> composite_attention_backward(one, keys, keys, visual, one)[2].ravel()
    array([0.5, 0.5])
    """
    mask = _visible(qt, k, v, is_visual, pos, image_visible, key_mask)
    return attend_backward(qt, k, v, dout, dlse, mask=mask, scale=scale)


def check_tokens(
    is_visual: Any, positions: Any, image_visible: Any, name: str = "positions"
) -> np.ndarray:
    """K14: kinds and positions fit one another; returns the positions, counted if there are none.

    >>> check_tokens(np.array([True, False]), np.array([3, 3]), "causal")
    Traceback (most recent call last):
    ValueError: positions: got [3, 3], expected all different
    """
    check_array("is_visual", is_visual, ("S",), dtype="bool")
    check_size("is_visual", is_visual.ndim, 1, "axes")
    check_choice("image_visible", image_visible, VISIBILITIES)
    if positions is None:
        return np.arange(len(is_visual))
    check_array(name, positions, ("S",), dtype="int")
    if positions.shape != is_visual.shape:
        raise ValueError(
            f"{name}: got shape {positions.shape}, expected {is_visual.shape}, as is_visual"
        )
    if len(np.unique(positions)) < len(positions):
        raise ValueError(f"{name}: got {positions.tolist()}, expected all different")
    return np.asarray(positions)


def _visible(
    qt: Any, k: Any, v: Any, is_visual: Any, pos: Any, image_visible: Any, key_mask: Any
) -> np.ndarray:
    """S2: the rows of the mask that belong to the queries."""
    check_array("qt", qt, ("heads", "q_tokens", "d"))
    check_attention_inputs(qt, k, v)
    pos = check_tokens(is_visual, pos, image_visible, "pos")
    check_size("is_visual", len(is_visual), k.shape[-2], "tokens, as in k")
    text = np.flatnonzero(~is_visual)
    if qt.shape[-2] > len(text):
        raise ValueError(f"qt: got {qt.shape[-2]} rows, expected at most {len(text)} text tokens")
    mask = composite_mask(is_visual, pos, image_visible)[text[len(text) - qt.shape[-2] :]]
    if key_mask is None:
        return mask
    check_array("key_mask", key_mask, ("S",), dtype="bool")
    if key_mask.shape != (*k.shape[:-3], k.shape[-2]):
        raise ValueError(
            f"key_mask: got shape {key_mask.shape}, expected {(*k.shape[:-3], k.shape[-2])}"
        )
    return mask & key_mask[..., None, None, :]
