"""SinkLoRA: groups and global sinks in training, and what H2O keeps of a text."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.patterns.sinklora_h2o import h2o_step, init_state
from attnspec.reference.patterns.sinklora_heads import sf_mask
from pictures import Ink, grid, panels

CAPTION = (
    "Left and middle: 20 tokens in groups of 6, with 2 sinks (orange) that every later token sees; "
    "a returned head is a plain one. Right: H2O on a text whose keys 3 and 9 draw attention, with "
    "2 heavy rows (purple) and 3 recent ones; each row shows what a token saw when it came."
)


def stream(tokens: int, hh: int, rec: int) -> np.ndarray:
    """Which tokens each token sees: 1 as one of the recent, 3 as a heavy one."""
    random = np.random.default_rng(4)
    q, k, v = (0.5 * random.standard_normal((1, 1, tokens, 8)) for _ in range(3))
    k[..., 3, :], k[..., 9, :] = 1.0, 2.0
    q += 1.0
    state, kind = init_state(k, v), np.zeros((tokens, tokens), int)
    for t in range(tokens):
        seen = np.append(state.pos[0], t)
        kind[t, seen] = np.where(seen < t - rec, 3, 1)
        new = slice(t, t + 1)
        _, state = h2o_step(q[..., new, :], k[..., new, :], v[..., new, :], state, hh, rec)
    return kind


def draw(ink: Ink) -> Any:
    tokens, G, s, heads = 20, 6, 2, 8
    mask = sf_mask(tokens, G, heads, s)
    sinks = np.arange(tokens) < s
    figure, axes = panels(3, height=3.4)
    colours = ink.palette(ink.first, ink.second, ink.third)
    pictures = (
        ("plain and returned heads", np.where(mask[0], np.where(sinks, 2, 1), 0)),
        ("shifted heads", np.where(mask[-1], np.where(sinks, 2, 1), 0)),
        ("H2O, token by token", stream(tokens, 2, 3)),
    )
    for n, (title, kind) in enumerate(pictures):
        grid(axes[n], kind, colours, ink, title, "key", "query" if n == 0 else "", top=3)
    return figure
