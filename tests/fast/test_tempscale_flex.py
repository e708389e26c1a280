"""TempScale's score function: a temperature for each head, and a bias inside the division."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.dense.attention_flex import mask_mod
from attnspec.fast.scores.tempscale_flex import score_mod
from attnspec.reference.scores import tempscale as spec
from tests.flex_cases import close, flex, inputs, score_grid, traced, uncompiled

TAUS = [0.7, 2, torch.tensor([0.5, 0.9, 1.0, 1.5], dtype=torch.float64)]
BIASES = [None, (17,), (9, 17), (4, 1, 17), (4, 9, 1), (2, 1, 9, 17), (1, 4, 1, 1), (2, 4, 9, 17)]


def draw(shape: tuple[int, ...] | None) -> Tensor | None:
    random = torch.Generator().manual_seed(3)
    return None if shape is None else torch.randn(shape, generator=random, dtype=torch.float64)


def array(x: Any) -> Any:
    return x.numpy() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("tau", TAUS, ids=str)
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_the_score_function_is_the_references_score(
    tau: Any, shape: tuple[int, ...] | None
) -> None:
    q, k, _ = inputs(q_tokens=9, k_tokens=17)
    bias = draw(shape)
    plain = torch.from_numpy(spec.scores(q.numpy(), k.numpy(), 0.3))
    biased = spec.scores(q.numpy(), k.numpy(), 0.3, array(bias))
    close(score_grid(score_mod(tau, bias), plain), spec.temper(biased, array(tau)))


@uncompiled
@pytest.mark.parametrize("tau", TAUS, ids=str)
@pytest.mark.parametrize("scale", [None, 1.0])
def test_flex_attention_agrees(tau: Any, scale: float | None) -> None:
    tensors, bias = inputs(q_tokens=9, k_tokens=17), draw((4, 9, 17))
    score, mask = score_mod(tau, bias), mask_mod(9, 17)
    got = flex(*tensors, score=score, mask=mask, scale=scale)
    expected = spec.tempered_attention(
        *(x.numpy() for x in tensors), tau=array(tau), causal=True, scale=scale, bias=array(bias)
    )
    for x, y in zip(got, expected, strict=True):
        close(x, y)


def test_half_precision_temperatures_do_not_narrow_the_score() -> None:
    score = torch.full((1, 1, 1, 1), 3.0)
    mod = score_mod(torch.tensor([0.5], dtype=torch.float16), torch.ones(1, dtype=torch.float64))
    got = score_grid(mod, score)
    assert got.dtype == np.float32
    assert got.item() == 8.0


@uncompiled
@traced
def test_temperature_and_bias_are_trained() -> None:
    tensors = [x[:1, :, :5] for x in inputs()]
    tau = torch.tensor([0.5, 0.9, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, 1, 5, dtype=torch.float64, requires_grad=True)

    def attend(tau: Tensor, bias: Tensor) -> Tensor:
        return flex(*tensors, score=score_mod(tau, bias))[0]

    assert torch.autograd.gradcheck(attend, (tau, bias))
