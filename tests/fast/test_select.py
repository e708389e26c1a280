"""The select engine on the CPU against plain formulas in float64, and its argument checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnspec.fast import backend
from attnspec.fast.engines import select
from attnspec.fast.engines.select.places import places_op
from attnspec.fast.engines.select.tokens import take_op
from attnspec.reference.primitives import pooling
from attnspec.reference.primitives import top_k as spec

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def pooled(x: torch.Tensor, block: int, kinds: list[str]) -> torch.Tensor:
    """Block pooling by the definition; `max` and `min` pick the first of equal extrema."""
    rows = []
    for start in range(0, x.shape[2], block):
        tile = x[:, :, start : start + block]
        parts = {"max": tile.max(2).values, "min": tile.min(2).values, "avg": tile.mean(2)}
        rows.append(torch.cat([parts[kind] for kind in kinds], -1))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "block", "d"), [(1, 4, 3), (13, 4, 5), (64, 64, 8), (65, 64, 2)]
)
def test_pooling_and_its_gradient(dtype: torch.dtype, tokens: int, block: int, d: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 3, d).to(dtype).transpose(1, 2).requires_grad_()
    kinds = ["avg", "max", "min", "avg"]
    out = select.pool_blocks(x, block, kinds)
    exact = x.detach().double().requires_grad_()
    expected = pooled(exact, block, kinds)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    dout = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, dout)
    (exact_dx,) = torch.autograd.grad(expected, exact, dout.double())
    torch.testing.assert_close(dx.double(), exact_dx, atol=4 * TOLERANCE[dtype], rtol=1e-2)


def test_an_extremum_passes_its_gradient_to_its_first_occurrence() -> None:
    x = torch.tensor([[1.0], [3.0], [3.0], [1.0]], requires_grad=True)
    select.pool_blocks(x, 4, ["max", "min"]).sum().backward()
    assert x.grad is not None
    assert x.grad.ravel().tolist() == [1, 1, 0, 0]


def test_pooling_takes_any_leading_axes_and_no_tokens() -> None:
    x = torch.randn(2, 3, 1, 5, 4)
    out = select.pool_blocks(x, 2, ["avg"])
    expected = pooling.pool_blocks(x.double().numpy(), 2, ["avg"])
    torch.testing.assert_close(out, torch.from_numpy(expected).float())
    assert select.pool_blocks(torch.zeros(2, 0, 4), 3, ["max", "min"]).shape == (2, 0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "columns", "width"),
    [(2, 1, 5, 5, 6), (2, 2, 1, 3, 20), (4, 2, 7, 4, 9), (1, 1, 65, 65, 80)],
)
def test_block_scores_and_their_gradients(
    dtype: torch.dtype, heads: int, kv_heads: int, rows: int, columns: int, width: int
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, rows, width).to(dtype).requires_grad_()
    k = torch.randn(2, kv_heads, columns, width).to(dtype).requires_grad_()
    out = select.block_scores(q, k, scale=0.3, fill=-7.0)
    exact_q, exact_k = (x.detach().double().requires_grad_() for x in (q, k))
    repeated = exact_k.repeat_interleave(heads // kv_heads, 1)
    visible = torch.arange(columns) <= torch.arange(rows)[:, None] + columns - rows
    expected = torch.where(visible, 0.3 * exact_q @ repeated.transpose(2, 3), -7.0)
    assert out.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    dout = torch.randn_like(out).transpose(2, 3).contiguous().transpose(2, 3)
    gradients = torch.autograd.grad(out, (q, k), dout)
    exact = torch.autograd.grad(expected, (exact_q, exact_k), dout.double())
    for got, want in zip(gradients, exact, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=10 * TOLERANCE[dtype], rtol=1e-2)


def test_what_a_masked_block_holds_is_never_read() -> None:
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    k[:, :, 2] = torch.nan
    assert torch.isfinite(select.block_scores(q, k, fill=0.0)[:, :, :2]).all()


def tied(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows full of ties: few values, -inf, both zeros, NaN, all equal, all distinct."""
    torch.manual_seed(n)
    scores = torch.randint(-2, 3, (6, n)).to(dtype)
    scores[0, ::3] = -math.inf
    scores[1] *= -0.0
    scores[2, -1] = math.nan
    scores[3] = 1.0
    scores[4] = -math.inf
    scores[5] = torch.randn(n).to(dtype)
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 64, 9000])
def test_top_k_breaks_ties_by_index(dtype: torch.dtype, n: int) -> None:
    scores = tied(n, dtype)
    for k in {0, 1, n // 2, n - 1, n, n + 3}:
        expected = torch.from_numpy(spec.top_k(scores.double().numpy(), k))
        assert torch.equal(select.top_k(scores, k), expected)
        assert torch.equal(select.top_k(scores, k, dtype=torch.int32), expected.int())
        mask = torch.from_numpy(spec.top_k_mask(scores.double().numpy(), k))
        assert torch.equal(select.top_k_mask(scores, k), mask)


def test_top_k_reads_any_strides() -> None:
    scores = torch.randn(7, 5, 3).permute(2, 0, 1)[:, ::2]
    expected = spec.top_k(scores.numpy(), 2)
    assert torch.equal(select.top_k(scores, 2), torch.from_numpy(expected))
    row = torch.randn(9)
    assert torch.equal(
        select.top_k(row.expand(4, 9), 3), torch.from_numpy(spec.top_k(row.numpy(), 3)).expand(4, 3)
    )


def test_lists_drop_what_is_above_the_diagonal() -> None:
    scores = torch.tensor([[0.0, 9.0, 9.0], [1.0, 2.0, 9.0], [1.0, 3.0, 2.0]])[None, None]
    lists = select.top_k_lists(scores, 2, 64, 32)
    assert (lists.q_block, lists.k_block, lists.index.dtype) == (64, 32, torch.int32)
    assert lists.count[0, 0].tolist() == [0, 1, 2]
    assert lists.index[0, 0, 2].tolist() == [1, 2]
    assert select.top_k_lists(scores, 2, 64, 32, causal=False).count[0, 0].tolist() == [2, 2, 2]


def test_mask_lists() -> None:
    mask = torch.rand(2, 3, 4, 9).transpose(2, 3) > 0.5
    lists = select.mask_lists(mask, 8, 16)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in mask.shape[:3])).tolist():
        b, h, r = place
        listed = lists.index[b, h, r, : lists.count[b, h, r]].tolist()
        assert listed == mask[b, h, r].nonzero().ravel().tolist()


OPS = torch.ops.attnspec


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.pool_blocks, (torch.randn(1, 2, 9, 3, requires_grad=True), 4, [0, 2], "numba")),
        (
            OPS.block_scores,
            (
                torch.randn(1, 2, 3, 4, requires_grad=True),
                torch.randn(1, 1, 3, 4, requires_grad=True),
                0.5, True, 0.0, "numba",
            ),
        ),
        (OPS.top_k, (torch.randn(1, 2, 3, 9), 4, torch.int64, "numba")),
        (OPS.top_k_mask, (torch.randn(1, 2, 3, 9), 4, "numba")),
        (OPS.mask_lists, (torch.randn(1, 2, 3, 9) > 0, "numba")),
    ],
)  # fmt: skip
def test_opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, arguments)


def test_compiles_without_a_graph_break() -> None:
    def choose(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        pq, pk = select.pool_blocks(q, 4, ["avg"]), select.pool_blocks(k, 4, ["avg"])
        return select.top_k_mask(select.block_scores(pq, pk), 2)

    q, k = torch.randn(1, 2, 18, 8), torch.randn(1, 1, 18, 8)
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), choose(q, k))


def test_a_launch_is_counted() -> None:
    before = backend.launches
    select.top_k(torch.randn(3), 1)
    assert backend.launches == before + 1


X = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: select.pool_blocks(X, 0, ["avg"]), ValueError, "block"),
        (lambda: select.pool_blocks(X, 2.0, ["avg"]), TypeError, "block"),
        (lambda: select.pool_blocks(X, 2, []), ValueError, "kinds"),
        (lambda: select.pool_blocks(X, 2, ["median"]), ValueError, "kinds"),
        (lambda: select.pool_blocks(X.int(), 2, ["avg"]), TypeError, "x"),
        (lambda: select.pool_blocks(X[0, 0, 0], 2, ["avg"]), ValueError, "x"),
        (lambda: select.block_scores(X, X[..., :3]), ValueError, "k"),
        (lambda: select.block_scores(X, X.double()), TypeError, "k"),
        (lambda: select.block_scores(X, X.expand(1, 2, 4, 4)), ValueError, "k"),
        (lambda: select.top_k(X, -1), ValueError, "k"),
        (lambda: select.top_k(X, True), TypeError, "k"),
        (lambda: select.top_k(X.long(), 1), TypeError, "scores"),
        (lambda: select.top_k([1.0], 1), TypeError, "scores"),
        (lambda: select.top_k(X, 1, dtype=torch.int8), ValueError, "dtype"),
        (lambda: select.top_k(X, 1, backend="cuda"), ValueError, "backend"),
        (lambda: select.mask_lists(X, 4, 4), TypeError, "mask"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(
        select.pool_blocks(x, 2, ["avg"]).square().sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="differentiable once"):
        dx.sum().backward()


def test_places_and_taken_tokens_are_ops_as_they_should_be() -> None:
    flags, positions = torch.rand(7) < 0.5, torch.randperm(7)
    order = torch.randperm(7)
    x = torch.randn(1, 2, 7, 3, requires_grad=True)
    y = torch.randn(1, 1, 7, 2, requires_grad=True)
    taken = (x, y, order, select.inverse(order), "numba")
    for op, given in (
        (places_op.op, (flags, positions, None, 2, True, 7, "numba")),
        (places_op.op, (None, positions[:3], positions[3:].int(), 4, False, 7, "numba")),
        (take_op.op, taken),
    ):
        torch.library.opcheck(op, given)
    exact = [z.detach().double().requires_grad_() for z in (x, y)]
    torch.autograd.gradgradcheck(
        lambda x, y: select.take_tokens(x, y, *taken[2:4]), exact
    )  # fmt: skip
