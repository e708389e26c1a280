"""Based's sliding window as a mask function, and its Taylor weights as a score function."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnspec.fast.dense import attention_flex as dense
from attnspec.fast.linear.based_flex import mask_mod, score_mod
from attnspec.reference.linear import based as spec
from attnspec.reference.linear.based_features import weigh
from tests.flex_cases import close, flex, inputs, mask_grid, score_grid, uncompiled

SIZES = [(1, 1), (9, 9), (3, 12), (12, 3), (30, 31)]


@pytest.mark.parametrize(("q_tokens", "k_tokens"), SIZES)
@pytest.mark.parametrize("left", [0, 1, 5, 64])
def test_the_mask_function_is_the_references_window(
    q_tokens: int, k_tokens: int, left: int
) -> None:
    """Equal weights on unit values show what the reference lets a query see."""
    zeros = np.zeros((1, q_tokens, 2)), np.zeros((1, k_tokens, 2))
    expected = spec.sliding_window_attend(*zeros, np.eye(k_tokens)[None], left)[0] > 0
    got = mask_grid(mask_mod(q_tokens, k_tokens, left), 1, 1, q_tokens, k_tokens)[0, 0]
    np.testing.assert_array_equal(got, expected)


def test_the_score_function_is_the_log_of_the_references_weight() -> None:
    scores = torch.linspace(-9, 9, 37, dtype=torch.float64)[None, None, None]
    close(np.exp(score_grid(score_mod(), scores)), weigh(scores.numpy()))


@uncompiled
@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(21, 21), (5, 21), (21, 5)])
def test_flex_attention_agrees(q_tokens: int, k_tokens: int) -> None:
    tensors = inputs(q_tokens=q_tokens, k_tokens=k_tokens)
    arrays = [x.numpy() for x in tensors]
    got, _ = flex(*tensors, mask=mask_mod(q_tokens, k_tokens, 6))
    close(got, spec.sliding_window_attend(*arrays, 6))
    got, _ = flex(*tensors, score=score_mod(), mask=dense.mask_mod(q_tokens, k_tokens))
    close(got, spec.based_attend(*arrays, causal=True, eps=0.0))
