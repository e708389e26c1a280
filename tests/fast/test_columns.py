"""The columns engine on the CPU against the weights in float64, and its argument checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnspec.fast.engines import columns
from attnspec.reference.primitives.pooling import pool_1d

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = [
    (2, 4, 2, 5, 33, 8),
    (1, 2, 2, 1, 1, 3),
    (1, 2, 1, 17, 9, 80),
    (1, 3, 1, 65, 65, 16),
    (1, 2, 2, 16, 257, 96),
]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> Inputs:
    """q and k with their tokens or channels strided, and padding that holds NaN."""
    batch, heads, kv_heads, rows, keys, d = shape
    torch.manual_seed(rows * keys)
    q = torch.randn(batch, rows, heads, d).to(dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, d, keys).to(dtype).transpose(2, 3)
    if not masked:
        return q, k, None
    key_mask = torch.rand(batch, keys) > 0.3
    key_mask[0, :2] = False
    k.masked_fill_(~key_mask[:, None, :, None], math.nan)
    return q, k, key_mask


def weights(
    q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights and lse in float64, by the definition."""
    rows, keys = q.shape[2], k.shape[2]
    repeated = k.nan_to_num().double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ repeated.transpose(2, 3) / math.sqrt(q.shape[3])
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        seen = torch.arange(keys) <= torch.arange(rows)[:, None] + keys - rows
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None]), lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_sums_and_lse(
    shape: tuple[int, ...], dtype: torch.dtype, causal: bool, masked: bool
) -> None:
    q, k, key_mask = inputs(shape, dtype, masked)
    P, lse = weights(q, k, key_mask, causal)
    tolerance: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
    options: dict[str, Any] = {"causal": causal, "key_mask": key_mask}
    got_lse = columns.row_lse(q, k, **options)
    assert got_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got_lse.double(), lse, **tolerance)
    torch.testing.assert_close(columns.weight_rows(q, k, **options).double(), P, **tolerance)
    sums = columns.column_sums(q, k, **options)
    torch.testing.assert_close(sums.double(), P.sum(2), **tolerance)
    some = k.shape[2] // 2
    sums = columns.column_sums(q, k, got_lse, columns=some, **options)
    torch.testing.assert_close(sums.double(), P[..., :some].sum(2), **tolerance)


@pytest.mark.parametrize("block", [1, 4, 16, 20, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_block_max(shape: tuple[int, ...], block: int, causal: bool) -> None:
    q, k, _ = inputs(shape, torch.float32, False)
    P, _ = weights(q, k, None, causal)
    got = columns.block_max(q, k, block, causal=causal)
    rows, keys = -(-q.shape[2] // block), -(-k.shape[2] // block)
    padded = torch.nn.functional.pad(P, (0, -P.shape[3] % block, 0, -P.shape[2] % block))
    expected = padded.view(*P.shape[:2], rows, block, keys, block).amax((3, 5))
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_logits_of_any_size_cancel_exactly() -> None:
    """Equal keys share a row evenly and a lone key has weight 1, whatever their logits."""
    q = 300 * torch.randn(1, 2, 1, 80).expand(1, 2, 4, 80)
    k = 300 * torch.randn(1, 1, 1, 80).expand(1, 1, 4, 80)
    even = 1 / torch.arange(1.0, 5.0)[:, None].expand(4, 4).tril()
    P = torch.where(torch.ones(4, 4).tril() > 0, even, 0).expand(1, 2, 4, 4)
    torch.testing.assert_close(columns.weight_rows(q, k), P)
    torch.testing.assert_close(columns.column_sums(q, k), P.sum(2))
    assert columns.block_max(q, k, 2)[..., 0, 0].eq(1).all()


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 9, 8)
    P, lse = weights(q * (scale * math.sqrt(8)), k, None, True)
    largest = columns.block_max(q, k, 9, scale=scale)[..., 0, 0]
    for got, expected in (
        (columns.weight_rows(q, k, scale=scale), P),
        (columns.row_lse(q, k, scale=scale), lse),
        (columns.column_sums(q, k, lse.float(), scale=scale), P.sum(2)),
        (largest, P.amax((2, 3))),
    ):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_no_queries_and_no_keys() -> None:
    q, k = torch.randn(1, 2, 0, 4), torch.randn(1, 1, 5, 4)
    assert columns.column_sums(q, k).eq(0).all()
    lse = columns.row_lse(torch.randn(1, 2, 3, 4), k[:, :, :0])
    assert lse.isneginf().all()


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("n", [1, 4, 50])
@pytest.mark.parametrize(("heads", "reduce"), [(None, "mean"), (2, "mean"), (1, "max")])
def test_smooth(n: int, width: int, kind: str, heads: int | None, reduce: str) -> None:
    torch.manual_seed(n)
    s = torch.rand(2, 4, n)
    expected = torch.from_numpy(pool_1d(s.double().numpy(), width, kind))
    groups = expected.view(2, heads or 4, -1, n)
    expected = groups.mean(2) if reduce == "mean" else groups.amax(2)
    got = columns.smooth(s, width, kind, heads=heads, reduce=reduce)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)


Q, K = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4)
LSE = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("row_norms", (Q, K, None, 0.5, True, "numba")),
        ("column_sums", (Q, K, LSE, None, torch.rand(1, 5) > 0.5, 0.5, True, 3, "numba")),
        ("weight_rows", (Q, K, LSE, LSE + 1, None, 0.5, False, "numba")),
        ("block_max", (Q, K, 2, 0.5, True, "numba")),
        ("smooth", (torch.rand(1, 4, 9), 3, "avg", 2, "max", "numba")),
    ],
)
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.attnspec, name), arguments)


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(columns.column_sums, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Q, K), columns.column_sums(Q, K))


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: columns.row_lse(Q[0], K), ValueError, "q"),
        (lambda: columns.row_lse(Q.long(), K), TypeError, "q"),
        (lambda: columns.row_lse(Q, K.double()), TypeError, "k"),
        (lambda: columns.row_lse(Q, K[..., :3]), ValueError, "k"),
        (lambda: columns.row_lse(Q, K.expand(1, 3, 5, 4)), ValueError, "k"),
        (lambda: columns.row_lse(Q, K, key_mask=torch.ones(1, 4) > 0), ValueError, "key_mask"),
        (lambda: columns.row_lse(Q, K, key_mask=torch.ones(1, 5)), TypeError, "key_mask"),
        (lambda: columns.column_sums(Q, K, LSE[..., :2]), ValueError, "lse"),
        (lambda: columns.column_sums(Q, K, LSE.half()), TypeError, "lse"),
        (lambda: columns.column_sums(Q, K, columns=6), ValueError, "columns"),
        (lambda: columns.block_max(Q, K, 0), ValueError, "block"),
        (lambda: columns.smooth(LSE, 2, "avg"), ValueError, "width"),
        (lambda: columns.smooth(LSE, 3, "median"), ValueError, "kind"),
        (lambda: columns.smooth(LSE, 3, "avg", heads=3), ValueError, "heads"),
        (lambda: columns.smooth(LSE, 3, "avg", reduce="sum"), ValueError, "reduce"),
        (lambda: columns.row_lse(Q, K, backend="cpu"), ValueError, "backend"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()
