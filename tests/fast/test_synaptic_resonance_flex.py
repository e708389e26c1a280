"""The mask function of the softmax beside Synaptic Resonance's memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnspec.fast.linear.synaptic_resonance_flex import mask_mod
from attnspec.reference.linear import synaptic_resonance as spec
from attnspec.reference.linear.synaptic_resonance_decode import recent_tokens
from tests.flex_cases import close, flex, inputs, mask_grid, uncompiled

WINDOWS = [None, 1, 4, 50]


def real(T: int) -> torch.Tensor:
    return torch.rand(2, T, generator=torch.Generator().manual_seed(T)) < 0.6


@pytest.mark.parametrize("T", [1, 8, 21])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_mask_function_is_the_references_mask(T: int, window: int | None, padded: bool) -> None:
    valid = real(T) if padded else None
    given = None if valid is None else valid.numpy()
    expected = recent_tokens(np.ones((2, 1, T, 1)), window, given)
    got = mask_grid(mask_mod(window, valid), 2, 3, T, T)
    np.testing.assert_array_equal(got, np.broadcast_to(expected, got.shape))


@uncompiled
@pytest.mark.parametrize("window", WINDOWS)
def test_flex_attention_agrees(window: int | None) -> None:
    """A memory of share 0 leaves the attention."""
    tensors, valid = inputs(), real(21)
    got, _ = flex(*tensors, mask=mask_mod(window, valid))
    arrays = [x.numpy() for x in tensors]
    out, _ = spec.synaptic_resonance(*arrays, beta=0.0, window=window, valid=valid.numpy())
    close(got, out)
