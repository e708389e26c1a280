"""The rotation op where no mechanism looks: registered as it should be, linear, its own inverse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.rows import turn
from attnspec.fast.engines.rows.turning import turn_op

FAR = torch.tensor([0, 1, 131_071, 2**31 + 5, -70_000])


@pytest.mark.parametrize("paired", [False, True])
def test_opcheck(paired: bool) -> None:
    q = torch.randn(1, 4, 3, 6, requires_grad=True)
    k = torch.randn(1, 2, 5, 6, requires_grad=True) if paired else None
    plain = (2, 2, False, False, math.log(1e4), 0.1, 3, math.log(7.0), 1.0, torch.float32)
    torch.library.opcheck(turn_op.op, (q, k, None, None, None, *plain, "numba"))


def test_second_gradients() -> None:
    q = torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 4, 6, dtype=torch.float64, requires_grad=True)

    def turned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return turn(q, k, neighbours=True, decay=(4, 9.0), warmth=(3.0, 0.5))

    torch.autograd.gradcheck(turned, (q, k))
    torch.autograd.gradgradcheck(turned, (q, k))


def test_far_positions() -> None:
    """Angles are formed in float64 and only then reduced."""
    x = torch.randn(1, 1, 5, 4)
    f = torch.tensor([1.0, 0.37], dtype=torch.float64)
    angles = FAR.double()[:, None] * f
    turned, _ = turn(x, None, FAR, None, f)
    a, b = x.double().chunk(2, -1)
    expected = torch.cat(
        (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1
    )
    torch.testing.assert_close(turned.double(), expected, rtol=1e-6, atol=1e-6)


def test_nothing_to_turn() -> None:
    none = torch.empty(2, 0)
    q, k = turn(torch.randn(2, 4, 0, 6), torch.randn(2, 2, 3, 6), none, warmth=(4.0, 1.0))
    assert q.shape == (2, 4, 0, 6)
    assert k.shape == (2, 2, 3, 6)
    assert turn(torch.randn(0, 4, 3, 6))[0].shape == (0, 4, 3, 6)
