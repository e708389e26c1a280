"""The framework's mixers on the CPU: gradients in states and options; the recall task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.linear import dsf


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def calls() -> dict[str, tuple[Any, list[Tensor]]]:
    """Each mixer as a function of everything it can be differentiated in, its state included."""
    q, k, v, n, h, z = numbers(0, *3 * [(1, 2, 3, 2)], (1, 2, 3), (1, 2, 2, 2), (1, 2, 2))
    f, i, o, x, first, rates = numbers(1, *4 * [(2, 3, 2)], (2, 2), (2,))
    Lam, B, C, D = numbers(2, (2, 3, 2), (2, 3, 2, 2), (2, 3, 2, 2), (2, 3, 2, 2))
    alpha = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    layer = numbers(3, (2, 3, 2), (4, 2), (2, 3), (2,), (6, 2), (6,), (2, 2), (2, 2), (2, 2, 2))
    ends = torch.tensor([0, 1, 1, 3])
    h3, z3, c3, A = numbers(5, (3, 2, 2, 2), (3, 2, 2), (3, 2), (2, 2))
    return {
        "dsf_scan": (dsf.dsf_scan, [Lam, B, C, D, x, first]),
        "linear_attention": (
            lambda q, k, v, h, z: dsf.linear_attention(q, k, v, (h, 1 + z * z)),
            [q, k, v, h, z]),
        "normalised_attention": (dsf.normalised_attention, [q, k, v, n, h]),
        "ssd_scan": (
            lambda n, a, *rest: dsf.ssd_scan(n * n, a * a, *rest), [n, rates, q, k, v, h]),
        "qlstm": (
            lambda f, i, o, x, alpha, h: dsf.qlstm(f, i, o, x, alpha, True, h),
            [f, i, o, x, alpha, first]),
        "qlstm_layer": (
            lambda *a: dsf.qlstm_layer(*a[:7], 1.5, True, (a[7], a[8])), layer),
        "rg_lru": (
            lambda *a: dsf.rg_lru(*a[:4], h0=a[4]), [x, f, i, rates, first]),
        "linear_attention_packed": (
            lambda q, k, v, h, z: dsf.linear_attention_packed(
                q[0], k[0], v[0], ends, (h, 1 + z * z)), [q, k, v, h3, z3]),
        "ssd_packed": (
            lambda n, a, q, k, v, h: dsf.ssd_packed(
                (n * n)[0], a * a, q[0], k[0], v[0], ends, h), [n, rates, q, k, v, h3]),
        "s6_packed": (
            lambda n, A, b, c, u, D, h: dsf.s6_packed(
                (n * n)[0], A * A, b[0], c[0], u[0], ends, D, h), [f, A, i, o, x, rates, z3]),
        "qlstm_packed": (
            lambda f, i, o, x, alpha, h: dsf.qlstm_packed(
                f[0], i[0], o[0], x[0], ends, alpha, True, h), [f, i, o, x, alpha, c3]),
        "rg_lru_packed": (
            lambda x, f, i, rates, h: dsf.rg_lru_packed(
                x[0], f[0], i[0], rates, ends, h0=h), [x, f, i, rates, c3]),
    }  # fmt: skip


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


@pytest.mark.parametrize("name", calls())
def test_gradients_in_everything(name: str) -> None:
    function, inputs = calls()[name]
    assert torch.autograd.gradcheck(lambda *a: tuple(flat(function(*a))), inputs, fast_mode=True)


def test_packed_op_is_one_graph() -> None:
    *gates, alpha, first = (x.detach().float() for x in calls()["qlstm_packed"][1])
    ends = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    leaves = [x[0].clone().requires_grad_() for x in gates]
    made = []
    compiled = torch.compile(dsf.qlstm_packed, fullgraph=True, backend="aot_eager")
    for run in (dsf.qlstm_packed, compiled):
        y, last = run(*leaves, ends, float(alpha), True, first)
        made.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), leaves)])
    torch.testing.assert_close(*made)


def test_a_gate_that_never_forgets_has_no_gradient() -> None:
    u, g, lam = numbers(4, (1, 4, 3), (1, 4, 3), (3,))
    r = torch.full((1, 4, 3), -1e3, dtype=torch.float64, requires_grad=True)
    y, last = dsf.rg_lru(u, r, g, lam)
    assert not y.any()
    for slope in torch.autograd.grad(y.sum() + last.sum(), (u, r, g, lam)):
        assert not slope.any()


def test_recall_batches_bind_keys_to_values() -> None:
    inputs, labels = (x.numpy() for x in dsf.mqar_batch(np.random.default_rng(0), 256, 64, 4, 50))
    for row, asked in zip(inputs, labels, strict=True):
        keys, values = row[0:8:2], row[1:8:2]
        assert len(set(keys)) == len(set(values)) == 4
        assert keys.min() >= 1
        assert keys.max() < 128 <= values.min()
        bound = dict(zip(keys, values, strict=True))
        places = np.flatnonzero(asked != -100)
        assert len(places) == 4
        assert [bound[key] for key in row[places]] == asked[places].tolist()
