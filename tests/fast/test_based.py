"""Based's fast path against its chapter and outside evidence: what the suite does not call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.linear import based as fast
from attnspec.reference.linear import based as spec

TOLERANCE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
GOLDEN = Path(__file__).parent.parent / "golden"


def tensors(q_tokens: int = 7, k_tokens: int = 7, d: int = 4, dv: int = 3) -> list[Tensor]:
    """q, k and v in float64, two query heads to a kv head."""
    torch.manual_seed(q_tokens + k_tokens)
    shapes = ((2, 4, q_tokens, d), (2, 2, k_tokens, d), (2, 2, k_tokens, dv))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def same(got: Any, expected: Any) -> None:
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:
        np.testing.assert_allclose(a.numpy(), b, **TOLERANCE)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"based__{name}.npz") as file:
        return {array: file[array] for array in file.files if array != "meta"}


def test_it_is_the_authors() -> None:
    case = golden("taylor_causal_mid")
    q, k, v, do = (torch.from_numpy(case[name]) for name in ("q", "k", "v", "do"))
    same(fast.taylor_features(q), case["phi_q"])
    same(fast.based_attend(q, k, v, causal=True), case["out"])
    same(fast.based_chunk(q, k, v, 16), tuple(case[x] for x in ("out", "final_kv", "final_k")))
    gradients = fast.based_backward(q, k, v, do, causal=True)
    same(gradients, tuple(case[x] for x in ("dq", "dk", "dv")))


def test_decoding_is_the_authors() -> None:
    case = golden("decode_steps")
    q, k, v = (torch.from_numpy(case[name]) for name in ("q", "k", "v"))
    S, zk = torch.zeros(1, 2, 21, 6).double(), torch.zeros(1, 2, 21).double()
    for t in range(q.shape[2]):
        o, S, zk = fast.based_decode_step(S, zk, *(x[:, :, t : t + 1] for x in (q, k, v)))
        same(o[:, :, 0], case["out"][:, :, t])
    same(S, np.swapaxes(case["kv_state"][:, :, 0], -1, -2))
    same(zk, case["k_state"][:, :, 0, 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("use_norm", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (3, 7), (7, 3), (0, 3)])
def test_gradients_see_no_padding(causal: bool, use_norm: bool, lengths: tuple[int, int]) -> None:
    """What is stored at a padded key, NaN too, reaches no gradient."""
    q, k, v = tensors(*lengths)
    real = torch.arange(lengths[1]).expand(2, -1) % 3 > 0
    options: dict[str, Any] = {"causal": causal, "use_norm": use_norm, "eps": 0.1, "scale": 0.7}
    do = torch.randn(2, 4, lengths[0], 3).double()
    inputs = [x.numpy() for x in (q, k, v, do)]
    expected = spec.based_backward(*inputs, key_mask=real.numpy(), **options)
    k, v = (x.masked_fill(~real[:, None, :, None], torch.nan) for x in (k, v))
    same(fast.based_backward(q, k, v, do, key_mask=real, **options), expected)


def test_states_are_differentiable() -> None:
    q, k, v = (x[:, :, :3] for x in tensors(d=2))
    S, zk = torch.randn(2, 2, 7, 3).double(), 3 + torch.rand(2, 2, 7).double()
    leaves = [x.contiguous().requires_grad_() for x in (q, k, v, S, zk)]

    def through(q: Tensor, k: Tensor, v: Tensor, S: Tensor, zk: Tensor) -> Tensor:
        return fast.based_read(q, *fast.based_state_update(S, zk, k, v), eps=0.5)

    assert torch.autograd.gradcheck(through, leaves)


def test_packed_gradients_are_those_of_each_sequence() -> None:
    q, k, v = (x[0].requires_grad_() for x in tensors(9, 9))
    o, S, zk = fast.based_packed(q, k, v, torch.tensor([0, 4, 4, 9]))
    ups = [torch.randn_like(x) for x in (o, S, zk)]
    got = torch.autograd.grad((o, S, zk), (q, k, v), ups)
    for n, rows in ((0, slice(0, 4)), (2, slice(4, 9))):
        alone = [x[None, :, rows] for x in (q, k, v)]
        outs = fast.based_chunk(*alone, 16)
        up = (ups[0][None, :, rows], ups[1][n : n + 1], ups[2][n : n + 1])
        for a, b in zip(got, torch.autograd.grad(outs, (q, k, v), up), strict=True):
            torch.testing.assert_close(a[:, rows], b[:, rows], **TOLERANCE)


X = torch.zeros(1, 2, 4, 3)
STATE = (torch.zeros(1, 2, 13, 3), torch.zeros(1, 2, 13))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fast.based_attend(X, X, X, scale=0), ValueError, "scale: got 0"),
        (lambda: fast.based_attend(X, X, X, eps=None), TypeError, "eps: got None"),
        (lambda: fast.based_attend(X, X[:, :, 1:], X), ValueError, "v: got"),
        (lambda: fast.based_attend(X, X, X, key_mask=X), ValueError, "key_mask: got"),
        (lambda: fast.based_backward(X, X, X, X[..., :2]), ValueError, "do: got shape"),
        (lambda: fast.based_backward(X, X, X, X.double()), TypeError, "do: got dtype"),
        (lambda: fast.based_chunk(X, X, X, 0), ValueError, "chunk: got 0"),
        (lambda: fast.based_chunk(X[:, :, 1:], X, X, 4), ValueError, "q: got 3"),
        (lambda: fast.based_chunk(X, X, X, 4, X), ValueError, "S0: got shape"),
        (lambda: fast.based_read(X, *STATE[::-1]), ValueError, "S: got"),
        (lambda: fast.based_decode_step(*STATE, X, X, X), ValueError, "q: got 4"),
        (lambda: fast.sliding_window_attend(X, X, X, -1), ValueError, "left: got -1"),
        (lambda: fast.layer_kinds(12), ValueError, "n_layers: got 12"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()
