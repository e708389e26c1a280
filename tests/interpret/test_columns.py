"""The columns engine's Triton kernels in the interpreter, against the formula in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import math
from typing import Any

import pytest
import torch

from attnspec.fast.engines import columns
from attnspec.fast.engines.columns.configs import ColumnsConfig, use_config
from attnspec.reference.primitives.pooling import pool_1d

SMALL = ColumnsConfig(block_k=16, block_q=16, num_warps=1, num_stages=1, programs=8)
PACKED = ColumnsConfig(block_k=16, block_q=64, num_warps=1, num_stages=1, programs=8)
"""Room for the rows of several heads, of which a group may have fewer."""
CASES = [
    (2, 4, 2, 5, 33, 8, torch.float32),
    (1, 2, 2, 1, 1, 3, torch.float32),
    (1, 2, 1, 17, 9, 20, torch.float32),
    (1, 3, 1, 33, 33, 16, torch.float16),
    (1, 6, 2, 9, 150, 16, torch.float16),
]


def weights(
    q: torch.Tensor, k: torch.Tensor, causal: bool, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights and lse in float64, by the definition."""
    rows, keys = q.shape[2], k.shape[2]
    repeated = k.nan_to_num().double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        seen = torch.arange(keys) <= torch.arange(rows)[:, None] + keys - rows
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    scores = (q.double() @ repeated.mT / math.sqrt(q.shape[3])).masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None]), lse


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("causal", "masked"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("config", [SMALL, PACKED])
def test_second_pass(
    case: tuple[Any, ...], causal: bool, masked: bool, config: ColumnsConfig
) -> None:
    batch, heads, kv_heads, rows, keys, d, dtype = case
    torch.manual_seed(rows)
    q = torch.randn(batch, rows, heads, d).to(dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, d, keys).to(dtype).transpose(2, 3)
    key_mask = None
    if masked:
        key_mask = torch.rand(keys, batch).T > 0.3
        k.masked_fill_(~key_mask[:, None, :, None], math.nan)
    P, exact_lse = weights(q, k, causal, key_mask)
    options: dict[str, Any] = {"causal": causal, "key_mask": key_mask, "backend": "triton"}
    with use_config(config):
        lse = columns.row_lse(q, k, **options)
        sums = columns.column_sums(q, k, lse, columns=keys // 2, **options)
        own_sums = columns.column_sums(q, k, columns=keys // 2, **options)
        got = columns.weight_rows(q, k, **options)
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(lse.double(), exact_lse, **tolerance)
    torch.testing.assert_close(sums.double(), P[..., : keys // 2].sum(2), **tolerance)
    torch.testing.assert_close(own_sums.double(), P[..., : keys // 2].sum(2), **tolerance)
    torch.testing.assert_close(got.double(), P, **tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("causal", "block"), [(True, 7), (True, 24), (False, 16)])
def test_block_max(case: tuple[Any, ...], causal: bool, block: int) -> None:
    batch, heads, kv_heads, rows, keys, d, dtype = case
    q = torch.randn(batch, heads, rows, d).to(dtype)
    k = torch.randn(batch, kv_heads, keys, d).to(dtype)
    P, _ = weights(q, k, causal, None)
    with use_config(SMALL):
        got = columns.block_max(q, k, block, causal=causal, backend="triton")
    padded = torch.nn.functional.pad(P, (0, -keys % block, 0, -rows % block))
    expected = padded.unflatten(3, (-1, block)).unflatten(2, (-1, block)).amax((3, 5))
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("n", [1, 40])
def test_smooth(n: int, kind: str, reduce: str) -> None:
    s = torch.rand(2, n, 4).transpose(1, 2)
    for width in (1, 5):
        got = columns.smooth(s, width, kind, heads=2, reduce=reduce, backend="triton")
        pooled = torch.from_numpy(pool_1d(s.double().numpy(), width, kind)).unflatten(1, (2, 2))
        expected = pooled.mean(2) if reduce == "mean" else pooled.amax(2)
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
