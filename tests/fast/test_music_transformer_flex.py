"""Relative attention's score function, global and local, and the mask function of its blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnspec.fast.dense import attention_flex as dense
from attnspec.fast.scores import music_transformer as fast
from attnspec.fast.scores.music_transformer_flex import mask_mod, score_mod
from attnspec.reference.scores import music_transformer as spec
from tests.flex_cases import close, flex, inputs, mask_grid, score_grid, traced, uncompiled


def table(rows: int, shared: bool) -> torch.Tensor:
    random = torch.Generator().manual_seed(rows)
    shape = (rows, 8) if shared else (4, rows, 8)
    return torch.randn(shape, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("L", [1, 2, 13])
@pytest.mark.parametrize("M", [1, 4, 13, 20])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_score_function_is_the_references_logits(
    L: int, M: int, shared: bool, causal: bool
) -> None:
    q, k, _ = inputs(q_tokens=L, k_tokens=L)
    E = table(M if causal else 2 * M - 1, shared)
    content = 0.3 * q @ k.repeat_interleave(2, 1).mT
    got = score_grid(score_mod(fast.relative_logits(0.3 * q, E), causal), content)
    expected = spec.global_logits(*(x.numpy() for x in (q, k, E)), 0.3, causal)
    seen = np.tri(L, dtype=bool) if causal else np.ones((L, L), bool)
    close(got[..., seen], expected[..., seen])


@pytest.mark.parametrize(("L", "b"), [(0, 1), (1, 1), (13, 4), (12, 4), (7, 4), (8, 4), (9, 20)])
def test_the_mask_function_is_the_references_mask(L: int, b: int) -> None:
    got = mask_grid(mask_mod(b), 1, 1, L, L)[0, 0]
    np.testing.assert_array_equal(got, spec.local_visibility(L, b))


@uncompiled
@pytest.mark.parametrize("M", [6, 30])
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_agrees(M: int, causal: bool) -> None:
    q, k, v = inputs()
    E = table(M if causal else 2 * M - 1, shared=False)
    R = fast.relative_logits(q * 8**-0.5, E)
    got, _ = flex(q, k, v, score=score_mod(R, causal), mask=dense.mask_mod(21, 21, causal))
    close(got, spec.global_attention(*(x.numpy() for x in (q, k, v, E)), causal=causal))


@uncompiled
@pytest.mark.parametrize("b", [1, 4, 7, 15])
def test_flex_attention_agrees_in_blocks(b: int) -> None:
    q, k, v = inputs()
    E = table(min(2 * b, 21), shared=True)
    got, _ = flex(
        q, k, v, score=score_mod(fast.relative_logits(0.5 * q, E)), mask=mask_mod(b), scale=0.5
    )
    close(got, spec.local_attention(*(x.numpy() for x in (q, k, v, E)), b, scale=0.5))


@uncompiled
@traced
def test_the_table_is_trained() -> None:
    q, k, v = inputs()
    E = table(6, shared=False).requires_grad_()
    R = fast.relative_logits(q * 8**-0.5, E)
    out, _ = flex(q, k, v, score=score_mod(R), mask=dense.mask_mod(21, 21))
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, E, upstream)
    arrays = [x.detach().numpy() for x in (q, k, v, E, upstream)]
    close(got, spec.global_attention_backward(*arrays)[3])
