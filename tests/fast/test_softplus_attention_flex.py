"""LSSA as a softmax: the log of softplus as a score function."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnspec.fast.dense.attention_flex import mask_mod
from attnspec.fast.scores.softplus_attention_flex import score_mod
from attnspec.reference.scores import softplus_attention as spec
from tests.flex_cases import close, flex, inputs, score_grid, uncompiled


@pytest.mark.parametrize("normalise_qk", [True, False])
@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(1, 1), (9, 9), (3, 12), (12, 3)])
def test_the_score_function_is_the_log_of_the_references_score(
    normalise_qk: bool, q_tokens: int, k_tokens: int
) -> None:
    q, k, _ = (x.numpy() for x in inputs(q_tokens=q_tokens, k_tokens=k_tokens))
    n = spec.visible_counts(True, q_tokens, k_tokens)
    logits = spec.lssa_logits(q, k, n + np.zeros((2, 1), int), normalise_qk=normalise_qk)
    a, b = (spec.unit(x) if normalise_qk else x for x in (q, k))
    plain = torch.from_numpy(a @ np.swapaxes(np.repeat(b, 2, axis=1), -1, -2))
    got = score_grid(score_mod(torch.from_numpy(n), 8, normalise_qk), plain)
    close(np.exp(got), spec.lssa_scores(logits))


def test_far_scores_are_finite() -> None:
    scores = torch.tensor([-5000.0, -60.5, -59.5, 0.0, 5000.0], dtype=torch.float64)
    mod = score_mod(torch.tensor([2]), 1000)
    x = scores.numpy() * np.log(2) * np.log(1000)
    close(score_grid(mod, scores[None, None, None])[0, 0, 0, [0, 1, 4]], [*x[:2], np.log(x[4])])


@uncompiled
@pytest.mark.parametrize("normalise_qk", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_flex_attention_agrees(normalise_qk: bool, padded: bool) -> None:
    tensors = inputs(q_tokens=9, k_tokens=12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = not padded
    seen = real[:, None].numpy() & np.tri(9, 12, 3, dtype=bool)
    n = torch.from_numpy(spec.visible_counts(seen))
    arrays = [x.numpy() for x in tensors]
    q, k = (
        torch.from_numpy(spec.unit(x)) if normalise_qk else torch.from_numpy(x) for x in arrays[:2]
    )
    score, mask = score_mod(n, 8, normalise_qk), mask_mod(9, 12, key_mask=real)
    got, _ = flex(q, k, tensors[2], score=score, mask=mask, scale=1.0)
    expected = spec.lssa(
        *arrays, causal=True, mask=real.numpy()[:, None], eps=0.0, normalise_qk=normalise_qk
    )
    close(got, expected)
