"""NTK-Attention on the CPU: against its definition in plain torch, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.linear.ntk_attention import ntk_attend, ntk_packed, phi, prefix_terms, step


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


ENDS = torch.tensor([0, 3, 3, 5, 9]), torch.tensor([0, 2, 4, 4, 11], dtype=torch.int32)
"""Four sequences, one without a query and one without a key."""


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_alone(causal: bool) -> None:
    q, K, V, Z, k = tensors(9, 11)
    leaves = [x.requires_grad_() for x in (q[0], K[0], V[0], Z, k)]
    out = ntk_packed(*leaves, *ENDS, causal=causal)
    parts = []
    for n in range(4):
        rows, keys = (slice(int(x[n]), int(x[n + 1])) for x in ENDS)
        own = (leaves[0][None, :, rows], *(x[None, :, keys] for x in leaves[1:3]))
        parts.append(ntk_attend(*own, *leaves[3:], causal=causal)[0])
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, upstream))


def test_nothing_of_a_packed_neighbour_comes_through() -> None:
    q, K, V, Z, k = (x.clone() for x in tensors(9, 11))
    clean = ntk_packed(q[0], K[0], V[0], Z, k, *ENDS)
    q[:, :, 5:], K[:, :, 4:], V[:, :, 4:] = torch.nan, torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q[0], K[0], V[0])]
    out = ntk_packed(*leaves, Z, k, *ENDS)
    torch.testing.assert_close(out[:, :5], clean[:, :5])
    gradients = torch.autograd.grad(out[:, :5].sum(), leaves)
    assert gradients[0][:, :5].isfinite().all()
    assert all(x[:, :4].isfinite().all() for x in gradients[1:])


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"q": tensors(9, 11)[0]}, ValueError, "q"),
        ({"V": None}, TypeError, "V"),
        ({"Z": torch.ones(4, 6, 5)}, ValueError, "Z"),
        ({"q_offsets": ENDS[0].double()}, TypeError, "q_offsets"),
        ({"q_offsets": ENDS[0].flip(0)}, ValueError, "q_offsets"),
        ({"k_offsets": ENDS[1][:-1]}, ValueError, "k_offsets"),
        ({"k_offsets": None}, TypeError, "k_offsets"),
    ],
)
def test_bad_packed_inputs(change: dict[str, Any], error: type[Exception], name: str) -> None:
    q, K, V, Z, k = tensors(9, 11)
    arguments = {"q": q[0], "K": K[0], "V": V[0], "Z": Z, "k": k}
    arguments |= {"q_offsets": ENDS[0], "k_offsets": ENDS[1]}
    with pytest.raises(error, match=rf"^{name}: got "):
        ntk_packed(**{**arguments, **change})
