"""Lightning Attention-2's fast path against its chapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.linear import lightning_attention_2 as fast
from attnspec.reference.linear import lightning_attention_2 as spec


def array(x: Any) -> Any:
    return x.detach().double().numpy() if isinstance(x, Tensor) and x.is_floating_point() else x


def draw(q_tokens: int, k_tokens: int, batch: int = 2, heads: int = 4) -> list[Tensor]:
    """q, k, v, s and S0, two query heads to a kv head."""
    torch.manual_seed(q_tokens)
    return [
        torch.randn(batch, heads, q_tokens, 6),
        torch.randn(batch, heads // 2, k_tokens, 6),
        torch.randn(batch, heads // 2, k_tokens, 3),
        fast.slopes(heads).float(),
        torch.randn(batch, heads, 6, 3),
    ]


def same(got: Any, expected: Any) -> None:
    got = got if isinstance(got, tuple) else (got,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(array(a), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12])
def test_slopes(n: int) -> None:
    np.testing.assert_allclose(fast.slopes(n).numpy(), spec.slopes(n), rtol=1e-15)
    np.testing.assert_allclose(fast.layer_slopes(n, 1, 3).numpy(), spec.layer_slopes(n, 1, 3))
    s = fast.slopes(n)
    np.testing.assert_allclose(fast.decay_mask(5, s).numpy(), spec.decay_mask(5, s.numpy()))


@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(1, 1), (9, 9), (4, 9), (9, 4)])
@pytest.mark.parametrize("stateful", [False, True])
def test_attend(q_tokens: int, k_tokens: int, stateful: bool) -> None:
    q, k, v, s, S0 = draw(q_tokens, k_tokens)
    inputs = (q, k, v, s, S0 if stateful else None)
    expected = spec.attend(*(array(x) for x in inputs))
    same(fast.attend(*inputs), expected)
    do, dS = torch.randn(2, 4, q_tokens, 3), torch.randn_like(S0)
    gradients = spec.attend_backward(*(array(x) for x in (*inputs, do, dS)))
    same(fast.attend_backward(*inputs, do, dS), gradients)
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    got = torch.autograd.grad(fast.attend(*inputs), leaves, (do, dS))
    same(got, gradients[: len(leaves)])


def test_other_forms() -> None:
    q, k, v, s, S0 = draw(7, 7)
    do = torch.randn(2, 4, 7, 3)
    plain = [array(x) for x in (q, k, v, s)]
    same(fast.attend_left(q, k, v, s), spec.attend_left(*plain))
    same(fast.backward_left(q, k, v, s, do), spec.backward_left(*plain, array(do)))
    same(fast.attend_recurrent(q, k, v, s, S0), spec.attend_recurrent(*plain, array(S0)))
    one = (S0, q[:, :, :1], k[:, :, :1], v[:, :, :1], s)
    same(fast.decode_step(*one), spec.decode_step(*(array(x) for x in one)))


@pytest.mark.parametrize("block", [1, 4, 64])
def test_blocks(block: int) -> None:
    q, k, v, _, S0 = draw(9, 9)
    g, do = -torch.rand(2, 4, 9), torch.randn(2, 4, 9, 3)
    plain = [array(x) for x in (q, k, v, g)]
    expected = spec.chunk_states(*plain[1:], block, array(S0))
    entering, last = fast.chunk_states(k, v, g, block, S0)
    same((entering, last), expected)
    same(
        fast.chunk_output(q, k, v, g, entering, block),
        spec.chunk_output(*plain, expected[0], block),
    )
    same(
        fast.backward_chunk(q, k, v, g, do, S0, block, S0),
        spec.backward_chunk(*plain, array(do), array(S0), block, array(S0)),
    )


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_packed(batch: int) -> None:
    """Without a batch axis (0) and with one."""
    q, k, v, s, _ = draw(9, 9, batch=max(batch, 1))
    offsets = torch.tensor([0, 4, 4, 9])
    S0 = torch.randn(max(batch, 1), 3, 4, 6, 3)
    do, dS = torch.randn(max(batch, 1), 4, 9, 3), torch.randn_like(S0)
    if not batch:
        q, k, v, S0, do, dS = (x[0] for x in (q, k, v, S0, do, dS))
    plain = [array(x) for x in (q, k, v, s)]
    inputs = (*plain, offsets.numpy(), array(S0))
    same(fast.attend_packed(q, k, v, s, offsets, S0), spec.attend_packed(*inputs))
    expected = spec.attend_packed_backward(*inputs, array(do), array(dS))
    same(fast.attend_packed_backward(q, k, v, s, offsets, S0, do, dS), expected)


def test_padded() -> None:
    q, k, v, s, S0 = draw(6, 6)
    valid = torch.tensor([[True, False, True, True, False, False], [False] * 2 + [True] * 4])
    for x in (q, k, v):
        x.masked_fill_(~valid[:, None, :, None], float("nan"))
    plain = [array(x) for x in (q, k, v, s)]
    expected = spec.attend_padded(*plain, valid.numpy(), array(S0))
    same(fast.attend_padded(q, k, v, s, valid, S0), expected)
    do, dS = torch.randn(2, 4, 6, 3), torch.randn_like(S0)
    gradients = spec.attend_padded_backward(*plain, valid.numpy(), array(S0), array(do), array(dS))
    same(fast.attend_padded_backward(q, k, v, s, valid, S0, do, dS), gradients)
    leaves = [x.requires_grad_() for x in (q, k, v, s, S0)]
    outputs = fast.attend_padded(*leaves[:4], valid, S0)
    same(torch.autograd.grad(outputs, leaves, (do, dS)), gradients)


def test_golden_cases(request: pytest.FixtureRequest) -> None:
    for case in ("decay_blk", "decay_short"):
        path = request.config.rootpath / f"tests/golden/lightning_attention_2__{case}.npz"
        with np.load(path) as golden:
            data = {name: golden[name] for name in golden.files if name != "meta"}
        q, k, v, s, do = (torch.from_numpy(data[n]) for n in ("q", "k", "v", "slopes", "do"))
        o, S = fast.attend(q, k, v, s)
        np.testing.assert_allclose(o.numpy(), data["out"], atol=2e-6)
        np.testing.assert_allclose(S.numpy(), data["final_kv"], atol=2e-6)
        got = fast.backward_left(q, k, v, s, do)
        for gradient, name in zip(got, ("dq", "dk", "dv"), strict=True):
            np.testing.assert_allclose(gradient.numpy(), data[name], atol=2e-6)


X = torch.zeros(1, 2, 4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": X[:, :1]}, ValueError, "k: got 2 kv heads for 1 query heads"),
        ({"s": torch.zeros(3)}, ValueError, r"s: got shape \(3,\), expected \(2,\)"),
        ({"s": torch.full((2,), torch.inf)}, ValueError, "s: got .* finite slopes >= 0"),
        ({"s": 0.5}, TypeError, "s: got float"),
        ({"S0": torch.zeros(1, 2, 3, 4)}, ValueError, "S0: got shape"),
        ({"S0": torch.zeros(1, 2, 3, 3, dtype=torch.int64)}, TypeError, "S0: got dtype"),
        ({"block": None}, TypeError, "block: got None"),
        ({"block": 0}, ValueError, "block: got 0"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"q": X, "k": X, "v": X, "s": torch.zeros(2), **change}
    with pytest.raises(error, match=message):
        fast.attend(**arguments)
