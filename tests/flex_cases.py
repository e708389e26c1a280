"""How the tests of mask and score functions for FlexAttention call them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from attnspec.fast.flex import MaskMod, ScoreMod

uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
"""On tests that call `flex`."""

traced = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""On those whose score function captures a tensor that has a gradient: torch looks at it."""


def indices(*sizes: int) -> list[Tensor]:
    """The four indices of (batch, heads, q_tokens, k_tokens), each along its axis."""
    ranges = [torch.arange(n) for n in sizes]
    return [x.view([-1 if a == n else 1 for a in range(4)]) for n, x in enumerate(ranges)]


def mask_grid(mod: MaskMod, *sizes: int) -> np.ndarray:
    """What a mask function says of every pair, bool (batch, heads, q_tokens, k_tokens)."""
    return np.broadcast_to(mod(*indices(*sizes)).numpy(), sizes)


def score_grid(mod: ScoreMod, scores: Tensor) -> np.ndarray:
    """What a score function makes of scores (batch, heads, q_tokens, k_tokens)."""
    return mod(scores, *indices(*scores.shape)).numpy()


def inputs(
    heads: int = 4, kv_heads: int = 2, q_tokens: int = 21, k_tokens: int = 21, d: int = 8
) -> list[Tensor]:
    """q, k and v in float64, two sequences of them, values of width 5."""
    random = torch.Generator().manual_seed(100 * q_tokens + k_tokens)
    shapes = [(heads, q_tokens, d), (kv_heads, k_tokens, d), (kv_heads, k_tokens, 5)]
    return [torch.randn(2, *shape, generator=random, dtype=torch.float64) for shape in shapes]


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskMod | None = None,
    score: ScoreMod | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the lse of FlexAttention, uncompiled, on the CPU."""
    sizes = (*q.shape[:3], k.shape[2])
    blocks = None if mask is None else create_block_mask(mask, *sizes, device="cpu", BLOCK_SIZE=16)
    out, aux = flex_attention(
        q, k, v, score_mod=score, block_mask=blocks, scale=scale, enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out, aux.lse


def close(got: object, expected: object) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
