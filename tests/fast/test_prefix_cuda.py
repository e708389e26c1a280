"""The prefix engine on a CUDA device: against its formula in float64, captured, and bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.prefix import add_prefix
from attnspec.fast.linear.ntk_attention import merge_prefix, ntk_attend, prefix_terms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def make(sizes: tuple[int, ...], dtype: torch.dtype, state: torch.dtype) -> list[Tensor]:
    """q, soft, lse, Z and k, and the gradient of the output."""
    torch.manual_seed(sizes[2])
    batch, heads, tokens, d, dv = sizes
    rows = batch, heads, tokens
    q, soft, dout = (torch.randn(*rows, n, device="cuda").to(dtype) for n in (d, dv, dv))
    lse = 3 * torch.randn(rows, device="cuda")
    lse[..., ::7], soft[:, :, ::7] = -torch.inf, 0.0
    Z, k = (torch.randn(heads, d, *n, device="cuda").to(state) for n in ((dv,), ()))
    return [q, soft, lse, Z, k, dout]


@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize(
    "sizes",
    [(1, 4, 3000, 128, 128), (2, 3, 300, 64, 64), (2, 2, 100, 100, 36), (1, 2, 200, 256, 256),
     (24, 2, 1, 128, 128), (3, 2, 5, 5, 17)],
)  # fmt: skip
def test_outputs_and_gradients(
    sizes: tuple[int, ...], dtype: torch.dtype, state: torch.dtype
) -> None:
    *inputs, dout = make(sizes, dtype, state)
    leaves = [x.requires_grad_() for x in inputs]
    out = add_prefix(*leaves, positivity="softplus")
    got = [out, *torch.autograd.grad(out, leaves, dout, retain_graph=True)]
    again = torch.autograd.grad(out, leaves, dout)
    assert all(map(torch.equal, got[1:], again))
    q, soft, lse, Z, k = wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = merge_prefix(soft, lse, *prefix_terms(q, Z, k, positivity="softplus"))
    expected = [exact, *torch.autograd.grad(exact, wide, dout.double())]
    for x, y in zip(got, expected, strict=True):
        # What is float32 beside 16-bit rows is a sum of products of two parts of bfloat16 each.
        bound = BOUNDS[x.dtype] if dtype == torch.float32 else max(BOUNDS[x.dtype], 1e-4)
        assert (x.double() - y).norm() <= bound * y.norm()


def test_a_captured_call() -> None:
    q, K, V = (torch.randn(1, heads, 200, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    Z, k = torch.randn(4, 64, 64, device="cuda"), torch.randn(4, 64, device="cuda")
    expected = ntk_attend(q, K, V, Z, k, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ntk_attend(q, K, V, Z, k, causal=True)
    graph.replay()
    assert torch.equal(out, expected)
