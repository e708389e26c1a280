"""The Taylor engine on the CPU: segments, states, errors, and what torch expects of ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.taylor import step, taylor
from attnspec.fast.engines.taylor.layout import (
    pack,
    packed_features,
    unpack,
    unpacked_features,
)
from attnspec.fast.engines.taylor.near_op import near_op, token_op

TOLERANCE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def make(
    q_tokens: int, k_tokens: int, d: int = 5, dv: int = 6, heads: int = 4, kv_heads: int = 2
) -> list[Tensor]:
    torch.manual_seed(q_tokens + k_tokens)
    shapes = ((2, heads, q_tokens, d), (2, kv_heads, k_tokens, d), (2, kv_heads, k_tokens, dv))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def pairwise(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """All pairs, in torch; scale 0.5."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = 0.5 * q @ k.mT
    w = 1 + s + 0.5 * s * s
    if causal:
        w = w.tril(k.shape[2] - q.shape[2])
    if mask is not None:
        w = w * mask[:, None, None]
    total = w.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, w @ v / torch.where(total == 0, 1.0, total))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [(70, 70), (5, 70), (75, 70), (1, 1), (0, 3)])
def test_segments_and_the_state_change_nothing(
    causal: bool, masked: bool, lengths: tuple[int, int]
) -> None:
    """70 keys are five segments of 16, or more than are taken pair by pair without an order."""
    inputs = make(*lengths, d=4)
    mask = torch.rand(2, lengths[1]) > 0.3 if masked else None
    got, _, _ = taylor(*inputs, scale=0.5, causal=causal, key_mask=mask, chunk=16)
    expected = pairwise(*inputs, causal, mask)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    up = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, up), torch.autograd.grad(expected, inputs, up), strict=True
    ):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("cut", [0, 1, 16, 17, 40])
def test_a_state_goes_on_anywhere(cut: int) -> None:
    q, k, v = make(40, 40)
    whole, S, zk = taylor(q, k, v, scale=0.5, causal=True, want_state=True)
    options: dict[str, Any] = {"scale": 0.5, "causal": True, "want_state": True, "chunk": 16}
    first = taylor(*(x[:, :, :cut] for x in (q, k, v)), **options)
    last = taylor(*(x[:, :, cut:] for x in (q, k, v)), **options, state=first[1:])
    torch.testing.assert_close(torch.cat([first[0], last[0]], 2), whole, **TOLERANCE)
    torch.testing.assert_close(last[1:], (S, zk), **TOLERANCE)
    assert torch.all(zk[..., 0] == 40)


def test_steps_are_prefill_and_leave_their_state_alone() -> None:
    q, k, v = (x.detach() for x in make(9, 9))
    S, zk = torch.zeros(2, 2, 31, 6, dtype=torch.float64), torch.zeros(2, 2, 31).double()
    rows = []
    for t in range(9):
        before = S.clone()
        o, new_S, new_zk = step(S, zk, *(x[:, :, t : t + 1] for x in (q, k, v)), scale=0.5)
        assert torch.equal(S, before)
        rows.append(o)
        S, zk = new_S, new_zk
    torch.testing.assert_close(torch.cat(rows, 2), pairwise(q, k, v, True), **TOLERANCE)


@pytest.mark.parametrize("d", [1, 2, 7, 16])
def test_packed_features_and_states_are_the_unpacked_ones(d: int) -> None:
    q, k = torch.randn(2, 3, d, dtype=torch.float64)
    v = torch.randn(3, 4, dtype=torch.float64)
    packed, unpacked = packed_features(k, 0.3), unpacked_features(k, 0.3)
    torch.testing.assert_close(
        packed_features(q, 0.3) @ packed.mT, unpacked_features(q, 0.3) @ unpacked.mT, **TOLERANCE
    )
    S = unpacked.mT @ v
    torch.testing.assert_close(pack(S, d, -2), packed.mT @ v, **TOLERANCE)
    torch.testing.assert_close(unpack(packed.mT @ v, d, -2), S, **TOLERANCE)


def test_opcheck() -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in make(6, 6))
    real, hi = torch.ones(2, 6), torch.arange(1, 7)
    torch.library.opcheck(near_op.op, (q, k, v, real, torch.zeros_like(hi), hi, 0.5))
    S, zk = torch.randn(2, 2, 31, 6), torch.rand(2, 2, 31) + 1
    tokens = (x[:, :, :1].detach() for x in (q, k, v))
    torch.library.opcheck(token_op.op, (S, zk, *tokens, 0.5, 1e-12))


def test_hidden_nan_stays_hidden() -> None:
    q, k, v = (x.detach() for x in make(40, 40))
    mask = torch.arange(40).expand(2, -1) % 3 > 0
    expected = taylor(q, k, v, scale=0.5, causal=True, key_mask=mask, chunk=16)[0]
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    got = taylor(q, k, v, scale=0.5, causal=True, key_mask=mask, chunk=16)[0]
    assert torch.equal(got, expected)


q0, k0, v0 = (x.detach() for x in make(4, 4))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: taylor(q0, k0, v0[..., :0], scale=1.0), "v"),
        (lambda: taylor(q0, k0, v0, scale=1.0, key_mask=torch.ones(2, 4)), "key_mask"),
        (lambda: taylor(q0, k0, v0, scale=1.0, chunk=0), "chunk"),
        (lambda: taylor(q0, k0, v0, scale=1.0, offsets=torch.tensor([0, 4])), "q"),
        (lambda: taylor(q0[:1], k0[:1], v0[:1], scale=1.0, causal=True,
                        offsets=torch.tensor([0, 3])), "offsets"),
        (lambda: taylor(q0, k0, v0, scale=1.0, state=(v0, None)), "S0"),
        (lambda: taylor(q0[:, :, :2], k0, v0, scale=1.0, causal=True, want_state=True), "q"),
        (lambda: taylor(q0, k0, v0, scale=1.0, backend="cuda"), "backend"),
        (lambda: step(v0, v0, q0, k0, v0, scale=1.0), "q"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call: Callable[[], Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        call()
