"""Flowformer's causal gradient on Triton, in the interpreter, against autograd in float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.backend import launch_count
from attnspec.fast.engines.scan import flows_gradient
from attnspec.fast.engines.scan.configs import FLOWS_GRADIENT, use_config
from attnspec.fast.linear import flowformer
from attnspec.fast.linear.flowformer_state import FlowState
from tests.flow_plans import halve, spoil


@pytest.fixture(autouse=True)
def _nothing_in_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in buffers that nobody has written."""
    spoil(monkeypatch)


def tokens(n: int, d: int, dv: int, group: int = 2, dtype: Any = torch.float32) -> list[Tensor]:
    torch.manual_seed(n + d)
    shapes = ((2, 2 * group, n, d), (2, 2, n, d), (2, 2, n, dv))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def gradients(
    given: list[Tensor], state: Any, backend: str, dtype: Any, through: str = "all", **options: Any
) -> list[Tensor]:
    """Those of a random combination of the outputs `through` which they come."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*given, *(state or ()))]
    first = None if state is None else FlowState(*leaves[3:])
    out, last = flowformer.flow_attend_causal(*leaves[:3], first, **options, backend=backend)
    results = {"out": [out], "state": list(last), "all": [out, *last]}[through]
    results = [x for x in results if x.requires_grad]
    torch.manual_seed(7)
    return list(torch.autograd.grad(results, leaves, [torch.randn(x.shape).to(x) for x in results]))


def agree(got: list[Tensor], expected: list[Tensor], error: float = 1e-5) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.isfinite().all()
        bound = error * max(1.0, float(y.abs().max()))
        torch.testing.assert_close(x.double(), y, rtol=error, atol=bound)


@pytest.mark.parametrize("n", [1, 5, 70])
@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("clamp", [(-1.0, 0.9), None])
def test_outputs(n: int, kind: str, clamp: Any) -> None:
    given = tokens(n, 5, 17, 1)
    options: dict[str, Any] = {"kind": kind, "clamp": clamp, "eps": 1e-3 if clamp else 0.5}
    got, expected = (
        gradients(given, None, backend, dtype, "out", **options)
        for backend, dtype in (("triton", torch.float32), ("numba", torch.float64))
    )
    agree(got, expected)


@pytest.mark.parametrize("through", ["out", "state", "all"])
def test_a_state_before_and_behind(through: str) -> None:
    """All its parts have gradients, the number of tokens too."""
    _, state = flowformer.flow_attend_causal(*(x.double() for x in tokens(9, 5, 6, 1)))
    given = tokens(70, 5, 6, 1)
    got, expected = (
        gradients(given, state, backend, dtype, through, clamp=(-1.0, 0.98))
        for backend, dtype in (("triton", torch.float32), ("numba", torch.float64))
    )
    agree(got, expected)


@pytest.mark.parametrize(
    ("n", "d", "dv", "group", "dtype"),
    [
        (200, 20, 33, 1, torch.float32),
        (70, 33, 5, 3, torch.float32),
        (70, 16, 32, 1, torch.float16),
    ],
)
def test_sizes(n: int, d: int, dv: int, group: int, dtype: Any) -> None:
    """Several segments of states; tiles of channels; rows loaded as vectors."""
    given = tokens(n, d, dv, group, dtype)
    got = gradients(given, None, "triton", dtype, "out")
    expected = gradients(given, None, "numba", torch.float64, "out")
    agree(got, expected, 1e-5 if dtype == torch.float32 else 2e-3)


def test_layouts() -> None:
    """Rows far apart, channels not next to one another, heads that share, an expanded gradient."""
    q, k, v = tokens(70, 8, 8, 1)
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k = k.mT.contiguous().mT.requires_grad_()
    v = v[:, :1].expand(-1, 2, -1, -1).detach().requires_grad_()
    out, _ = flowformer.flow_attend_causal(q, k, v, backend="triton")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, _ = flowformer.flow_attend_causal(*wide)
    agree(
        list(torch.autograd.grad(out.sum(), (q, k, v))),
        list(torch.autograd.grad(expected.sum(), wide)),
    )


def test_tiles_of_any_size() -> None:
    given = [x[:1, :1] for x in tokens(70, 5, 6, 1)]
    expected = gradients(given, None, "numba", torch.float64)
    for chosen in FLOWS_GRADIENT:
        with use_config(chosen):
            agree(gradients(given, None, "triton", torch.float32), expected)


def test_few_launches() -> None:
    given = [x.requires_grad_() for x in tokens(5, 4, 4, 1)]
    before = launch_count()
    out, _ = flowformer.flow_attend_causal(*given, backend="triton")
    assert launch_count() == before + 9
    out.sum().backward()
    assert launch_count() == before + 9 + 12


def test_the_op() -> None:
    """Its shapes without data, its schema, and its gradient in compiled code."""
    q, k, v = (x[:1, :2].requires_grad_() for x in tokens(5, 4, 6))
    state = [x.detach() for x in flowformer.flow_attend_causal(q, k, v, backend="triton")[1]]
    options = (1e-6, 1, -1.0, 1.0, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for first in ([], state):
        torch.library.opcheck(
            flows_gradient.kept_flows_op, (q, k, v, None, first, *options), test_utils=checks
        )
        offsets, parts = torch.tensor([0, 2, 2, 5]), [x.repeat_interleave(3, 0) for x in first]
        torch.library.opcheck(
            flows_gradient.kept_flows_op, (q, k, v, offsets, parts, *options), test_utils=checks
        )


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowformer, "choose_backend", lambda backend, x: "triton")
    given = [x[:1].requires_grad_() for x in tokens(20, 4, 6)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, state = flowformer.flow_attend_causal(q, k, v, backend="triton")
        return out.square().sum() + state.KV.sum()

    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*given), given) for f in (compiled, call))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def test_products_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with bfloat16 on a device: operands rounded, sums not."""
    halve(monkeypatch)
    given = tokens(150, 32, 16, 1, torch.float16)
    got = gradients(given, None, "triton", torch.float16, "out")
    agree(got, gradients(given, None, "numba", torch.float64, "out"), 2e-3)


PACKED = ((0, 0, 5, 6, 6, 70), (0, 34, 67, 70, 70))


def packed_gradients(
    given: list[Tensor], offsets: Tensor, state: Any, backend: str, dtype: Any, **options: Any
) -> list[Tensor]:
    """Outputs, last states and gradients of a random combination of them."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*given, *(state or ()))]
    first = None if state is None else FlowState(*leaves[3:])
    out, last = flowformer.flow_attend_packed(
        *leaves[:3], offsets, first, **options, backend=backend
    )
    results = [x for x in (out, *last) if x.requires_grad]
    torch.manual_seed(7)
    up = [torch.randn(x.shape).to(x) for x in results]
    return [x.detach() for x in (out, *last, *torch.autograd.grad(results, leaves, up))]


@pytest.mark.parametrize("cuts", PACKED)
@pytest.mark.parametrize("started", [False, True])
def test_packed(cuts: tuple[int, ...], started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences without tokens, shorter and longer than a segment; grouped heads."""
    monkeypatch.setattr(flows_gradient, "FLOW_PROGRAMS", 8)
    monkeypatch.setattr(flows_gradient, "STATE_PROGRAMS", 4)
    offsets, state = torch.tensor(cuts), None
    if started:
        sequences = len(cuts) - 1
        past = [x[0].repeat(sequences, 1, 1, 1).double() for x in tokens(9, 5, 6)]
        _, state = flowformer.flow_attend_causal(*past)
    given = [x[0] for x in tokens(70, 5, 6)]
    got, expected = (
        packed_gradients(given, offsets, state, backend, dtype, clamp=(-1.0, 0.98))
        for backend, dtype in (("triton", torch.float32), ("numba", torch.float64))
    )
    agree(got, expected)


def test_packed_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    halve(monkeypatch)
    given = [x[0] for x in tokens(70, 16, 32, dtype=torch.float16)]
    offsets = torch.tensor(PACKED[0], dtype=torch.int32)
    got, expected = (
        packed_gradients(given, offsets, None, backend, dtype)
        for backend, dtype in (("triton", torch.float16), ("numba", torch.float64))
    )
    agree(got, expected, 1e-2)


def test_a_nan_stays_in_its_sequence() -> None:
    given = [x[0].clone() for x in tokens(40, 5, 6)]
    whole = packed_gradients(given, torch.tensor([0, 21, 40]), None, "triton", torch.float32)
    for x in given:
        x[:, :21] = torch.nan
    got = packed_gradients(given, torch.tensor([0, 21, 40]), None, "triton", torch.float32)
    for a, b in zip((got[0], *got[8:]), (whole[0], *whole[8:]), strict=True):
        torch.testing.assert_close(a[:, 21:], b[:, 21:])
    for a, b in zip(got[1:8], whole[1:8], strict=True):
        torch.testing.assert_close(a[1], b[1])
