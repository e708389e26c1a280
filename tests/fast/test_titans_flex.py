"""The masks of Titans' layouts as mask functions: MAC, MAG and MAL around a memory that copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.linear.titans_flex import mac_mask_mod, mag_mask_mod, mal_mask_mod
from attnspec.reference.linear import titans_layouts as spec
from tests.flex_cases import close, flex, mask_grid, uncompiled

D = 4
COPY: Any = (np.eye(D),), None
"""A memory of one layer that hands on what it is asked, and learns nothing at rates of 0."""
RATES = (0.0, 0.0, 0.0)
GAINS = (np.linspace(0.5, 1.5, D), np.linspace(-1.0, 1.0, D))


@pytest.mark.parametrize(("T", "C"), [(1, 1), (9, 4), (12, 3), (5, 20), (0, 2)])
@pytest.mark.parametrize("N_p", [0, 1, 3])
@pytest.mark.parametrize("tokenwise", [False, True])
def test_segments(T: int, C: int, N_p: int, tokenwise: bool) -> None:
    got = mask_grid(mac_mask_mod(T, C, N_p, tokenwise), 1, 1, T, N_p + 2 * T)[0, 0]
    np.testing.assert_array_equal(got, spec.titans_mask_mac(T, C, N_p, tokenwise))


@pytest.mark.parametrize("T", [0, 1, 9, 20])
@pytest.mark.parametrize("w", [1, 4, 30])
@pytest.mark.parametrize("N_p", [0, 1, 3])
def test_windows(T: int, w: int, N_p: int) -> None:
    rows = N_p + T
    got = mask_grid(mag_mask_mod(w, N_p), 1, 1, rows, rows)[0, 0]
    np.testing.assert_array_equal(got, spec.titans_mask_mag(T, w, N_p))
    got = mask_grid(mal_mask_mod(w), 1, 1, rows, rows)[0, 0]
    np.testing.assert_array_equal(got, spec.titans_mask_mag(rows, w, 0))


def rows(T: int, N_p: int) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """x, P, the matrices of attention and those of the memory, which change nothing."""
    random = np.random.default_rng(T)
    attention = tuple(random.standard_normal((3, D, D)))
    x, P = random.standard_normal((2, T, D)), random.standard_normal((N_p, D))
    return x, P, attention, (np.eye(D),) * 3


def attend(queries: np.ndarray, keys: np.ndarray, attention: Any, mask: Any) -> np.ndarray:
    each = zip((queries, keys, keys), attention, strict=True)
    q, k, v = (torch.from_numpy(x @ matrix)[:, None] for x, matrix in each)
    return flex(q, k, v, mask=mask)[0][:, 0].numpy()


@uncompiled
@pytest.mark.parametrize("tokenwise", [False, True])
def test_flex_attention_in_a_segment(tokenwise: bool) -> None:
    x, P, attention, memory = rows(9, 2)
    keys = np.concatenate([spec.persistent_prefix(P, x), x], axis=1)
    y = attend(x, keys, attention, mac_mask_mod(9, 9, 2, tokenwise))
    expected = spec.mac_segment(
        x, P, *COPY, attention, memory, RATES, GAINS, 4, tokenwise=tokenwise
    )
    close(spec.gate(y, y, GAINS), expected[0])


@uncompiled
def test_flex_attention_in_windows() -> None:
    x, P, attention, memory = rows(13, 3)
    prefixed = spec.persistent_prefix(P, x)
    y = attend(prefixed, prefixed, attention, mag_mask_mod(4, 3))
    expected = spec.mag(x, P, *COPY, attention, memory, RATES, GAINS, 4, 5)[0]
    close(spec.gate(y, prefixed, GAINS)[:, 3:], expected)
    y = attend(prefixed, prefixed, attention, mal_mask_mod(4))
    close(y[:, 3:], spec.mal(x, P, *COPY, attention, memory, RATES, 4, 5)[0])
