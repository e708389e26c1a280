"""Masks that a model selects, once they are there: SeerAttention's blocks and MoH's heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import and_masks

from attnspec.fast.dense import attention_flex as dense
from attnspec.fast.heads import moh_flex
from attnspec.fast.selection import seer_attention_flex
from attnspec.reference.heads.moh_heads import head_outputs
from attnspec.reference.selection.seer_attention import block_sparse_attend
from tests.flex_cases import close, flex, inputs, mask_grid, uncompiled


def bits(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < 0.5


@uncompiled
@pytest.mark.parametrize(("T", "b"), [(21, 8), (16, 16), (5, 1)])
def test_blocks(T: int, b: int) -> None:
    tensors, nb = inputs(q_tokens=T, k_tokens=T), -(-T // b)
    M = bits(2, 4, nb, nb)
    mask = seer_attention_flex.mask_mod(M, b)
    spread = M.numpy().repeat(b, axis=2).repeat(b, axis=3)[..., :T, :T]
    np.testing.assert_array_equal(mask_grid(mask, 2, 4, T, T), spread & np.tri(T, dtype=bool))
    expected = block_sparse_attend(*(x.numpy() for x in tensors), M.numpy(), b)
    for x, y in zip(flex(*tensors, mask=mask), expected, strict=True):
        close(x, y)


@uncompiled
@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(9, 9), (4, 20)])
def test_heads(q_tokens: int, k_tokens: int) -> None:
    tensors = inputs(q_tokens=q_tokens, k_tokens=k_tokens)
    active = bits(2, q_tokens, 4)
    mask = moh_flex.mask_mod(active)
    got = mask_grid(mask, 2, 4, q_tokens, k_tokens)
    rows = active.numpy().swapaxes(1, 2)[..., None]
    np.testing.assert_array_equal(got, np.broadcast_to(rows, got.shape))
    out, _ = flex(*tensors, mask=and_masks(mask, dense.mask_mod(q_tokens, k_tokens)))
    arrays = [x.numpy() for x in tensors]
    close(out, head_outputs(*arrays, active.numpy(), causal=True))
