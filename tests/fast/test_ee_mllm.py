"""Composite attention's plan: what is gathered, what is refused, and gradients of a whole layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.patterns import ee_mllm as fast
from attnspec.fast.patterns.ee_mllm_flex import mask_mod
from attnspec.reference.patterns.ee_mllm_attention import composite_mask

TEXT = torch.tensor([c == "t" for c in "ttvvvtvvtt"])
POSITIONS = torch.tensor([3, 9, 4, 1, 7, 0, 2, 11, 5, 20])


@pytest.mark.parametrize("image_visible", ["causal", "all"])
def test_mask_function_is_the_references_mask(image_visible: str) -> None:
    expected = composite_mask(~TEXT.numpy(), POSITIONS.numpy(), image_visible)
    seen = mask_mod(~TEXT, POSITIONS, image_visible)
    token, zero = torch.arange(10), torch.tensor(0)
    got = seen(zero, zero, token[:, None], token)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("image_visible", ["causal", "all"])
@pytest.mark.parametrize("positions", [None, POSITIONS])
def test_gradients_of_composite_attention(image_visible: str, positions: Tensor | None) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 5, 3), (1, 1, 10, 3), (1, 1, 10, 2)]
    given = [
        torch.randn(s, generator=random, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    assert torch.autograd.gradcheck(
        lambda q, k, v: fast.composite_attention(q, k, v, ~TEXT, positions, image_visible), given
    )


def test_gradients_of_a_layer_reach_states_and_weights() -> None:
    random = torch.Generator().manual_seed(1)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()

    weights = [made(4), made(4, 8), made(4, 4), made(4, 6), made(12, 4), made(4)]
    ffn = (made(4, 3), made(4, 3), made(3, 4))
    Xt, Xv = made(1, 3, 4), made(1, 2, 4)
    pos_t, pos_v = torch.tensor([0, 3, 4]), torch.tensor([1, 2])

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        layer = fast.Layer(*given[2:8], tuple(given[8:]), 4, 2, 100.0)
        return fast.layer_step(given[0], given[1], layer, pos_t, pos_v)

    assert torch.autograd.gradcheck(call, (Xt, Xv, *weights, *ffn))


def test_what_is_refused() -> None:
    x = torch.zeros(1, 1, 10, 4)
    with pytest.raises(ValueError, match=r"^qt: got 6 rows"):
        fast.composite_attention(x[:, :, :6], x, x, ~TEXT)
    with pytest.raises(ValueError, match=r"^pos: got \[0, 0"):
        fast.composite_attention(x[:, :, :5], x, x, ~TEXT, torch.zeros(10, dtype=torch.int64))


def test_a_stack_is_checked_before_its_first_layer() -> None:
    eye, one = torch.eye(2), torch.ones(2)
    layer = fast.Layer(one, eye, eye, eye, eye, one, (eye, eye, eye), 1, 1)
    states = (eye[None], eye[None, :1], [layer, layer._replace(Wo=eye[:1])])
    positions = (torch.tensor([0, 2]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"^layer: got Wo"):
        fast.run_layers(*states, *positions)
    with pytest.raises(ValueError, match=r"^mode: got 'none'"):
        fast.run_layers(*states, *positions, layers=(), mode="none")
