"""The density engine on the CPU against the formula in float64, and its place in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.density.op import _density
from attnspec.fast.scores.gaussian_attention import block, multi_head

SHAPES = [((2, 9, 3), 1), ((2, 3, 9), -1), ((2, 130), 1), ((7, 2), 0), ((1, 5, 70, 2), 2)]


def formula(x: Tensor, axis: int, delta: Tensor, c: Tensor, combine: str) -> Tensor:
    """The weights, by autograd's own means."""
    heads, weights = len(c), []
    chunk = x.shape[axis] // heads
    sizes = [chunk] * (heads - 1) + [x.shape[axis] - chunk * (heads - 1)]
    for m, z in enumerate(x.split(sizes, axis)):
        mu, var = z.mean(axis, keepdim=True), z.var(axis, keepdim=True) + 1e-8
        G = torch.distributions.Normal(0.0, c[m].abs())
        log = G.log_prob(
            (z - mu)[..., None] / var.sqrt()[..., None] - delta[m] / var.sqrt()[..., None]
        )
        raw = (log.sum(-1) if combine == "product" else log.logsumexp(-1)).exp()
        raw = raw if combine == "product" else raw / c.shape[1]
        weights.append(raw / raw.sum(axis, keepdim=True).clamp(min=1e-8))
    return torch.cat(weights, axis)


def layer(heads: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    delta, c = 0.4 * torch.randn(heads, 3), 0.6 + torch.rand(heads, 3)
    return delta.to(dtype).requires_grad_(), c.to(dtype).requires_grad_()


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, combine: str
) -> None:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape).to(dtype).transpose(0, -1).contiguous().transpose(0, -1)
    params = layer(2, dtype)
    exact = [a.detach().double().requires_grad_() for a in (x, *params)]
    w = formula(exact[0], axis, *exact[1:], combine)
    upstream = torch.randn(2, *shape, dtype=torch.float64)
    truth = torch.autograd.grad([exact[0] * w, w], exact, list(upstream))
    x = x.requires_grad_()
    out = multi_head(x, axis, params, combine=combine)
    got = torch.autograd.grad(list(out), [x, *params], [u.to(dtype) for u in upstream])
    loose = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    for a, b in zip((*out, *got), (exact[0] * w, w, *truth), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), b, rtol=loose, atol=loose * (1 + float(b.detach().abs().max()))
        )


def test_a_block_adds_its_layers() -> None:
    torch.manual_seed(0)
    x, layers = torch.randn(2, 6, 8), [(1, layer(2, torch.float32)), (-1, layer(3, torch.float32))]
    x[:, 4:] = 0
    out, weights = block(x, layers, 0.0)
    first = x + multi_head(x, 1, layers[0][1], x != 0)[0]
    second, w = multi_head(first, 2, layers[1][1], first != 0)
    torch.testing.assert_close(out, first + second)
    torch.testing.assert_close(weights[1], w)
    assert bool((out[:, 4:] == 0).all())


def test_nothing_and_strides() -> None:
    params = layer(1, torch.float32)
    out, w = multi_head(torch.zeros(0, 4, 3), 1, params)
    assert out.shape == w.shape == (0, 4, 3)
    x = torch.randn(3, 8, 10)[:, ::2, 1::3]
    for strided, plain in zip(
        multi_head(x, 1, params), multi_head(x.clone(), 1, params), strict=True
    ):
        assert torch.equal(strided, plain)
    one = torch.randn(1, 4, 1).expand(5, 4, 3)
    assert torch.equal(multi_head(one, 1, params)[1], multi_head(one.contiguous(), 1, params)[1])


def test_the_operation_is_a_good_citizen() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    delta, c = layer(2)
    options: tuple[Any, ...] = (1e-8, True, False, True, True, "numba")
    torch.library.opcheck(_density.op, (x, None, delta, c, *options))
    params = layer(2, torch.float32)
    compiled = torch.compile(multi_head, fullgraph=True, backend="aot_eager")
    y = torch.randn(2, 8, 3, requires_grad=True)
    for a, b in zip(compiled(y, 1, params), multi_head(y, 1, params), strict=True):
        torch.testing.assert_close(a, b)
    out = multi_head(y, 1, params)[0].sum()
    (once,) = torch.autograd.grad(out, y, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(once.sum(), y)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"x": torch.ones(4, 4, dtype=torch.int64)}, TypeError, "x"),
        ({"params": (torch.zeros(1, 1), torch.zeros(1, 1))}, ValueError, "params"),
        ({"params": (torch.zeros(3, 1), torch.ones(3, 1))}, ValueError, "params"),
        ({"params": (torch.zeros(1, 1).double(), torch.ones(1, 1))}, TypeError, "params"),
        ({"axis": 2}, ValueError, "axis"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, "mask"),
        ({"backend": "triton"}, ValueError, "backend"),
        ({"clamp": "soft"}, ValueError, "clamp"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], name: str) -> None:
    good = {"x": torch.randn(4, 4), "axis": 1, "params": (torch.zeros(1, 1), torch.ones(1, 1))}
    with pytest.raises(error, match=name):
        multi_head(**{**good, **change})
