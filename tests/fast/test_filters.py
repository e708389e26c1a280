"""The filter engine on the CPU against sums of shifted rows in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.engines.filters import causal_filter
from attnspec.fast.engines.filters.op import _backward, _forward


def tensors(T: int, K: int, d: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(T)
    shapes = ((2, 3, T, d), (d, K), (d,), (2, 3, K - 1, d))
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def shifted(p: Tensor, w: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    K, T = w.shape[1], p.shape[2]
    rows = pad(p, (0, 0, K - 1, 0)) if state is None else torch.cat([state, p], 2)
    return b + sum(w[:, m] * rows[:, :, m : m + T] for m in range(K))


@pytest.mark.parametrize(("T", "K"), [(1, 3), (2, 4), (9, 1), (40, 3)])
@pytest.mark.parametrize("with_state", [True, False])
def test_outputs_and_gradients(T: int, K: int, with_state: bool) -> None:
    inputs = [x.requires_grad_() for x in tensors(T, K)][: 4 if with_state else 3]
    given = inputs if with_state else [*inputs, None]
    y, expected = causal_filter(*given), shifted(*given)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for got, right in zip(
        torch.autograd.grad(y, inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_number_types_are_kept(dtype: torch.dtype) -> None:
    p, w, b, state = tensors(9, 3, dtype=dtype)
    y = causal_filter(p, w, b, state)
    assert y.dtype == dtype
    wide = causal_filter(*(x.double() for x in (p, w, b, state)))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wide, atol=tolerance, rtol=tolerance)


def test_views_of_any_strides_are_read_in_place() -> None:
    p, w, b, state = tensors(9, 3)
    expected = causal_filter(p, w, b, state)
    by_token = p.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(causal_filter(by_token, w.T.contiguous().T, b, state), expected)
    every_other = p.repeat_interleave(2, -1)[..., ::2]
    torch.testing.assert_close(causal_filter(every_other, w, b, state), expected)


def test_op_is_well_formed_and_compiles() -> None:
    p, w, b, state = (x.requires_grad_() for x in tensors(4, 3))
    torch.library.opcheck(_forward.op, (p, w, b, state, "numba"))
    torch.library.opcheck(_backward.op, (p.detach(), p.detach(), w, b, state, "numba"),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    compiled = torch.compile(causal_filter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p, w, b, state), causal_filter(p, w, b, state))


def test_gradient_has_none() -> None:
    p, w, b, _ = (x.requires_grad_() for x in tensors(4, 3))
    (dp,) = torch.autograd.grad(causal_filter(p, w, b).sum(), p, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        dp.sum().backward()


p, w, b, state = tensors(4, 3)
BAD: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    ("p", ValueError, lambda: causal_filter(p[0], w, b)),
    ("w", TypeError, lambda: causal_filter(p, w.float(), b)),
    ("w", ValueError, lambda: causal_filter(p, w[:, :0], b)),
    ("w", ValueError, lambda: causal_filter(p, w[:4], b)),
    ("b", ValueError, lambda: causal_filter(p, w, b[:4])),
    ("state", ValueError, lambda: causal_filter(p, w, b, state[:, :, :1])),
    ("backend", ValueError, lambda: causal_filter(p, w, b, backend="cuda")),
]


@pytest.mark.parametrize(("name", "error", "call"), BAD)
def test_bad_input_is_named(name: str, error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{name}: got "):
        call()
