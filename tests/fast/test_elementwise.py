"""Scans without matrix products on the CPU: gradients, states, torch.library."""

from __future__ import annotations

import pytest
import torch

from attnspec.fast.engines.scan import elementwise, selective
from attnspec.fast.engines.scan.elementwise import elementwise_op
from attnspec.fast.engines.scan.selective import selective_op


def inputs(tokens: int) -> list[torch.Tensor]:
    """Delta, A, b, c, u, D, h0 in float64; b and c are views of one tensor."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    b, c = torch.randn(2, tokens, 6, **options).split(3, -1)
    Delta, A = torch.rand(2, tokens, 4, **options), torch.rand(4, 3, **options)
    u, D = torch.randn(2, 4, tokens, **options).mT, torch.randn(4, **options)
    made = [Delta, A, b, c, u, D, torch.randn(2, 4, 3, **options)]
    return [x.detach().requires_grad_() for x in made]


@pytest.mark.parametrize("tokens", [1, 5])
def test_selective_gradients(tokens: int) -> None:
    assert torch.autograd.gradcheck(selective, inputs(tokens))


@pytest.mark.parametrize("tokens", [1, 5])
def test_elementwise_gradients(tokens: int) -> None:
    torch.manual_seed(1)
    a = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    x, h0 = torch.randn_like(a).requires_grad_(), torch.randn_like(a[:, 0]).requires_grad_()
    assert torch.autograd.gradcheck(elementwise, (a, x, h0))


def test_ops_are_well_registered() -> None:
    given = inputs(3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(selective_op.op, (*given, None, "numba"), test_utils=checks)
    a, x, h0 = given[0], given[4], given[6][..., 0].detach().requires_grad_()
    torch.library.opcheck(elementwise_op.op, (a, x, h0, None, "numba"), test_utils=checks)


def test_compiles_as_one_graph() -> None:
    given = inputs(3)
    made = []
    for run in (selective, torch.compile(selective, fullgraph=True, backend="aot_eager")):
        y, last = run(*given)
        made.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), given)])
    torch.testing.assert_close(*made)


def test_no_tokens_keep_the_state() -> None:
    *rest, h0 = inputs(3)
    Delta, A, b, c, u, D = (x.detach() for x in rest)
    y, last = selective(Delta[:, :0], A, b[:, :0], c[:, :0], u[:, :0], D, h0.detach())
    assert y.shape == (2, 0, 4)
    torch.testing.assert_close(last, h0.detach())
