"""Lean attention's merge beside the suite's laws: in 16 bits it rounds once."""

from __future__ import annotations

import pytest
import torch

from attnspec.fast.parallel.lean_attention import Triple, merge


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merge_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Triple:
        m, l = torch.randn(2, 500, generator=generator)
        o = torch.randn(500, 4, generator=generator)
        return Triple(m.to(dtype), l.exp().to(dtype), o.to(dtype))

    a, b = draw(), draw()
    # Values that nearly cancel: the sum is far smaller than what a product's rounding would leave.
    b = b._replace(o=(-a.o * torch.exp(a.m - b.m)[..., None]).to(dtype))
    found = merge(a, b)
    exact = merge(*(Triple(*(x.double() for x in triple)) for triple in (a, b)))
    # One rounding of the result, and those of float32 terms that may be 8 and more.
    eps = torch.finfo(dtype).eps
    for ours, expected in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, rtol=eps, atol=2**-20)
