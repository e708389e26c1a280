"""The additive engine on the CPU against plain formulas in float64, and its argument checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnspec.fast.engines.additive import additive_lse, additive_scores, project

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 6e-2}
SHAPES = [(2, 7, 3, 5), (1, 1, 1, 1), (1, 70, 9, 4), (2, 5, 33, 65)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """k with its slots as the fastest axis, q and v."""
    batch, slots, steps, width = shape
    torch.manual_seed(slots)
    k = torch.randn(batch, width, slots).to(dtype).transpose(1, 2)
    q, v = torch.randn(batch, steps, width).to(dtype), torch.randn(width).to(dtype)
    return [x.requires_grad_() for x in (k, q, v)]


def exact_scores(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    k, q, v = exact = [x.detach().double().requires_grad_() for x in tensors]
    return exact, torch.tanh(q[:, :, None] + k[:, None]) @ v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_their_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype)
    out = additive_scores(*tensors)
    exact, expected = exact_scores(tensors)
    assert out.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, dout)
    for got, want in zip(
        gradients, torch.autograd.grad(expected, exact, dout.double()), strict=True
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", ["no", "slots", "pairs"])
def test_lse_and_its_gradients(shape: tuple[int, ...], dtype: torch.dtype, masked: str) -> None:
    tensors = inputs(shape, dtype)
    batch, slots, steps, _ = shape
    mask = None
    if masked != "no":
        mask = torch.rand(batch, 1 if masked == "slots" else steps, slots) > 0.3
        mask[..., -1] = True
    target = torch.randint(slots, (batch, steps))
    lse, score = additive_lse(*tensors, target, mask=mask)
    exact, scores = exact_scores(tensors)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    exact_lse = torch.logsumexp(scores, -1)
    at_target = scores.gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score.double(), at_target, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(lse), torch.randn_like(lse)
    at_target = at_target.masked_fill(at_target == -math.inf, 0)
    wanted = torch.autograd.grad(
        (exact_lse, at_target), exact, [dout.double() for dout in upstream]
    )
    for got, want in zip(torch.autograd.grad((lse, score), tensors, upstream), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_tanh_is_right_to_float32_rounding() -> None:
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 0, 2001)])
    got = additive_scores(x[None, :, None], torch.zeros(1, 1, 1), torch.ones(1))[0, 0]
    error = (got.double() / x.double().tanh() - 1).nan_to_num().abs().max()
    assert error < 8 * 2**-24
    ends = torch.tensor([math.inf, -math.inf, math.nan])
    got = additive_scores(ends[None, :, None], torch.zeros(1, 1, 1), torch.ones(1))[0, 0]
    torch.testing.assert_close(got, ends.tanh(), equal_nan=True)


def test_a_masked_slot_is_never_read() -> None:
    e, d = torch.randn(1, 4, 3), torch.randn(1, 2, 3)
    e[:, 1] = math.nan
    W1, W2, v = (torch.randn(5, 3), torch.randn(5, 3), torch.randn(5))
    tensors = [x.requires_grad_() for x in (e, d, W1, W2, v)]
    mask = torch.tensor([[[True, False, True, True]]])
    lse, score = additive_lse(project(e, W1), project(d, W2), v, torch.tensor([[0, 2]]), mask=mask)
    for gradient in torch.autograd.grad((lse - score).sum(), tensors):
        assert gradient.isfinite().all()


def test_a_step_without_slots_is_empty() -> None:
    k, q, v = inputs((1, 3, 2, 4), torch.float32)
    mask = torch.tensor([[[False] * 3, [True] * 3]])
    lse, score = additive_lse(k, q, v, torch.zeros(1, 2, dtype=torch.long), mask=mask)
    assert lse[0, 0] == score[0, 0] == -math.inf
    (dq,) = torch.autograd.grad(lse.sum(), q)
    assert dq[0, 0].eq(0).all()
    assert dq.isfinite().all()


def test_no_slots() -> None:
    k, q, v = torch.zeros(2, 0, 3), torch.zeros(2, 4, 3), torch.ones(3)
    assert additive_scores(k, q, v).shape == (2, 4, 0)


@pytest.mark.parametrize("name", ["additive_scores", "additive_lse"])
def test_opcheck(name: str) -> None:
    tensors = inputs((2, 7, 3, 5), torch.float32)
    extra: list[Any] = []
    if name == "additive_lse":
        extra = [torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, 7, dtype=torch.bool)]
    torch.library.opcheck(getattr(torch.ops.attnspec, name), (*tensors, *extra, "numba"))


def test_opcheck_of_what_surrounds_the_kernels() -> None:
    x, W = torch.randn(2, 4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.attnspec.project, (x, W))
    mask = torch.ones(2, 1, 3, dtype=torch.bool)
    torch.library.opcheck(torch.ops.attnspec.masked_log_softmax, (x, mask))


def test_compiles_without_a_graph_break() -> None:
    def scores(e: torch.Tensor, W: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return additive_scores(project(e, W, v), q, v)

    e, W, q, v = torch.randn(1, 4, 3), torch.randn(5, 3), torch.randn(1, 2, 5), torch.randn(5)
    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(e, W, q, v), scores(e, W, q, v))


K, Q, V = torch.zeros(1, 4, 3), torch.zeros(1, 2, 3), torch.zeros(3)
T = torch.zeros(1, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: additive_scores(K, Q[0], V), ValueError, "q"),
        (lambda: additive_scores(K.long(), Q, V), TypeError, "k"),
        (lambda: additive_scores(K, Q, V.double()), TypeError, "v"),
        (lambda: additive_scores(K[..., :2], Q, V), ValueError, "k"),
        (lambda: additive_scores(K, Q, V[:2]), ValueError, "v"),
        (lambda: additive_lse(K, Q, V, T[:, :1]), ValueError, "target"),
        (lambda: additive_lse(K, Q, V, T.float()), TypeError, "target"),
        (lambda: additive_lse(K, Q, V, T, mask=torch.ones(1, 2, 4)), TypeError, "mask"),
        (lambda: additive_lse(K, Q, V, T, mask=torch.ones(1, 2, 3) > 0), ValueError, "mask"),
        (lambda: additive_scores(K, Q, V, backend="cuda"), ValueError, "backend"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()
