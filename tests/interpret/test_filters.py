"""The filter engine's Triton kernels in the interpreter, against its CPU kernels in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from attnspec.fast.engines.filters import causal_filter
from attnspec.fast.engines.filters.configs import FilterConfig, use_config


@pytest.mark.parametrize(
    ("T", "K", "d", "with_state"),
    [(1, 3, 5, True), (2, 4, 16, True), (21, 3, 16, False), (9, 1, 7, True)],
)
def test_outputs_and_gradients(T: int, K: int, d: int, with_state: bool) -> None:
    random = torch.Generator().manual_seed(T)
    shapes = ((2, T, 2, d), (d, K), (d,), (2, 2, K - 1, d))[: 4 if with_state else 3]
    inputs = [torch.randn(shape, generator=random) for shape in shapes]
    inputs[0] = inputs[0].transpose(1, 2)
    dy = torch.randn(2, 2, d, T, generator=random).mT
    wide = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    with use_config(FilterConfig(128, 2, 4)):
        y = causal_filter(*inputs, backend="triton")
        got = [y, *torch.autograd.grad(y, inputs, dy)]
    expected = causal_filter(*wide, backend="numba")
    for a, b in zip(
        got, [expected, *torch.autograd.grad(expected, wide, dy.double())], strict=True
    ):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_float64_is_for_the_cpu() -> None:
    p, w, b = (torch.ones(shape, dtype=torch.float64) for shape in ((1, 1, 2, 3), (3, 2), (3,)))
    with pytest.raises(TypeError, match=r"^p: "):
        causal_filter(p, w, b, backend="triton")
