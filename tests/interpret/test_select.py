"""The select engine's Triton kernels in the interpreter, against plain formulas in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import math

import pytest
import torch

from attnspec.fast.engines import select
from attnspec.fast.engines.select.configs import CANDIDATES, SelectConfig, use_config
from attnspec.reference.primitives import top_k as spec

DTYPES = (torch.float32, torch.float16)
SMALL = SelectConfig(
    pool_rows=4, score_q=16, score_k=16, row_items=16, chunk_items=16, chunk_warps=1
)


def pooled(x: torch.Tensor, block: int, kinds: list[str]) -> torch.Tensor:
    """Block pooling by the definition; `max` and `min` pick the first of equal extrema."""
    rows = [torch.zeros(*x.shape[:2], len(kinds) * x.shape[3], dtype=x.dtype)]
    for start in range(0, x.shape[2], block):
        tile = x[:, :, start : start + block]
        parts = {"max": tile.max(2).values, "min": tile.min(2).values, "avg": tile.mean(2)}
        rows.append(torch.cat([parts[kind] for kind in kinds], -1))
    return torch.stack(rows, 2)[:, :, 1:] + 0 * x.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [CANDIDATES[0], SMALL])
@pytest.mark.parametrize(("tokens", "block"), [(1, 4), (17, 8), (9, 16), (3, 1), (0, 2)])
def test_pooling(tokens: int, block: int, config: SelectConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (1, tokens, 2, 5)).to(dtype).transpose(1, 2).requires_grad_()
    exact = x.detach().double().requires_grad_()
    kinds = ["avg", "max", "min", "avg"]
    with use_config(config):
        out = select.pool_blocks(x, block, kinds, backend="triton")
        expected = pooled(exact, block, kinds)
        dout = torch.randint(-3, 4, (*out.shape[:2], *out.shape[:1:-1])).to(dtype).mT
        (dx,) = torch.autograd.grad(out, x, dout)
    (exact_dx,) = torch.autograd.grad(expected, exact, dout.double())
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(dx.double(), exact_dx, atol=4e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rows", "columns", "width"), [(5, 5, 6), (1, 3, 80), (33, 17, 9)])
def test_scores(rows: int, columns: int, width: int, causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 4, width, rows).to(dtype).mT.requires_grad_()
    k = torch.randn(1, 2, columns, width).to(dtype).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    with use_config(SMALL):
        out = select.block_scores(q, k, causal=causal, fill=-5.0, backend="triton")
        dout = torch.randn(1, 4, columns, rows).mT
        gradients = torch.autograd.grad(out, (q, k), dout)
    visible = torch.ones(rows, columns, dtype=torch.bool)
    if causal:
        visible = torch.arange(columns) <= torch.arange(rows)[:, None] + columns - rows
    repeated = exact[1].repeat_interleave(2, 1)
    expected = torch.where(visible, exact[0] @ repeated.mT / math.sqrt(width), -5.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(
        gradients, torch.autograd.grad(expected, exact, dout.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), want, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [CANDIDATES[0], SMALL])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_top_k(n: int, config: SelectConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    scores = torch.randint(-2, 3, (5, n)).to(dtype)
    scores[0, ::3] = -math.inf
    scores[1] *= -0.0
    scores[2, -1] = math.nan
    scores[3] = 1.0
    scores[4] = torch.randn(n).to(dtype)
    scores = scores.T.contiguous().T
    with use_config(config):
        for k in {0, 1, n // 2, n, n + 3}:
            exact = scores.double().numpy()
            index = select.top_k(scores, k, backend="triton")
            assert index.tolist() == spec.top_k(exact, k).tolist()
            mask = select.top_k_mask(scores, k, backend="triton")
            assert mask.tolist() == spec.top_k_mask(exact, k).tolist()


@pytest.mark.parametrize("shape", [(1, 2, 35, 5), (2, 1, 4100, 1), (1, 1, 2049, 2)])
def test_mask_lists(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape).transpose(2, 3) > 0.5
    mask[0, 0, 0] = False
    got = select.mask_lists(mask, 8, 8, backend="triton")
    rows = zip(mask.flatten(0, 2), got.index.flatten(0, 2), got.count.flatten(), strict=True)
    for row, index, count in rows:
        assert index[:count].tolist() == row.nonzero().ravel().tolist()
        assert index[count:].eq(0).all()


@pytest.mark.parametrize(("n", "k"), [(65, 3), (130, 7)])
def test_the_best_of_chunks(n: int, k: int) -> None:
    """A few of a long row, with ties across chunks, NaN and infinities, from a strided row."""
    torch.manual_seed(n)
    scores = torch.randint(0, 4, (2, 1, n, 3)).float().transpose(2, 3)
    scores[0, 0, 0, 5], scores[0, 0, 1] = torch.nan, -torch.inf
    scores[1, 0, 2] = torch.nan
    with use_config(SelectConfig(row_items=64, chunk_items=16)):
        got = select.top_k(scores, k, backend="triton")
    assert torch.equal(got, select.top_k(scores, k, backend="numba"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", [torch.int32, torch.int64])
def test_rows_are_taken(dtype: torch.dtype, numbers: torch.dtype) -> None:
    order = torch.randint(0, 37, (50,)).to(numbers)
    for x in (torch.randn(37, 20).to(dtype), torch.randn(20, 37).to(dtype).T):
        taken = select.take_rows(x, order[::2], backend="triton")
        assert torch.equal(taken, x[order[::2].long()])


@pytest.mark.parametrize("n", [1, 5, 9000])
def test_the_last_that_are_not_flagged(n: int) -> None:
    flags = (torch.rand(2 * n) < 0.5)[::2]
    places = flags.logical_not().nonzero().ravel().tolist()
    for count in {0, 1, n // 2, n}:
        expected = ([-1] * n + places)[n + len(places) - count :]
        for backend in ("triton", "numba"):
            got = select.last_unflagged(flags, count, backend=backend)
            assert got.dtype == torch.int32
            assert got.tolist() == expected
