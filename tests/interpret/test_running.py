"""Running dot products and Flowformer on Triton, in the interpreter, against float64 sums."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.scan import running_dots, triton_running
from attnspec.fast.linear import flowformer

PHI = {"none": lambda x: x, "sigmoid": torch.sigmoid, "relu": lambda x: torch.relu(x) + 1e-6}


def plain(
    x: Tensor, y: Tensor, wx: Tensor | None, wy: Tensor | None, sx: Any, sy: Any, kind: str,
    causal: bool,
) -> list[Tensor]:  # fmt: skip
    a, b = PHI[kind](x), PHI[kind](y)
    sums = []
    for side, weight, first in ((a, wx, sx), (b, wy, sy)):
        weighed = side if weight is None else side * weight[..., None]
        total = weighed.cumsum(2) if causal else weighed.sum(2, keepdim=True)
        sums.append(total if first is None else total + first[:, :, None])
    dots = ((a + 0.1) * (sums[1] + 0.1)).sum(-1), ((b + 0.1) * (sums[0] + 0.1)).sum(-1)
    return [*dots, sums[0][:, :, -1], sums[1][:, :, -1]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kind", "weighed"), [("none", True), ("sigmoid", False), ("relu", True)])
def test_running_dots(
    causal: bool, kind: str, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_running, "device_of", lambda x: (64, True))
    torch.manual_seed(0)
    n, d = 90, 20
    m = n if causal else 130
    x, y = torch.randn(1, n, 2, d).transpose(1, 2), torch.randn(1, 2, d, m).mT
    given: list[Tensor | None] = [x, y, None, None, None, None]
    if weighed:
        given[2:] = (
            torch.rand(1, 2, n),
            torch.rand(1, 2, m),
            torch.rand(1, 2, d),
            x.new_ones(1, 2, d),
        )
    made = []
    for dtype in (torch.float32, torch.float64):
        leaves = [None if z is None else z.to(dtype).detach().requires_grad_() for z in given]
        X, Y, *rest = leaves
        if dtype == torch.float32:
            pairs = (tuple(rest[:2]), tuple(rest[2:])) if weighed else (None, None)
            out = list(running_dots(X, Y, *pairs, eps=0.1, kind=kind, causal=causal))  # type: ignore[arg-type]
        else:
            out = plain(X, Y, *rest, kind, causal)  # type: ignore[arg-type]
        torch.manual_seed(1)
        upstream = [torch.randn(z.shape).to(dtype) for z in out]
        wanted = [z for z in leaves if z is not None]
        made.append([*out, *torch.autograd.grad(out, wanted, upstream)])
    for got, expected in zip(*made, strict=True):
        bound = 1e-6 * float(expected.detach().abs().max())
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=bound)


def test_later_tokens_stay_out() -> None:
    x, y = torch.rand(1, 1, 100, 4), torch.rand(1, 1, 100, 4)
    before = running_dots(x, y)
    x[:, :, 70:], y[:, :, 70:] = torch.nan, torch.nan
    after = running_dots(x, y)
    for a, b in zip(before[:2], after[:2], strict=True):
        assert torch.equal(a[:, :, :70], b[:, :, :70])


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("causal", [True, False])
def test_flowformer(tokens: int, causal: bool) -> None:
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, h, tokens, d) for h, d in ((4, 8), (2, 8), (2, 6)))
    masks = (
        {} if causal else {name: torch.rand(2, tokens) > 0.3 for name in ("key_mask", "query_mask")}
    )
    made = []
    for backend, dtype in (("triton", torch.float32), ("numba", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        if causal:
            out, state = flowformer.flow_attend_causal(*leaves, backend=backend)
            results = [out, *state]
        else:
            out = flowformer.flow_attend(*leaves, **masks, backend=backend)
            results = [out]
        torch.manual_seed(1)
        upstream = torch.randn(out.shape).to(dtype)
        made.append([*results, *torch.autograd.grad(out, leaves, upstream)])
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
