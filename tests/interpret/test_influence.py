"""The influence kernel in Triton's interpreter, against the reference in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch

from attnspec.fast.engines.columns.configs import ColumnsConfig, use_config
from attnspec.fast.patterns import moa
from attnspec.reference.patterns.moa import block_influence

SMALL = ColumnsConfig(block_k=16, block_q=16, num_warps=1, num_stages=1)
CASES = [
    (1, 2, 1, 24, 8, 5, 8, torch.float32),
    (1, 1, 1, 40, 16, 20, 20, torch.float32),
    (1, 2, 2, 6, 3, 3, 1, torch.float32),
    (2, 1, 1, 16, 16, 16, 16, torch.float16),
]


@pytest.mark.parametrize("case", CASES)
def test_block_influence(case: tuple[int, int, int, int, int, int, int, torch.dtype]) -> None:
    batch, heads, kv_heads, T, d, dv, b, dtype = case
    torch.manual_seed(T)
    q = torch.randn(batch, T, heads, d).to(dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, d, T).to(dtype).transpose(2, 3)
    v, g = (torch.randn(batch, n, T, dv).to(dtype) for n in (kv_heads, heads))
    with use_config(SMALL):
        got = moa.block_influence(q, k, v, g, b, eps=1e-3, backend="triton")
    exact = block_influence(*(x.double().numpy() for x in (q, k, v, g)), b, eps=1e-3)
    np.testing.assert_allclose(got, exact, rtol=2e-4, atol=2e-4)


def test_decode_finds_the_slots_of_every_head() -> None:
    torch.manual_seed(0)
    s, c = (2, 0), (2, 8)
    q, k, v = (torch.randn(1, n, 7, 8) for n in (2, 2, 2))
    cache = moa.cache_update(moa.init_cache(k, v, s, c), k, v, s, c)
    out, lse = moa.decode(q[:, :, -1:], cache, s, c, backend="triton")
    exact = moa.moa_attend(*(x.double() for x in (q, k, v)), s, c)
    torch.testing.assert_close(out.double(), exact[0][:, :, -1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact[1][:, :, -1:], atol=1e-5, rtol=1e-5)
