"""Flowformer's fast path against its chapter and outside evidence: what the suite does not call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.linear import flowformer as fast
from attnspec.reference.linear import flowformer as spec

TOLERANCE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
GOLDEN = Path(__file__).parent.parent / "golden"


def tensors(n: int = 6, m: int = 9) -> list[Tensor]:
    """q, k and v in float64, two query heads to a kv head."""
    torch.manual_seed(n + m)
    shapes = ((2, 4, n, 3), (2, 2, m, 3), (2, 2, m, 5))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def same(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["causal", "normal_cross"])
def test_it_is_the_authors(name: str) -> None:
    with np.load(GOLDEN / f"flowformer__{name}.npz") as file:
        case = {array: file[array] for array in file.files if array != "meta"}
    q, k, v, do = (torch.from_numpy(case[x]) for x in ("q", "k", "v", "do"))
    for x in (q, k, v):
        x.requires_grad_()
    a, b = fast.flow_features(q), fast.flow_features(k)
    if name == "causal":
        got = [*fast.flows_causal(a, b)]
        got += fast.conserved_flows_causal(a, b, *got)
        got += [fast.competition_causal(got[3]), fast.allocation(got[2], 1, 1)]
        out, _ = fast.flow_attend_causal(q, k, v)
    else:
        got = [*fast.flows(a, b)]
        got += fast.conserved_flows(a, b, *got)
        got += [fast.competition(got[3]), fast.allocation(got[2], q.shape[2], k.shape[2])]
        out = fast.flow_attend(q, k, v)
    names = ("incoming", "outgoing", "conserved_incoming", "conserved_outgoing", "competition")
    for value, field in zip(got, (*names, "allocation"), strict=True):
        same(value, case[field])
    same(out, case["out"])
    for gradient, field in zip(
        torch.autograd.grad(out, (q, k, v), do), ("dq", "dk", "dv"), strict=True
    ):
        same(gradient, case[field])


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("clamp", [(-1.0, 0.6), None])
def test_gradients_see_no_padding(kind: str, clamp: Any) -> None:
    """What is stored at a padded token, NaN too, reaches no gradient."""
    q, k, v = tensors()
    keys, rows = (torch.arange(x).expand(2, -1) % 3 != 1 for x in (9, 6))
    options: dict[str, Any] = {"kind": kind, "clamp": clamp, "eps": 1e-3}
    do = torch.randn(2, 4, 6, 5).double()
    expected = spec.flow_backward(
        *(x.numpy() for x in (q, k, v, do)),
        key_mask=keys.numpy(), query_mask=rows.numpy(), **options,
    )  # fmt: skip
    q = q.masked_fill(~rows[:, None, :, None], torch.nan)
    k, v = (x.masked_fill(~keys[:, None, :, None], torch.nan) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = fast.flow_attend(*leaves, key_mask=keys, query_mask=rows, **options)
    for got, gradient in zip(torch.autograd.grad(out, leaves, do), expected, strict=True):
        same(got, gradient)


def test_a_gradient_flows_through_the_state() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(9, 9))
    whole = fast.flow_attend_causal(q, k, v)[0][:, :, 5:]
    _, state = fast.flow_attend_causal(*(x[:, :, :5] for x in (q, k, v)))
    parts = fast.flow_attend_causal(*(x[:, :, 5:] for x in (q, k, v)), state)[0]
    torch.testing.assert_close(parts, whole, **TOLERANCE)
    up = torch.randn_like(whole)
    torch.testing.assert_close(
        torch.autograd.grad(parts, (q, k, v), up),
        torch.autograd.grad(whole, (q, k, v), up),
        **TOLERANCE,
    )


X = torch.zeros(1, 2, 4, 3)
STATE = fast.flow_attend_causal(X, X, X)[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fast.flow_attend(X, X, X, kind="elu"), ValueError, "kind: got 'elu'"),
        (lambda: fast.flow_attend(X, X, X, clamp=1.0), TypeError, "clamp: got 1.0"),
        (lambda: fast.flow_attend(X, X, X, eps=-1.0), ValueError, "eps: got -1.0"),
        (lambda: fast.flow_attend(X, X, X, query_mask=X[0, 0] > 0), ValueError, "query_mask: got"),
        (lambda: fast.flow_attend_causal(X[:, :, 1:], X, X), ValueError, "q: got 3, expected 4"),
        (lambda: fast.flow_attend_causal(X, X[:, :, 1:], X[:, :, 1:]), ValueError, "q: got 4"),
        (lambda: fast.flow_attend_causal(X, X, X, STATE[:4]), TypeError, "state: got tuple"),
        (lambda: fast.flow_decode_step(STATE, X, X, X), ValueError, "q: got 4, expected 1"),
        (lambda: fast.flows(X, X[..., :2]), ValueError, "b: got 2, expected 3"),
        (lambda: fast.allocation(X[..., 0], 1, 2.5), TypeError, "m: got 2.5"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_packed_sequences_are_alone() -> None:
    """In the middle one the values are unknown."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(shape).double() for shape in ((4, 9, 3), (2, 9, 3), (2, 9, 2)))
    v[:, 4:6] = torch.nan
    q.requires_grad_()
    offsets = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    out, last = fast.flow_attend_packed(q, k, v, offsets)
    for n, rows in ((0, slice(0, 4)), (2, slice(6, 9))):
        own = (x[None, :, rows] for x in (q, k, v))
        one, after = fast.flow_attend_causal(*own)
        torch.testing.assert_close(out[:, rows], one[0])
        for got, expected in zip(last, after, strict=True):
            torch.testing.assert_close(got[n], expected[0])
        dq = torch.autograd.grad(out[:, rows].sum(), q, retain_graph=True)[0]
        torch.testing.assert_close(dq[:, rows], torch.autograd.grad(one.sum(), q)[0][:, rows])


def test_packed_without_tokens_and_with_wrong_offsets() -> None:
    q = torch.randn(2, 5, 3)
    for offsets in ([0, 4, 3, 5], [0, 4], [0]):
        with pytest.raises(ValueError, match="offsets"):
            fast.flow_attend_packed(q, q, q, torch.tensor(offsets))
    out, state = fast.flow_attend_packed(q[:, :0], q[:, :0], q[:, :0], torch.tensor([0, 0, 0]))
    assert out.shape == (2, 0, 3)
    assert state.KV.shape == (2, 2, 3, 3)
    assert not any(bool(x.any()) for x in state)
