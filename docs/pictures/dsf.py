"""The Dynamical Systems Framework: one matrix for three mixers, and why one is no other."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.dsf import (
    dsf_matrix,
    from_attention,
    from_normalised_attention,
    from_ssd,
)
from attnspec.reference.linear.dsf_mixers import feature_map
from pictures import Ink, grid, panels

CAPTION = (
    "What token i takes from token j, the matrix of the system, for three mixers on the same "
    "queries and keys. Rows of linear attention sum to 1; those of normalised attention do not, "
    "and may be negative (magnitudes are shown); an SSD forgets, and a step of 0 (token 12) takes "
    "nothing in. Right: what a normaliser leaves of the state, eta before over after. An SSD's "
    "is at most 1; with queries that turn, that of linear attention is not, so it is no SSD."
)


def draw(ink: Ink) -> Any:
    rng = np.random.default_rng(4)
    T, d = 20, 4
    q, k = rng.standard_normal((2, T, d))
    phi, psi = feature_map(q), feature_map(k)
    eta = np.einsum("tn,tn->t", phi, np.cumsum(psi, axis=0))
    Delta = 0.3 + 0.2 * rng.random(T)
    Delta[12] = 0
    systems = {
        "linear": from_attention(phi, psi, eta, 1),
        "normalised": from_normalised_attention(q, k, 0.5 + np.log1p(np.arange(T)), 1),
        "SSD": from_ssd(Delta, np.array(0.6), psi, phi, 1),
    }
    figure, (*weights, ratio) = panels(4, height=2.6)
    for axes, (name, system) in zip(weights, systems.items(), strict=True):
        Phi = np.abs(dsf_matrix(*system)[..., 0, 0])
        top = np.quantile(Phi[Phi > 0], 0.97)
        grid(axes, np.minimum(Phi / top, 1), ink.shades, ink, name, x="token j", y="token i")
    places = np.arange(1, T)
    ratio.plot(places, eta[:-1] / eta[1:], color=ink.first, label="linear")
    ratio.plot(places, np.exp(-0.6 * Delta[1:]), color=ink.second, label="SSD")
    ratio.axhline(1, color=ink.text, linewidth=0.8, linestyle=":")
    ratio.set(title="decay", xlabel="token i", ylim=(0, None))
    ratio.set_box_aspect(1)
    ratio.legend(frameon=False, labelcolor=ink.text, loc="upper left")
    ratio.spines[["top", "right"]].set_visible(False)
    return figure
