"""Scans without matrix products on the CPU: gradients, states, torch.library; the task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnspec.fast.engines.scan import elementwise, selective
from attnspec.fast.linear.dsf import mqar_batch, qlstm


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


def test_opcheck() -> None:
    single = [x.detach().float().requires_grad_() for x in inputs(4)]
    torch.library.opcheck(torch.ops.attnspec.selective.default, (*single, "numba"))
    a, x, h0 = single[0], single[4], single[6][..., 0].detach().requires_grad_()
    torch.library.opcheck(torch.ops.attnspec.elementwise.default, (a, x, h0, "numba"))


def test_no_tokens_keep_the_state() -> None:
    *rest, h0 = inputs(3)
    Delta, A, b, c, u, D = (x.detach() for x in rest)
    y, last = selective(Delta[:, :0], A, b[:, :0], c[:, :0], u[:, :0], D, h0.detach())
    assert y.shape == (2, 0, 4)
    torch.testing.assert_close(last, h0.detach())


def test_alpha_is_trained() -> None:
    torch.manual_seed(2)
    f, i, o, z = torch.randn(4, 1, 6, 3)
    alpha = torch.tensor(1.5, requires_grad=True)
    y, _ = qlstm(f, i, o, z, alpha, True)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(y.sum(), alpha)
    ahead, behind = (qlstm(f, i, o, z, 1.5 + e, True)[0].sum() for e in (1e-2, -1e-2))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-2, rtol=1e-3, atol=1e-4)


def test_recall_batches_bind_keys_to_values() -> None:
    inputs, labels = (x.numpy() for x in mqar_batch(np.random.default_rng(0), 256, 64, 4, 50))
    for row, asked in zip(inputs, labels, strict=True):
        keys, values = row[0:8:2], row[1:8:2]
        assert len(set(keys)) == len(set(values)) == 4
        assert keys.min() >= 1
        assert keys.max() < 128 <= values.min()
        bound = dict(zip(keys, values, strict=True))
        places = np.flatnonzero(asked != -100)
        assert len(places) == 4
        assert [bound[key] for key in row[places]] == asked[places].tolist()
