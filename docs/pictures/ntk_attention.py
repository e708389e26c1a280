"""NTK-Attention: the feature map, the sums that replace a prefix, and what is left to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.ntk_attention import ntk_attend, phi, prefix_state
from pictures import Ink, grid, panels

CAPTION = (
    "A prefix of 24 tokens, d = dv = 8. Left: the state Z and k that replace it, whatever its "
    "length. Middle: the feature map over exp, which it stands in for. Right: the share of the "
    "prefix in the output (mean of 32 heads), which falls as causal attention sees more tokens."
)


def draw(ink: Ink) -> Any:
    rng = np.random.default_rng(4)
    tokens, d = 48, 8
    K_P, V_P = rng.standard_normal((1, 24, d)), rng.standard_normal((1, 24, d))
    Z, k = prefix_state(K_P, V_P)
    q, K = (rng.standard_normal((32, 1, tokens, d)) for _ in range(2))
    # With values of 1 and Z = 0 the output is the tokens' share of the denominator.
    left = ntk_attend(q, K, np.ones((32, 1, tokens, 1)), 0 * Z[..., :1], k, causal=True)
    share = 1 - left[:, 0, :, 0].mean(axis=0)
    x = np.linspace(-2.5, 2.5, 101)

    figure, (state, features, prefix) = panels(3, height=2.6)
    grid(state, np.abs(np.concatenate([Z[0], k[0][:, None]], axis=1)), ink.shades, ink,
         "|Z| and, last, k", x="value", y="feature")  # fmt: skip
    features.plot(x, phi(x[:, None])[:, 0], color=ink.first, label="elu + 1")
    features.plot(x, np.exp(x), color=ink.second, label="exp")
    features.set(title="feature map", ylim=(0, 6), xlabel="x")
    features.legend(frameon=False, labelcolor=ink.text)
    prefix.plot(np.arange(tokens) + 1, share, color=ink.first)
    prefix.fill_between(np.arange(tokens) + 1, share, color=ink.first, alpha=0.2)
    prefix.set(title="share of the prefix", ylim=(0, 1), xlabel="query")
    for axes in (features, prefix):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
