"""LSSA as a softmax, the log of softplus its score function, and LSSAR as two of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.dense.attention_flex import mask_mod
from attnspec.fast.flex import MaskMod, ScoreMod
from attnspec.fast.scores.softplus_attention_flex import reweighted_score_mod, score_mod
from attnspec.reference.scores import softplus_attention as spec
from tests.flex_cases import close, flex, indices, inputs, score_grid, uncompiled


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


@pytest.mark.parametrize(("p", "warm", "eps"), [(1, 3, 1e-8), (2.5, 1, 0.0), (15, 5, 1e-3)])
@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(1, 1), (9, 9), (3, 12), (12, 3)])
def test_the_second_score_function_is_the_log_of_the_references_powers(
    p: float, warm: int, eps: float, q_tokens: int, k_tokens: int
) -> None:
    """In every row that sees a key, of all its keys; lse is that of the finished row."""
    q, k, _ = (x.numpy() for x in inputs(q_tokens=q_tokens, k_tokens=k_tokens))
    seen = np.tri(q_tokens, k_tokens, k_tokens - q_tokens, dtype=bool)
    n = spec.visible_counts(seen)
    scores = spec.lssa_scores(spec.lssa_logits(q, k, n + np.zeros((2, 1), int)), seen)
    total = spec.row_sum(scores)
    excess = n[:, None] * spec.lssa_weights(scores, total, eps) - (n > warm)[:, None]
    plain = torch.from_numpy(spec.unit(q) @ np.swapaxes(np.repeat(spec.unit(k), 2, 1), -1, -2))
    with np.errstate(divide="ignore"):
        lse = torch.from_numpy(np.log(total))
    mod = reweighted_score_mod(torch.from_numpy(n), 8, lse, p, eps, warm, dead_tol=0.0)
    powers = np.exp(score_grid(mod, plain))
    close(powers[..., seen], np.clip(excess, 0, None)[..., seen] ** p)
    assert (powers[..., n == 0, :] == 0).all()


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, score: ScoreMod, mask: MaskMod, scale: float
) -> tuple[Tensor, Tensor]:
    """What FlexAttention computes, differentiable on the CPU, where it is not."""
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
    plain = scale * q @ k.mT
    pairs = indices(*plain.shape)
    scores = torch.where(mask(*pairs), score(plain, *pairs), -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    return weights @ v, lse


def two_calls(
    attention: Any, tensors: list[Tensor], real: Tensor, eps_mode: str, **options: Any
) -> Tensor:
    """`lssar` in causal order."""
    q, k, v = tensors
    tokens, keys, d = q.shape[2], k.shape[2], q.shape[3]
    n = (real[:, None] & torch.ones(tokens, keys).tril(keys - tokens).bool()).sum(-1)
    if options["normalise_qk"]:
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    mask, eps = mask_mod(tokens, keys, key_mask=real), options.get("eps", 1e-8)
    first = score_mod(n, d, options["normalise_qk"])
    _, lse = attention(q, k, v, score=first, mask=mask, scale=1.0)
    if eps_mode == "additive":
        options["dead_tol"] = 0.0
    second = reweighted_score_mod(n, d, lse, **options)
    out, lse = attention(q, k, v, score=second, mask=mask, scale=1.0)
    return out * torch.sigmoid(lse - math.log(eps))[..., None] if eps_mode == "additive" else out


@uncompiled
@pytest.mark.parametrize("eps_mode", ["additive", "logspace"])
@pytest.mark.parametrize(
    "options",
    [
        {"normalise_qk": True},
        {"normalise_qk": False, "p": 3},
        {"normalise_qk": True, "p": 1, "warm": 5, "eps": 1e-2},
    ],
)
@pytest.mark.parametrize("padded", [True, False])
def test_two_calls_agree(eps_mode: str, options: dict[str, Any], padded: bool) -> None:
    """Among the rows are some that see nothing, or a single key; gradients pass through lse."""
    tensors = inputs(q_tokens=12, k_tokens=12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = not padded
    arrays = [x.numpy() for x in tensors]
    settings = {**options, "eps_mode": eps_mode, "causal": True, "mask": real.numpy()[:, None]}
    expected = spec.lssar(*arrays, **settings)
    close(two_calls(flex, tensors, real, eps_mode, **options), expected)
    leaves = [x.requires_grad_() for x in tensors]
    out = two_calls(dense, leaves, real, eps_mode, **options)
    close(out.detach(), expected)
    gradients = torch.autograd.grad(out, leaves, torch.from_numpy(np.sin(expected)))
    truths = spec.lssar_backward(*arrays, np.sin(expected), **settings)
    for gradient, truth in zip(gradients, truths, strict=True):
        np.testing.assert_allclose(gradient, truth, rtol=1e-8, atol=1e-10)


@uncompiled
@pytest.mark.parametrize("eps_mode", ["additive", "logspace"])
def test_rows_of_equal_scores_are_dead(eps_mode: str) -> None:
    q, k, v = inputs(q_tokens=9, k_tokens=9)
    tensors, real = [torch.ones_like(q), torch.ones_like(k), v], torch.ones(2, 9, dtype=torch.bool)
    out = two_calls(flex, tensors, real, eps_mode, normalise_qk=True)
    close(out, spec.lssar(*(x.numpy() for x in tensors), causal=True, eps_mode=eps_mode))
    assert (out[:, :, 3:].abs() < 1e-12).all()
    assert (out[:, :, :3] != 0).all()
