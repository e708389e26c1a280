"""RCMHA's score function from its pieces, and the mask function of a segment behind a memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.scores.rcmha_flex import mask_mod, score_mod
from attnspec.reference.scores import rcmha as spec
from tests.flex_cases import close, flex, inputs, mask_grid, score_grid, uncompiled

SIZES = [(1, 0), (1, 6), (7, 0), (7, 5), (5, 30)]
P = 40


def parameters() -> tuple[Tensor, Tensor, Tensor]:
    """R (2 P, heads, dk), b (2 P, heads) and u (heads, dk)."""
    random = torch.Generator().manual_seed(1)
    shapes = (2 * P, 4, 8), (2 * P, 4), (4, 8)
    R, b, u = (torch.randn(x, generator=random, dtype=torch.float64) for x in shapes)
    return R, b, u


def pieces(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    R, b, u = parameters()
    T, S = q.shape[2], k.shape[2]
    rows = slice(P - S, P + T)
    products = q @ R[rows].permute(1, 2, 0) + b[rows].T[:, None]
    return products, (k @ u[..., None])[..., 0]


@pytest.mark.parametrize(("T", "M"), SIZES)
def test_the_score_function_is_the_references_score(T: int, M: int) -> None:
    q, k, _ = inputs(4, 4, T, T + M)
    R, b, u = (x.numpy() for x in parameters())
    got = score_grid(score_mod(*pieces(q, k), 0.3), 0.3 * q @ k.mT)
    expected = spec.content_scores(q.numpy(), u, k.numpy())
    close(got, 0.3 * (expected + spec.relative_scores(q.numpy(), R, b, M)))


@pytest.mark.parametrize(("T", "M"), [*SIZES, (0, 3)])
def test_the_mask_function_is_the_references_mask(T: int, M: int) -> None:
    got = mask_grid(mask_mod(M), 1, 1, T, M + T)[0, 0]
    np.testing.assert_array_equal(got, spec.memory_mask(T, M))


@uncompiled
@pytest.mark.parametrize(("T", "M"), SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_agrees(T: int, M: int, causal: bool) -> None:
    q, k, v = inputs(4, 4, T, T + M)
    mask, score = mask_mod(M) if causal else None, score_mod(*pieces(q, k), 8**-0.5)
    got, _ = flex(q, k, v, score=score, mask=mask)
    tables = (x.numpy() for x in parameters())
    close(got, spec.relative_attention(*(x.numpy() for x in (q, k, v)), *tables, causal=causal))
