"""Dense attention's mask functions: the causal rule, padding and packing; others share them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnspec.fast.dense.attention_flex import mask_mod, packed_mask_mod
from attnspec.reference.dense import attention as spec
from attnspec.reference.heads.diffqkv_steps import allowed
from attnspec.reference.positions import giraffe
from tests.flex_cases import close, flex, inputs, mask_grid, uncompiled

SIZES = [(1, 1), (7, 7), (3, 9), (9, 3), (1, 40), (33, 32), (0, 4), (4, 0)]
PACKED = [([0, 4, 4, 9], [0, 3, 5, 12]), ([0, 0, 1], [0, 2, 2]), ([0, 6], [0, 6])]


def padding(k_tokens: int) -> torch.Tensor:
    return torch.rand(2, k_tokens, generator=torch.Generator().manual_seed(k_tokens)) < 0.6


@pytest.mark.parametrize(("q_tokens", "k_tokens"), SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_function_is_the_references_mask(
    q_tokens: int, k_tokens: int, causal: bool
) -> None:
    sizes = 2, 3, q_tokens, k_tokens
    plain = np.broadcast_to(spec.visible(q_tokens, k_tokens, causal=causal), sizes)
    np.testing.assert_array_equal(mask_grid(mask_mod(*sizes[2:], causal), *sizes), plain)
    real = padding(k_tokens)
    got = mask_grid(mask_mod(*sizes[2:], causal, real), *sizes)
    np.testing.assert_array_equal(got, plain & real.numpy()[:, None, None])


def test_chapters_with_the_same_mask() -> None:
    q, k, _ = (x.numpy() for x in inputs(q_tokens=5, k_tokens=9))
    real = padding(9)
    got = mask_grid(mask_mod(5, 9, True, real), 2, 1, 5, 9)
    np.testing.assert_array_equal(got, giraffe.visible(5, 9, True, real.numpy()))
    np.testing.assert_array_equal(got, allowed(q, k, True, real.numpy()))


@uncompiled
@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(21, 21), (5, 30), (30, 5)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_flex_attention_agrees(q_tokens: int, k_tokens: int, heads: int, kv_heads: int) -> None:
    """Also in rows that see nothing."""
    tensors, real = inputs(heads, kv_heads, q_tokens, k_tokens), padding(k_tokens)
    got = flex(*tensors, mask=mask_mod(q_tokens, k_tokens, key_mask=real))
    arrays = [x.numpy() for x in tensors]
    expected = spec.attend(*arrays, causal=True, mask=real.numpy()[:, None, None])
    for x, y in zip(got, expected, strict=True):
        close(x, y)


@pytest.mark.parametrize(("q_offsets", "k_offsets"), PACKED)
@pytest.mark.parametrize("causal", [True, False])
def test_packing(q_offsets: list[int], k_offsets: list[int], causal: bool) -> None:
    expected = np.zeros((q_offsets[-1], k_offsets[-1]), bool)
    for n in range(len(q_offsets) - 1):
        rows = slice(q_offsets[n], q_offsets[n + 1])
        keys = slice(k_offsets[n], k_offsets[n + 1])
        inside = expected[rows, keys]
        inside |= spec.visible(*inside.shape, causal=causal)
    seen = packed_mask_mod(torch.tensor(q_offsets), torch.tensor(k_offsets), causal)
    got = mask_grid(seen, 1, 1, *expected.shape)[0, 0]
    np.testing.assert_array_equal(got, expected)


@uncompiled
def test_flex_attention_agrees_on_packed_sequences() -> None:
    q, k, v = (x[:1] for x in inputs(4, 2, 9, 12))
    offsets = [torch.tensor(x) for x in PACKED[0]]
    got = flex(q, k, v, mask=packed_mask_mod(*offsets, causal=True))
    arrays = [x[0].numpy() for x in (q, k, v)]
    expected = spec.attend_packed(*arrays, *(x.numpy() for x in offsets), causal=True)
    for x, y in zip(got, expected, strict=True):
        close(x[0], y)
