"""Triton kernels of the scans without matrix products, in the interpreter, against the CPU's."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.scan import (
    LaneConfig,
    elementwise,
    gated_scan,
    selective,
    triton_elementwise,
    use_config,
)


@pytest.fixture(autouse=True)
def _many_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Segments of two tiles of four rows, two channels a program, as on a large processor."""
    monkeypatch.setattr(triton_elementwise, "device_of", lambda x: (64, True))
    with use_config(LaneConfig(4, 2, 8, 8)):
        yield


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


@pytest.mark.parametrize(("tokens", "started"), [(8, False), (17, True)])
def test_elementwise(tokens: int, started: bool) -> None:
    torch.manual_seed(tokens)
    a = torch.where(torch.rand(2, tokens, 3) < 0.2, 0.0, torch.randn(2, tokens, 3))
    x, h0 = torch.randn(2, 3, tokens).mT, torch.randn(2, 3)
    compare(elementwise, [a, x, h0 if started else None])


@pytest.mark.parametrize(("tokens", "started"), [(1, False), (17, True)])
def test_selective(tokens: int, started: bool) -> None:
    torch.manual_seed(tokens)
    channels, n = 3, 3
    Delta, u = torch.rand(2, tokens, channels), torch.randn(2, channels, tokens).mT
    A, D, h0 = torch.rand(channels, n) * 3, torch.randn(channels), torch.randn(2, channels, n)
    b, c = torch.randn(2, tokens, 2 * n).split(n, -1)
    Delta[:, tokens // 2] = 40.0
    compare(selective, [Delta, A, b, c, u, *((D, h0) if started else (None, None))])


def gates(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """f, i, o, z, in the layout of fused projections, and h0; some gates open, shut or saturated."""
    torch.manual_seed(tokens)
    f, i, o, z = (2 * torch.randn(2, tokens, 4 * channels)).to(dtype).split(channels, -1)
    far = torch.tensor([-200.0, 200.0, -30.0, 30.0]).to(dtype)
    for x in (f, i, o):
        places = torch.rand(x.shape) < 0.2
        x[places] = far[torch.randint(4, (int(places.sum()),))]
    return [f, i, o, z, torch.randn(2, channels)]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # a gate that shuts: 1 / inf
@pytest.mark.parametrize("tokens", [1, 8, 17])
@pytest.mark.parametrize("gate", ["plain", "reversed", "learned", "growing", "learned to grow"])
def test_gated(tokens: int, gate: str) -> None:
    *inputs, h0 = gates(tokens, 3)
    alpha = {"reversed": 1.5, "growing": -1.0}.get(gate, 1.0)
    if gate.startswith("learned"):
        alpha = torch.tensor(1.5 if gate == "learned" else -1.5)

    def function(*given: Any, backend: str) -> Any:
        f, i, o, z, *rest = given
        learned = rest.pop(0) if gate.startswith("learned") else alpha
        first = rest[0] if rest else None
        return gated_scan(f, i, o, z, learned, gate != "plain", first, backend=backend)

    given = [*inputs, *([alpha] if isinstance(alpha, Tensor) else [])]
    compare(function, [*given, h0] if tokens == 17 else given, 2e-5)
