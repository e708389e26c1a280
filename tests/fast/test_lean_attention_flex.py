"""Lean attention's lengths as a mask function."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnspec.fast.parallel.lean_attention_flex import mask_mod
from attnspec.reference.parallel import lean_attention as spec
from tests.flex_cases import close, flex, inputs, mask_grid, uncompiled


@pytest.mark.parametrize("Tq", [1, 5, 12])
@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_function_is_what_the_reference_reads(Tq: int, causal: bool) -> None:
    """Equal weights on unit values show it."""
    lengths = torch.tensor([9, 4, 0])
    zeros = np.zeros((3, 1, Tq, 2)), np.zeros((3, 1, 9, 2))
    values = np.broadcast_to(np.eye(9), (3, 1, 9, 9))
    out, _ = spec.attend(*zeros, values, lengths.numpy(), 4, 2, causal=causal)
    got = mask_grid(mask_mod(Tq, lengths, causal), 3, 1, Tq, 9)
    np.testing.assert_array_equal(got, out > 0)


@uncompiled
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_agrees(causal: bool) -> None:
    tensors, lengths = inputs(q_tokens=6, k_tokens=20), torch.tensor([20, 4])
    got = flex(*tensors, mask=mask_mod(6, lengths, causal))
    arrays = [x.numpy() for x in tensors]
    expected = spec.attend(*arrays, lengths.numpy(), 4, 3, causal=causal)
    for x, y in zip(got, expected, strict=True):
        close(x, y)
