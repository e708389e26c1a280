"""The memory engine's Triton kernels in the interpreter against the CPU's in float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from attnspec.fast.engines.memory import MemoryConfig, memory, scalars, use_config, weight_path

SMALL = MemoryConfig(piece=16, walk_items=512, tile=16)


@pytest.mark.parametrize(
    ("tokens", "b", "d", "dv", "group", "before"),
    [(20, 8, 16, 16, 1, False), (35, 24, 20, 12, 2, True), (1, 1, 16, 40, 1, False)],
)
def test_linear_memory(tokens: int, b: int, d: int, dv: int, group: int, before: bool) -> None:
    torch.manual_seed(tokens)
    shapes = ((1, 1, d, dv), (1, 1, d, dv), (1, 1, tokens, d), (1, 1, tokens, dv),
              (1, group, tokens, d))  # fmt: skip
    W, S, k, v, q = (torch.randn(s) / d**0.5 for s in shapes)
    rates = tuple(torch.rand(1, 1, tokens) for _ in range(3))
    stored = torch.arange(tokens)[None] < max(1, tokens - 3)
    results = []
    for dtype, backend in ((torch.float64, "numba"), (torch.float32, "triton")):
        leaves = [x.to(dtype).requires_grad_() for x in (W, S, k, v, q, *rates)]
        first, momentum, key, value, query, *three = leaves
        with use_config(SMALL):
            y, last_W, last_S = memory(
                (first,), (momentum,), key, value, query, tuple(three), b, before=before,
                stored=stored, backend=backend,
            )  # fmt: skip
            outputs = (y, *last_W, *last_S)
            gradients = torch.autograd.grad(outputs, leaves, [x.detach().cos() for x in outputs])
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


def test_scalars() -> None:
    results = []
    for dtype, backend in ((torch.float64, "numba"), (torch.float32, "triton")):
        torch.manual_seed(0)
        rates = [torch.rand(2, 7).to(dtype).requires_grad_() for _ in range(3)]
        outputs = scalars(*rates, backend=backend)
        gradients = torch.autograd.grad(outputs, rates, [x.detach().cos() for x in outputs])
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_weight_path() -> None:
    results = []
    for dtype, backend in ((torch.float64, "numba"), (torch.float32, "triton")):
        torch.manual_seed(0)
        shapes = ((2, 9), (2, 9), (2, 4, 9), (2, 4), (2, 4))
        inputs = [torch.rand(s).to(dtype).requires_grad_() for s in shapes]
        outputs = weight_path(*inputs, backend=backend)
        gradients = torch.autograd.grad(outputs, inputs, [x.detach().cos() for x in outputs])
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
