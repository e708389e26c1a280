"""Triton kernels of the scans without matrix products, in the interpreter, against the CPU's."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.scan import elementwise, selective
from attnspec.fast.engines.scan import triton_elementwise as flat
from attnspec.fast.engines.scan import triton_selective as deep


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "ROWS", 4)
    monkeypatch.setattr(flat, "LEAST", 8)
    monkeypatch.setattr(flat, "CHANNELS", 4)
    monkeypatch.setattr(deep, "ROWS", 4)
    monkeypatch.setattr(deep, "LEAST", 8)
    monkeypatch.setattr(deep, "CHANNELS", 2)


def compare(function: Any, inputs: list[Tensor | None], bound: float = 1e-5) -> None:
    """Outputs and gradients of both backends, the CPU's in float64."""
    made = []
    for backend in ("triton", "numba"):
        given = [x if x is None or backend == "triton" else x.double() for x in inputs]
        leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        out = function(*leaves, backend=backend)
        torch.manual_seed(0)
        upstream = [torch.randn(y.shape).to(y.dtype) for y in out]
        wanted = [x for x in leaves if x is not None]
        made.append([*out, *torch.autograd.grad(out, wanted, upstream)])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=bound, atol=10 * bound)


@pytest.mark.parametrize(("tokens", "started"), [(1, True), (8, False), (17, True)])
def test_elementwise(tokens: int, started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "device_of", lambda x: (64, True))
    torch.manual_seed(tokens)
    a = torch.where(torch.rand(2, tokens, 5) < 0.2, 0.0, torch.randn(2, tokens, 5))
    x, h0 = torch.randn(2, 5, tokens).mT, torch.randn(2, 5)
    compare(elementwise, [a, x, h0 if started else None])


@pytest.mark.parametrize(("tokens", "started"), [(1, True), (8, False), (17, True)])
def test_selective(tokens: int, started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "device_of", lambda x: (64, True))
    torch.manual_seed(tokens)
    channels, n = 3, 3
    Delta, u = torch.rand(2, tokens, channels), torch.randn(2, channels, tokens).mT
    A, D, h0 = torch.rand(channels, n) * 3, torch.randn(channels), torch.randn(2, channels, n)
    b, c = torch.randn(2, tokens, 2 * n).split(n, -1)
    Delta[:, tokens // 2] = 40.0
    compare(selective, [Delta, A, b, c, u, *((D, h0) if started else (None, None))])
