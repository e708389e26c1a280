"""TempScale's steps and diagnostics on torch against the chapter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.scores import tempscale as fast
from attnspec.reference.scores import tempscale as spec
from tests.flex_cases import close, inputs

TAUS = [0.7, 2, torch.tensor([0.5, 0.9, 1.0, 1.5], dtype=torch.float64)]
ROWS = torch.tensor([[True] * 17, [False] * 17, [True] * 5 + [False] * 12])


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def array(x: Any) -> Any:
    return x.detach().numpy() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("tau", TAUS, ids=str)
@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_steps_are_the_chapters(tau: Any, scale: float | None, masked: bool) -> None:
    (q, k, v), bias = inputs(q_tokens=3, k_tokens=17), draw(4, 1, 17)
    mask = ROWS if masked else None
    z = fast.scores(q, k, scale, bias)
    close(z, spec.scores(array(q), array(k), scale, array(bias)))
    tempered = fast.temper(z, tau)
    close(tempered, spec.temper(array(z), array(tau)))
    P = fast.softmax_rows(tempered, mask)
    close(P, spec.softmax_rows(array(tempered), array(mask)))
    out = fast.attend(P, v)
    close(out, spec.attend(array(P), array(v)))
    whole = fast.tempered_attention(q, k, v, tau=tau, scale=scale, mask=mask)[0]
    plain = fast.temper(fast.scores(q, k, scale), tau)
    close(whole, array(fast.attend(fast.softmax_rows(plain, mask), v)))


def test_what_nobody_sees_is_not_read() -> None:
    _, _, v = inputs(k_tokens=17)
    z, mask = draw(2, 4, 3, 17), torch.arange(17) < 9
    z[..., 9:], v[:, :, 9:] = math.nan, math.inf
    P = fast.softmax_rows(z, mask)
    assert fast.attend(P, v).isfinite().all()
    assert fast.softmax_rows(z[..., :0]).shape == (2, 4, 3, 0)

    tau = torch.tensor([0.5, 0.9, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    (dtau,) = torch.autograd.grad(fast.softmax_rows(fast.temper(z, tau), mask), tau, P)
    assert dtau.isfinite().all()


def test_the_temperature_is_trained() -> None:
    z, tau = draw(2, 4, 3, 5).requires_grad_(), TAUS[2].clone().requires_grad_()
    dout = draw(2, 4, 3, 5)
    got = torch.autograd.grad(fast.temper(z, tau), (z, tau), dout)
    for x, y in zip(got, spec.temper_backward(array(z), array(tau), array(dout)), strict=True):
        close(x, y)


@pytest.mark.parametrize("T", [1, 2, 7, 8])
def test_the_diagnostics_are_the_chapters(T: int) -> None:
    A, X = draw(2, 3, T, T).softmax(-1), draw(2, 3, T, 5)
    A[0, 0, T // 2 :] = 0
    X[1, 1] = 0.1
    a, x = array(A), array(X)
    close(fast.dc(X), spec.dc(x))
    close(fast.hc(X), spec.hc(x))
    close(fast.filter_gain(A), spec.filter_gain(a))
    close(fast.retention(A, X), spec.retention(a, x))
    close(fast.token_spectrum(A), spec.token_spectrum(a))
    close(fast.attention_entropy(A), spec.attention_entropy(a))
    close(fast.centre_distance(X), spec.centre_distance(x))


@pytest.mark.parametrize("texts", [2, 3, 40])
def test_the_cosine_of_all_pairs(texts: int) -> None:
    E = draw(3, texts, 5)
    E[0, 1], E[1] = 0, E[1, :1] * torch.arange(1, texts + 1)[:, None]
    close(fast.pairwise_cosine(E), spec.pairwise_cosine(array(E)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_have_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(q_tokens=6, k_tokens=6))
    P = fast.softmax_rows(fast.temper(fast.scores(q, k), TAUS[2].to(dtype)))
    square, X = P[0], fast.attend(P, v)[0]
    results = [P, X, fast.dc(X), fast.hc(X), fast.filter_gain(square), fast.retention(square, X)]
    results += [fast.token_spectrum(square), fast.attention_entropy(square)]
    results += [fast.pairwise_cosine(X), fast.centre_distance(X)]
    assert {x.dtype for x in results} == {dtype}
    assert all(x.isfinite().all() for x in results)


Q, K, V = inputs(q_tokens=3, k_tokens=5)
Z, SQUARE = torch.zeros(2, 4, 3, 5), torch.eye(3)
MANY = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: fast.scores(Q, K.float()), TypeError, "k"),
        (lambda: fast.scores(Q, K[:, :, :, 1:]), ValueError, "k"),
        (lambda: fast.scores(Q[:, :3], K), ValueError, "k"),
        (lambda: fast.scores(Q, K, 0.0), ValueError, "scale"),
        (lambda: fast.scores(Q, K, bias=1.0), TypeError, "bias"),  # type: ignore[arg-type]
        (lambda: fast.scores(Q, K, bias=Z), TypeError, "bias"),
        (lambda: fast.scores(Q, K, bias=MANY), ValueError, "bias"),
        (lambda: fast.temper(Z[0], 0.5), ValueError, "scores"),
        (lambda: fast.temper(Z, "0.5"), TypeError, "tau"),  # type: ignore[arg-type]
        (lambda: fast.temper(Z, torch.ones(3)), ValueError, "tau"),
        (lambda: fast.temper(Z, torch.zeros(4)), ValueError, "tau"),
        (lambda: fast.temper(Z, TAUS[2]), TypeError, "tau"),
        (lambda: fast.softmax_rows(Z, Z), TypeError, "mask"),
        (lambda: fast.softmax_rows(Z, torch.ones(4, dtype=torch.bool)), ValueError, "mask"),
        (lambda: fast.attend(Z.double(), V[:, :, 1:]), ValueError, "v"),
        (lambda: fast.attend(Z[:, :3].double(), V), ValueError, "v"),
        (lambda: fast.attend(Z, V), TypeError, "v"),
        (lambda: fast.dc(SQUARE[:0]), ValueError, "X"),
        (lambda: fast.hc(SQUARE[0]), ValueError, "X"),
        (lambda: fast.filter_gain(SQUARE[:2]), ValueError, "A"),
        (lambda: fast.filter_gain(SQUARE.long()), TypeError, "A"),
        (lambda: fast.retention(SQUARE, SQUARE[:2]), ValueError, "X"),
        (lambda: fast.retention(SQUARE, SQUARE[None]), ValueError, "X"),
        (lambda: fast.retention(SQUARE, SQUARE.double()), TypeError, "X"),
        (lambda: fast.token_spectrum([[1.0]]), TypeError, "A"),  # type: ignore[arg-type]
        (lambda: fast.attention_entropy(-SQUARE), ValueError, "P"),
        (lambda: fast.pairwise_cosine(SQUARE[:1]), ValueError, "E"),
        (lambda: fast.centre_distance(SQUARE[:0]), ValueError, "E"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: got .*expected"):
        call()
