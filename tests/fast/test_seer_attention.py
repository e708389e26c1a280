"""SeerAttention's fast path against its chapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.selection import seer_attention as seer
from attnspec.reference.selection import seer_attention as spec
from attnspec.reference.selection import seer_attention_decode as spec_decode
from attnspec.reference.selection import seer_attention_gate as spec_gate
from attnspec.reference.selection import seer_attention_training as spec_training

HEADS, KV_HEADS, T, D, B = 4, 2, 37, 8, 8


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def arrays(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if x is None else array(x) for x in tensors]


def inputs() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = (HEADS, D), (KV_HEADS, D), (KV_HEADS, 6)
    return [torch.randn(1, heads, T, d, generator=random) for heads, d in shapes]


def gate(projected: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Wq and Wk, with and without a projection of the query."""
    if not projected:
        return None, torch.randn(HEADS, 3 * D, D)
    return torch.randn(HEADS, D, 12), torch.randn(KV_HEADS, 3 * D, 12)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"tau": 0.2, "last_dense": False},
        {"rho": 0.5},
        {"rho": 0.4, "last_dense": False, "force_diagonal": True},
        {"tau": 2.0, "last_dense": False},
    ],
)
def test_attend(projected: bool, rule: dict[str, Any]) -> None:
    torch.manual_seed(1)
    q, k, v = inputs()
    Wq, Wk = gate(projected)
    out, lse, M = seer.attend(q, k, v, Wq, Wk, b=B, **rule)
    expected = spec.attend(*arrays(q, k, v, Wq, Wk), b=B, **rule)
    np.testing.assert_array_equal(M.numpy(), expected[2])
    np.testing.assert_allclose(array(out), expected[0], atol=1e-5)
    np.testing.assert_allclose(array(lse), expected[1], atol=1e-5)


@pytest.mark.parametrize("projected", [False, True])
def test_the_gate_learns(projected: bool) -> None:
    torch.manual_seed(2)
    q, k, v = inputs()
    weights = [None if W is None else W.requires_grad_() for W in gate(projected)]
    pq, pk = seer.pool_blocks(q, B, ["avg"]), seer.pool_blocks(k, B, ["max", "min", "avg"])
    cos, sin = seer.gate_rope(pq.shape[2], B, weights[1].shape[2])
    G = seer.gate_scores(pq, pk, *weights, cos, sin)
    out, A = seer.attend_with_block_max(q, k, v, B)
    loss = seer.distill_loss(G, seer.normalise_gt(A))

    expected_out, expected_A = spec.attend_with_block_max(*arrays(q, k, v), B)
    np.testing.assert_allclose(array(out), expected_out, atol=1e-5)
    np.testing.assert_allclose(array(A), expected_A, atol=1e-6)
    gate_inputs = arrays(pq, pk, *weights, cos, sin)
    expected_G = spec.gate_scores(*gate_inputs)
    np.testing.assert_allclose(array(G), expected_G, rtol=1e-5, atol=1e-5)
    GT = spec.normalise_gt(expected_A)
    np.testing.assert_allclose(array(loss), spec.distill_loss(expected_G, GT), atol=1e-6)
    dG = spec_training.distill_loss_backward(expected_G, GT, 1.0)
    trained = [W for W in weights if W is not None]
    for got, want in zip(
        torch.autograd.grad(loss, trained),
        spec_gate.gate_scores_backward(*gate_inputs, dG)[-len(trained) :],
        strict=True,
    ):
        np.testing.assert_allclose(array(got), want, atol=1e-5)


def test_block_sparse_attention_is_differentiable() -> None:
    tensors = [x.requires_grad_() for x in inputs()]
    nb = -(-T // B)
    M = torch.rand(1, HEADS, nb, nb) > 0.5
    out, lse = seer.block_sparse_attend(*tensors, M, B)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    finite = lse.isfinite()
    gradients = torch.autograd.grad((out, lse), tensors, (dout, dlse))
    expected = spec.block_sparse_attend_backward(
        *arrays(*tensors), M.numpy(), B, array(dout), array(torch.where(finite, dlse, 0))
    )
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(array(got), want, atol=1e-5)


def test_decode_target() -> None:
    q, k, _ = inputs()
    expected = spec.decode_target(*arrays(q, k), B)
    np.testing.assert_allclose(array(seer.decode_target(q, k, B)), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["Qproj", "Qavgproj", "Qavg", "Qorig"])
def test_decode_steps(mode: str) -> None:
    torch.manual_seed(3)
    q, k, v = inputs()
    group = HEADS // KV_HEADS
    Wq = {"Qproj": torch.randn(KV_HEADS, group, D, 12), "Qavgproj": torch.randn(KV_HEADS, D, 12)}
    dg = 12 if mode in Wq else D
    Wk, norm = torch.randn(KV_HEADS, 2 * D, dg), torch.randn(dg)
    state = seer.init_state(k[:, :, 0], v[:, :, 0], Wk)
    spec_state = spec_decode.init_state(*arrays(k[:, :, 0], v[:, :, 0], Wk))
    for t in range(18):
        rule = {"budget": 8} if t % 2 else {"tau": 0.3}
        options: dict[str, Any] = {"b": 4, "kinds": ("max", "avg"), "mode": mode, **rule}
        new = [x[:, :, t] for x in (q, k, v)]
        out, state = seer.step(state, *new, Wq.get(mode), Wk, q_norm=norm, k_norm=norm, **options)
        expected, spec_state = spec.step(
            spec_state,
            *arrays(*new, Wq.get(mode), Wk),
            q_norm=array(norm),
            k_norm=array(norm),
            **options,
        )
        np.testing.assert_allclose(array(out), expected, atol=1e-4)
    np.testing.assert_allclose(array(state.cache.gk), spec_state.cache.gk, atol=1e-5)


def test_ratio_to_k() -> None:
    for rho in (1e-3, 0.1, 0.5, 1.0):
        assert seer.ratio_to_k(rho, 100) == spec.ratio_to_k(rho, 100)


Q, K, V = inputs()
G = torch.zeros(1, HEADS, 3, 3)
WK = torch.zeros(KV_HEADS, D, D)
CACHE = seer.init_cache(K[:, :, 0], WK)


def stepped(**changed: torch.Tensor) -> Any:
    """A first step of decoding, with some of its tokens exchanged."""
    token = {"q_t": Q[:, :, 0], "k_t": K[:, :, 0], "v_t": V[:, :, 0], **changed}
    state = seer.init_state(K[:, :, 0], V[:, :, 0], WK)
    return seer.step(state, *token.values(), None, WK, b=4, kinds=("avg",), mode="Qavg")


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: seer.pool_blocks(Q, 0, ["avg"]), ValueError, "b"),
        (lambda: seer.pool_blocks(Q, 2, ["avg", "avg"]), ValueError, "kinds"),
        (lambda: seer.gate_rope(2, 2, 3), ValueError, "dg"),
        (lambda: seer.select_threshold(G[:, :, :2]), ValueError, "softmaxed"),
        (lambda: seer.select_threshold(G, "low"), TypeError, "tau"),
        (lambda: seer.select_ratio(G, 0.0), ValueError, "rho"),
        (lambda: seer.select_blocks(Q, K, None, WK, tau=0.1, rho=0.1), ValueError, "tau"),
        (lambda: seer.block_sparse_attend(Q, K, V, G > 0, B), ValueError, "M"),
        (lambda: seer.block_sparse_attend(Q, K, V, G, B), TypeError, "M"),
        (lambda: seer.attend_with_block_max(Q, K[:, :, 1:], V[:, :, 1:], B), ValueError, "q"),
        (lambda: seer.distill_loss(G, G[:, :1]), ValueError, "GT"),
        (lambda: seer.compress_step(CACHE, K[:, :1, 0], WK, 4, ("avg",)), ValueError, "k_t"),
        (lambda: seer.compress_step(CACHE, K[:, :, 0], WK, 4, ("avg", "max")), ValueError, "Wk"),
        (lambda: seer.compress_step(CACHE, K[:, :, 0].half(), WK, 4, ("avg",)), TypeError, "k_t"),
        (lambda: seer.compress_step(CACHE, K[:, :, 0], WK.half(), 4, ("avg",)), TypeError, "Wk"),
        (lambda: seer.decode_gate(Q[:, :, 0].half(), CACHE, 0, None, "Qavg"), TypeError, "q_t"),
        (lambda: seer.decode_gate(Q[:, :, 0], CACHE, 0, WK.half(), "Qavgproj"), TypeError, "Wq"),
        (lambda: stepped(v_t=V[:, :, 0].half()), TypeError, "v_t"),
        (lambda: stepped(q_t=Q[:, :, 0].half()), TypeError, "q_t"),
        (lambda: seer.decode_gate(Q[:, :, 0], CACHE, 0, None, "Qsum"), ValueError, "mode"),
        (lambda: seer.decode_gate(Q[:, :, 0], CACHE, 0, WK, "Qavg"), ValueError, "Wq"),
        (lambda: seer.decode_select(G[0], 4, budget=6), ValueError, "budget"),
        (lambda: seer.decode_select(G[0], 4, tau=0.1, budget=8), ValueError, "tau"),
        (lambda: seer.decode_attend(Q, K, V, G[0] > 0, B), ValueError, "q_t"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()
