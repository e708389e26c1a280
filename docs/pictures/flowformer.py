"""Flowformer: what competition and allocation do to the weights of linear attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.flowformer import flow_attend, flow_attend_causal, flow_features
from pictures import Ink, grid, panels

CAPTION = (
    "The share each source (column) has in each sink's output (row), 16 tokens with d = 8, two of "
    "the sources being wanted more. Left: linear attention with the same features, nearly uniform. "
    "Middle: flow attention (without the clamp), where sources compete and sinks are gated. Right: "
    "its causal form, in which a source keeps the weight of its own time."
)


def draw(ink: Ink) -> Any:
    rng = np.random.default_rng(2)
    tokens, d = 16, 8
    loud = np.where(np.isin(np.arange(tokens), (3, 9)), 2.0, 0.0)[:, None]
    q = 1.5 * rng.standard_normal((1, tokens, d))
    k = 0.5 * rng.standard_normal((1, tokens, d)) + loud
    identity = np.eye(tokens)[None]
    a, b = flow_features(q), flow_features(k)
    plain = (a @ np.swapaxes(b, -1, -2))[0]
    plain = plain / plain.sum(axis=-1, keepdims=True)
    normal = flow_attend(q, k, identity, clamp=None)[0]
    causal = flow_attend_causal(q, k, identity)[0][0]
    figure, axes = panels(3, height=3.1)
    titles = ("linear attention", "flow attention", "flow attention, causal")
    for panel, share, title in zip(axes, (plain, normal, causal), titles, strict=True):
        grid(panel, share, ink.shades, ink, title, top=0.25)
    return figure
