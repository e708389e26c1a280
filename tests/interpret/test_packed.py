"""The lists of active rows on Triton, in the interpreter, beside sums over the mask."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from attnspec.fast.engines.select import triton_packed
from attnspec.fast.heads.moh import head_outputs
from attnspec.fast.heads.moh_rows import list_rows


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("token_first", [True, False])
@pytest.mark.parametrize(("kv_heads", "share"), [(3, 0.5), (1, 0.9), (6, 0.0)])
def test_lists(
    causal: bool, token_first: bool, kv_heads: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_packed, "CHUNK", 16)
    monkeypatch.setattr(triton_packed, "COUNTS", 4)
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 19, 4), torch.randn(2, kv_heads, 23, 4)
    active = torch.rand(2, 6, 19).mT < share
    masks = (None, torch.rand(2, 23) > 0.5)
    for key_mask in masks:
        got, expected = (
            list_rows(active, q, k, causal, token_first, key_mask, backend)
            for backend in ("triton", "numba")
        )
        for a, b in zip(got, expected, strict=True):
            assert (a is None and b is None) or a.tolist() == b.tolist()


def test_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    made = []
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    active, dh = torch.rand(1, 20, 4) < 0.6, torch.randn(1, 4, 20, 8)
    for backend in ("triton", "numba"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        h = head_outputs(*leaves, active, causal=True, backend=backend)
        made.append([h, *torch.autograd.grad(h, leaves, dh)])
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
