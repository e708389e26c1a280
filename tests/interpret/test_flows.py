"""Flowformer's kernels without a gradient, in the interpreter, against float64 on the CPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.backend import launch_count
from attnspec.fast.engines.scan import triton_flows_host
from attnspec.fast.linear import flowformer
from tests.flow_plans import halve, spoil

CLAMPS = [(-1.0, 1.0), (-200.0, 200.0), None]


@pytest.fixture(autouse=True)
def _many_segments_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a large device, and with NaN in buffers that nobody has written."""
    monkeypatch.setattr(triton_flows_host, "device_of", lambda x: (64, True))
    monkeypatch.setattr(triton_flows_host, "SHORTEST", 32)
    spoil(monkeypatch)


def tokens(n: int, m: int, d: int, dv: int, group: int = 2, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(n + m)
    shapes = ((2, 2 * group, n, d), (2, 2, m, d), (2, 2, m, dv))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def wide(x: Any) -> Any:
    return [z.double() for z in x]


def agree(got: Tensor, expected: Tensor, error: float = 5e-6) -> None:
    bound = error * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("masked", [False, True])
def test_all_flows(kind: str, clamp: Any, masked: bool) -> None:
    """Several segments of each side; a batch entry without sources; NaN where a mask hides."""
    q, k, v = tokens(40, 300, 8, 6)
    options: dict[str, Any] = {"kind": kind, "clamp": clamp, "eps": 1e-3}
    given = [q, k, v]
    if masked:
        sinks, sources = torch.rand(2, 40) > 0.3, torch.rand(2, 300) > 0.3
        sources[1] = False
        options |= {"query_mask": sinks, "key_mask": sources}
        hidden = [~x[:, None, :, None] for x in (sinks, sources, sources)]
        given = [x.masked_fill(no, torch.nan) for x, no in zip(given, hidden, strict=True)]
    before = launch_count()
    out = flowformer.flow_attend(*given, **options, backend="triton")
    assert launch_count() == before + 5
    agree(out, flowformer.flow_attend(*wide((q, k, v)), **options))


@pytest.mark.parametrize(("n", "m", "d", "dv", "group"), [(1, 1, 1, 1, 1), (150, 9, 20, 33, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_of_all_flows(n: int, m: int, d: int, dv: int, group: int, dtype: Any) -> None:
    q, k, v = tokens(n, m, d, dv, group, dtype)
    out = flowformer.flow_attend(q, k, v, backend="triton")
    error = 5e-6 if dtype == torch.float32 else 1e-3
    agree(out, flowformer.flow_attend(*wide((q, k, v))), error)


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("clamp", [(-1.0, 1.0), (-0.5, 0.25)])
@pytest.mark.parametrize(("n", "d", "dv", "group"), [(1, 3, 5, 1), (130, 8, 6, 2)])
def test_flows_in_order(kind: str, clamp: Any, n: int, d: int, dv: int, group: int) -> None:
    q, k, v = tokens(n, n, d, dv, group)
    options: dict[str, Any] = {"kind": kind, "clamp": clamp, "eps": 1e-3}
    before = launch_count()
    out, state = flowformer.flow_attend_causal(q, k, v, **options, backend="triton")
    assert launch_count() == before + 9
    expected, last = flowformer.flow_attend_causal(*wide((q, k, v)), **options)
    for got, want in zip((out, *state), (expected, *last), strict=True):
        agree(got, want)


def test_a_state_goes_on() -> None:
    """Handed over between kernels, from parts that lie in any way, and on to single tokens."""
    q, k, v = tokens(100, 100, 16, 16)
    expected, last = flowformer.flow_attend_causal(*wide((q, k, v)))
    parts, state = [], None
    for some in (slice(0, 1), slice(1, 71), slice(71, 99)):
        out, state = flowformer.flow_attend_causal(
            *(x[:, :, some] for x in (q, k, v)), state, backend="triton"
        )
        parts.append(out)
        state = state._replace(KV=state.KV.mT.contiguous().mT, sa=state.sa.double())
    state = state._replace(sa=state.sa.float())
    out, state = flowformer.flow_decode_step(
        state, *(x[:, :, 99:] for x in (q, k, v)), backend="triton"
    )
    for got, want in zip((torch.cat([*parts, out], 2), *state), (expected, *last), strict=True):
        agree(got, want)


def test_no_token() -> None:
    q, k, v = tokens(0, 0, 4, 4)
    out, state = flowformer.flow_attend_causal(q, k, v, backend="triton")
    assert out.shape == q.shape
    assert not any(x.any() for x in state)
    q, k, v = tokens(3, 0, 4, 4)
    assert not flowformer.flow_attend(q, k, v, backend="triton").any()


def test_layouts() -> None:
    """Rows far apart, channels not next to one another, heads that share their numbers."""
    q, k, v = tokens(70, 70, 8, 8, 1)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.mT.contiguous().mT
    v = v[:, :1].expand(-1, 2, -1, -1)
    out = flowformer.flow_attend(q, k, v, backend="triton")
    agree(out, flowformer.flow_attend(*wide((q, k, v))))
    out, _ = flowformer.flow_attend_causal(q, k, v, backend="triton")
    agree(out, flowformer.flow_attend_causal(*wide((q, k, v)))[0])


def test_later_tokens_change_nothing() -> None:
    q, k, v = tokens(90, 90, 8, 8)
    before, _ = flowformer.flow_attend_causal(q, k, v, backend="triton")
    for x in (q, k, v):
        x[:, :, 61:] *= -2
    after, _ = flowformer.flow_attend_causal(q, k, v, backend="triton")
    assert torch.equal(before[:, :, :61], after[:, :, :61])


def test_a_known_kind_of_call_is_still_checked() -> None:
    q, k, v = tokens(5, 5, 4, 4)
    flowformer.flow_attend_causal(q, k, v, backend="triton")
    for state in ([1], 5, (q, k, v)):
        with pytest.raises(TypeError, match=r"^state: got"):
            flowformer.flow_attend_causal(q, k, v, state, backend="triton")  # type: ignore[arg-type]
    for clamp in ([-1.0, 1.0], {}):
        with pytest.raises(TypeError, match=r"^clamp: got"):
            flowformer.flow_attend(q, k, v, clamp=clamp, backend="triton")  # type: ignore[arg-type]


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One custom op, with the bits of the direct call."""
    monkeypatch.setattr(flowformer, "choose_backend", lambda backend, x: "triton")
    q, k, v = tokens(20, 20, 4, 6)
    mask = torch.rand(2, 20) > 0.3
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    compiled = torch.compile(flowformer.flow_attend, **options)
    got, expected = (
        f(q, k, v, key_mask=mask, backend="triton") for f in (compiled, flowformer.flow_attend)
    )
    assert torch.equal(got, expected)
    ordered, state = flowformer.flow_attend_causal, None
    compiled = torch.compile(ordered, **options)
    for _ in range(2):
        (got, last), (expected, state) = (
            f(q, k, v, state, backend="triton") for f in (compiled, ordered)
        )
        for x, y in zip((got, *last), (expected, *state), strict=True):
            assert torch.equal(x, y)


def test_products_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with bfloat16 on a device: operands rounded, sums not."""
    halve(monkeypatch)
    q, k, v = tokens(150, 150, 32, 16, 1, torch.float16)
    agree(
        flowformer.flow_attend(q, k, v, backend="triton"),
        flowformer.flow_attend(*wide((q, k, v))),
        1e-3,
    )
    out, state = flowformer.flow_attend_causal(q, k, v, backend="triton")
    expected, last = flowformer.flow_attend_causal(*wide((q, k, v)))
    agree(out, expected, 1e-3)
    for name, got, want in zip(state._fields, state, last, strict=True):
        agree(got, want, 1e-3 if name == "KV" else 5e-6)
