"""Entropy-ABF's order by positions as a mask function, its row scale as a score function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.positions import entropy_abf as fast
from attnspec.fast.positions.entropy_abf_flex import mask_mod, score_mod
from attnspec.reference.positions import entropy_abf as spec
from tests.flex_cases import close, flex, inputs, mask_grid, score_grid, uncompiled


def positions(batched: bool, T: int, S: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(T)
    shapes = ((2, T), (2, S)) if batched else ((T,), (S,))
    pq, pk = (torch.randint(0, 40, shape, generator=random) for shape in shapes)
    return pq, pk


@pytest.mark.parametrize(("T", "S"), [(1, 1), (7, 7), (4, 11), (11, 4)])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_function_is_the_references_mask(
    T: int, S: int, batched: bool, causal: bool
) -> None:
    pq, pk = positions(batched, T, S)
    real = torch.rand(2, S, generator=torch.Generator().manual_seed(S)) < 0.6
    for given in (None, real):
        got = mask_grid(mask_mod(pq, pk, causal, given), 2, 3, T, S)
        padding = None if given is None else given.numpy()
        expected = spec.visible(pq.numpy(), pk.numpy(), causal, padding)
        np.testing.assert_array_equal(got, np.broadcast_to(expected, got.shape))


@pytest.mark.parametrize("batched", [True, False])
def test_the_score_function_is_the_references_logits(batched: bool) -> None:
    """As scores of queries and keys that have been turned."""
    (q, k, _), (pq, pk) = inputs(q_tokens=7, k_tokens=11), positions(batched, 7, 11)
    options = {"base": 100.0, "c": 6.0}
    arrays = [x.numpy() for x in (q, k, pq, pk)]
    plain = torch.from_numpy(spec.logits(*arrays, layer=0, **options))
    got = score_grid(score_mod(fast.row_scale(pq, 6.0)), plain)
    close(got, spec.logits(*arrays, layer=2, **options))


@uncompiled
@pytest.mark.parametrize("batched", [True, False])
def test_flex_attention_agrees(batched: bool) -> None:
    (q, k, v), (pq, pk) = inputs(q_tokens=7, k_tokens=11), positions(batched, 7, 11)
    freqs = 100.0 ** (torch.arange(4, dtype=torch.float64) / -4)
    turned = fast.rope_rotate(q, pq, freqs), fast.rope_rotate(k, pk, freqs)
    got = flex(*turned, v, mask=mask_mod(pq, pk), score=score_mod(fast.row_scale(pq, 6.0)))
    arrays = [x.numpy() for x in (q, k, v, pq, pk)]
    expected = spec.extended_attention(*arrays, layer=2, base=100.0, c=6.0)
    for x, y in zip(got, expected, strict=True):
        close(x, y)
