"""NTK-Attention on the CPU: against its definition in plain torch, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.linear.ntk_attention import ntk_attend, phi, prefix_terms, step


def tensors(
    q_tokens: int = 5, k_tokens: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """q, K, V, Z, k of four query heads and two kv heads."""
    torch.manual_seed(q_tokens)
    shapes = ((2, 4, q_tokens, 6), (2, 2, k_tokens, 6), (2, 2, k_tokens, 3), (4, 6, 3), (4, 6))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def plain(q: Tensor, K: Tensor, V: Tensor, Z: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """The sums as they are written, without a stabiliser."""
    K, V = (x.repeat_interleave(2, 1) for x in (K, V))
    weights = torch.where(seen, torch.exp(q @ K.mT / q.shape[3] ** 0.5), 0.0)
    features = torch.nn.functional.elu(q / q.shape[3] ** 0.25) + 1
    total = weights.sum(-1) + torch.einsum("bhtd,hd->bht", features, k.abs())
    return (weights @ V + features @ Z) / total[..., None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_tokens", [5, 7, 9])
def test_forward_and_gradients(causal: bool, q_tokens: int) -> None:
    """Rows of nine queries that see none of seven keys have the prefix alone."""
    leaves = [x.requires_grad_() for x in tensors(q_tokens)]
    key_mask = torch.tensor([[False] * 2 + [True] * 5, [False] * 7])
    seen = key_mask[:, None, None].expand(2, 1, q_tokens, 7)
    if causal:
        seen = seen & torch.ones(q_tokens, 7, dtype=torch.bool).tril(7 - q_tokens)
    out = ntk_attend(*leaves, causal=causal, key_mask=key_mask)
    expected = plain(*leaves, seen)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, upstream))


def test_extreme_scores_stay_finite() -> None:
    q, K, V, Z, k = tensors(dtype=torch.float32)
    for size in (300, -300):
        far = size * K * q[:, ::2, :1].sign()
        leaves = [x.clone().requires_grad_() for x in (q, far, V, Z, k)]
        out = ntk_attend(*leaves)
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert all(x.isfinite().all() for x in (out, *gradients))


def test_a_state_of_float32_beside_half_precision() -> None:
    q, K, V, Z, k = tensors(dtype=torch.bfloat16)
    out = ntk_attend(q, K, V, Z.float(), k.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, ntk_attend(q, K, V, Z, k))
    num, den = prefix_terms(q, Z.float(), k.float())
    assert num.dtype == den.dtype == torch.float32
    assert phi(torch.full((1, 4), -40.0)).min() > 0


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"Z": None}, TypeError, "Z"),
        ({"k": torch.ones(4, 5, dtype=torch.float64)}, ValueError, "k"),
        ({"positivity": "exp"}, ValueError, "positivity"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"backend": "triton"}, ValueError, "backend"),
    ],
)
def test_bad_inputs(change: dict[str, Any], error: type[Exception], name: str) -> None:
    arguments: dict[str, Any] = dict(zip(("q", "K", "V", "Z", "k"), tensors(), strict=True))
    with pytest.raises(error, match=rf"^{name}: got "):
        ntk_attend(**{**arguments, **change})


def test_a_step_needs_a_state() -> None:
    q, K, V, Z, k = tensors(1, 1)
    with pytest.raises(TypeError, match=r"^state: got NoneType"):
        step(None, q, K, V, Z, k)  # type: ignore[arg-type]
