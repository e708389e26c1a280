"""LightNet's Triton kernels in the interpreter against the CPU kernels in float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.scan import ScanConfig, additive_gates, time_summary, use_config
from attnspec.fast.engines.scan import triton_additive as kernels
from attnspec.fast.engines.scan import triton_additive_scan as scan_kernels
from attnspec.fast.engines.scan.additive import additive_scan_op
from attnspec.fast.engines.scan.triton_plan import Call
from attnspec.fast.linear.lightnet import lightnet_causal, lightnet_noncausal, lightnet_packed


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROWS", 4)


def logits(tokens: int, d: int = 18, heads: int = 2) -> Tensor:
    """Masked tokens at the start and in between, a channel without any, and a far offset."""
    torch.manual_seed(tokens)
    k = 3 * torch.randn(1, heads, tokens, d)
    k[:, :, :2] = -torch.inf
    k[:, :, 6:7] = -torch.inf
    k[:, :, :, 0] = -torch.inf
    k[:, 0] += 1e3
    return k


def gradients(
    function: Any, inputs: list[Tensor], upstream: list[Tensor], backend: str
) -> list[Tensor]:
    """Outputs and gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, backend=backend)
    upstream = [x.to(y.dtype) for x, y in zip(upstream, out, strict=True)]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def compare(function: Any, inputs: list[Tensor], upstream: list[Tensor], bound: float) -> None:
    got = gradients(function, inputs, upstream, "triton")
    wide = [x.double() for x in inputs]
    expected = gradients(function, wide, upstream, "numba")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * 10)


@pytest.mark.parametrize("tokens", [1, 4, 11])
@pytest.mark.parametrize("started", [False, True])
def test_gates(tokens: int, started: bool) -> None:
    k = logits(tokens)
    upstream = [torch.randn(k.shape), torch.randn(k.shape), torch.zeros(1, 2, 18)]
    inputs = [k]
    if started:
        inputs.append(torch.randn(1, 2, 18))
        upstream[2] = torch.randn(1, 2, 18)
    compare(additive_gates, inputs, upstream, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_summary(dtype: torch.dtype) -> None:
    k, v = logits(37).to(dtype), torch.randn(1, 2, 37, 20).to(dtype)
    KV, z = time_summary(k, v, backend="triton")
    expected, wanted = time_summary(k.double(), v.double(), backend="numba")
    bound = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(KV.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(z.double(), wanted, rtol=1e-6, atol=1e-4)


def test_causal_strides_and_a_state() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 16, 9).mT for _ in range(2))
    v = torch.randn(1, 2, 9, 16)
    state = (torch.randn(1, 2, 16, 16), torch.randn(1, 2, 16))
    o, (S, z) = lightnet_causal(q, k, v, state, backend="triton")
    wide = [x.double() for x in (q, k, v)]
    expected, (S1, z1) = lightnet_causal(*wide, (state[0].double(), state[1].double()))
    for a, b in ((o, expected), (S, S1), (z, z1)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("started", [False, True])
def test_causal_from_logits(started: bool) -> None:
    """Gentle blocks, steep ones, and one with masked tokens; a batch, segments, odd tokens."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 2, 75, width).half() for width in (32, 32, 16))
    k[0, 0, 30] = 40
    k[1, :, 50:52] = -torch.inf
    inputs = [q, k, v]
    upstream = [torch.randn(2, 2, 75, 16), torch.randn(2, 2, 32, 16), torch.randn(2, 2, 32)]
    if started:
        inputs += [torch.randn(2, 2, 32, 16), torch.randn(2, 2, 32)]

    def causal(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, backend: str) -> tuple[Any, ...]:
        o, after = lightnet_causal(q, k, v, state or None, backend=backend)  # type: ignore[arg-type]
        return o, *after

    with use_config(ScanConfig(block=16, segment=32, logits_tile=16, steep_tile=16)):
        got = gradients(causal, inputs, upstream, "triton")
    expected = gradients(causal, [x.double() for x in inputs], upstream, "numba")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("started", [False, True])
def test_blocks_that_nothing_precedes_are_gentle(
    started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first block, and blocks of a channel without any key, take no second kernel."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, 40, 16).half() for _ in range(3))
    k[0, 0, :, 3] = -torch.inf
    k[0, 1, :16, 4] = -torch.inf
    state = None
    if started:
        state = (torch.randn(1, 2, 16, 16), torch.full((1, 2, 16), -torch.inf))
    monkeypatch.setattr(scan_kernels, "weigh_steep", lambda *_: None)
    with use_config(ScanConfig(block=16, segment=16, logits_tile=16)):
        o, after = lightnet_causal(q, k, v, state, backend="triton")
    wide = tuple(x.double() for x in state) if state else None
    expected, wanted = lightnet_causal(*(x.double() for x in (q, k, v)), wide)  # type: ignore[arg-type]
    for a, b in zip((o, *after), (expected, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize(("started", "steep"), [(False, False), (True, False), (True, True)])
def test_a_gradient_without_gates(
    started: bool, steep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gentle blocks, more than the chain takes at a time, it is right if no gate is written. A
    state may be given to channels that no key precedes, whose first one is anywhere in a block.
    """
    torch.manual_seed(4)
    inputs = [torch.randn(1, 2, 90, 16).half() for _ in range(3)]
    inputs[1][0, 0, :, 3] = -torch.inf
    inputs[1][0, 1, :16, 4] = -torch.inf
    if started:
        inputs += [torch.randn(1, 2, 16, 16), torch.full((1, 2, 16), -torch.inf)]
        inputs[4][:, 0] = 0.5
    shapes = ((1, 2, 90, 16), (1, 2, 16, 16), (1, 2, 16))
    upstream = [torch.randn(shape) for shape in shapes]

    def causal(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, backend: str) -> tuple[Any, ...]:
        o, (S, z) = lightnet_causal(q, k, v, state or None, backend=backend)  # type: ignore[arg-type]
        return o, S, torch.where(z == -torch.inf, 0.0, z)

    def spoil(totals: Any, kbar: Tensor, log_decay: Tensor, *_: Any) -> None:
        kbar.fill_(torch.nan), log_decay.fill_(torch.nan)

    if steep:
        inputs[1][0, 1, :21, 5] = -torch.inf
    else:
        monkeypatch.setattr(kernels.Totals, "write_some", spoil)
    with use_config(ScanConfig(block=16, segment=32, logits_tile=16)):
        got = gradients(causal, inputs, upstream, "triton")
    expected = gradients(causal, [x.double() for x in inputs], upstream, "numba")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_steep_blocks_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every steep block is met once, however many a program looks after."""
    monkeypatch.setattr(Call, "span", lambda call, blocks: 5)
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 4, 64, 16).half() for _ in range(3))
    k[0, 1] = torch.linspace(0, 400, 64)[:, None].half()
    k[0, :, 40] = 60
    with use_config(ScanConfig(block=16, logits_tile=16, steep_tile=16)):
        o, after = lightnet_causal(q, k, v, backend="triton")
    expected, wanted = lightnet_causal(*(x.double() for x in (q, k, v)))
    for a, b in zip((o, *after), (expected, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_op_from_logits() -> None:
    q, k, v = (torch.randn(1, 1, 5, 16).half().requires_grad_() for _ in range(3))
    torch.library.opcheck(additive_scan_op.op, (q, k, v, None, None, 1.0))
    state = (torch.randn(1, 1, 16, 16).requires_grad_(), torch.randn(1, 1, 16).requires_grad_())
    torch.library.opcheck(additive_scan_op.op, (q, k, v, *state, 1.0))


def test_no_tokens() -> None:
    k, v = torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16)
    z0 = torch.randn(1, 2, 16)
    assert torch.equal(additive_gates(k, z0, backend="triton")[2], z0)
    KV, z = time_summary(k, v, backend="triton")
    assert not KV.any()
    assert torch.all(z == -torch.inf)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("widths", [(18, 20), (32, 16)])
def test_noncausal_and_gradients(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    """Masked tokens, far offsets, logits that rise by more than any margin; grouped heads."""
    d, dv = widths
    k, v = logits(150, d).to(dtype), torch.randn(1, 2, 150, dv).to(dtype)
    k[:, 1, 70:, 1] = torch.linspace(-50, 150, 80).to(dtype)
    k[:, 0, :, 2] = torch.finfo(dtype).min
    k[:, 1, 9, 2] = torch.finfo(dtype).max
    q = torch.randn(1, 4, 21, d).to(dtype)
    upstream = [torch.randn(1, 4, 21, dv)]

    def noncausal(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> tuple[Tensor]:
        return (lightnet_noncausal(q, k, v, scale=0.5, backend=backend),)

    got = gradients(noncausal, [q, k, v], upstream, "triton")
    expected = gradients(noncausal, [x.double() for x in (q, k, v)], upstream, "numba")
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=2 * bound)


def test_a_nan_stays_in_its_channel() -> None:
    k, v = torch.randn(1, 1, 80, 16), torch.randn(1, 1, 80, 16)
    k[0, 0, 3, 5] = torch.nan
    KV, z = time_summary(k, v, backend="triton")
    spoilt = torch.zeros(16, dtype=torch.bool)
    spoilt[5] = True
    assert torch.equal(KV[0, 0].isnan().all(1), spoilt)
    assert torch.equal(KV[0, 0].isnan().any(1), spoilt)
    assert torch.equal(z[0, 0].isnan(), spoilt)


def test_float64_is_for_the_cpu_alone() -> None:
    x = torch.zeros(1, 1, 3, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"q: got dtype torch\.float64"):
        lightnet_noncausal(x, x, x, backend="triton")


@pytest.mark.parametrize("started", [False, True])
def test_packed_gates(started: bool) -> None:
    """Sequences without tokens, of a segment, of several, and more of these than a chain takes."""
    offsets = torch.tensor([0, 0, 5, 6, 6, 34, 38, 38])
    k = logits(38, d=9)
    sequences = len(offsets) - 1
    z = torch.zeros(sequences, 2, 9)
    upstream = [torch.randn(k.shape), torch.randn(k.shape), z]
    inputs = [k]
    if started:
        inputs.append(torch.randn(z.shape))
        upstream[2] = torch.randn(z.shape)

    def packed(*x: Tensor, backend: str) -> tuple[Any, ...]:
        return additive_gates(*x, offsets=offsets, backend=backend)

    compare(packed, inputs, upstream, 2e-5)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("started", [False, True])
def test_packed(dtype: torch.dtype, started: bool) -> None:
    """Outputs, states and gradients; masked tokens, steep logits, grouped heads, odd widths."""
    torch.manual_seed(5)
    offsets = torch.tensor([0, 21, 21, 22, 40, 40], dtype=torch.int32)
    q, k, v = (torch.randn(heads, 40, 18).to(dtype) for heads in (2, 1, 1))
    k[:, 20:23] = -torch.inf
    k[:, 30, 2] = 40
    inputs = [q, k, v]
    if started:
        inputs += [torch.randn(5, 2, 18, 18), torch.randn(5, 2, 18)]
    upstream = [torch.randn(2, 40, 18), torch.randn(5, 2, 18, 18), torch.randn(5, 2, 18)]

    def packed(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, backend: str) -> tuple[Any, ...]:
        o, (S, z) = lightnet_packed(q, k, v, offsets, state or None, backend=backend)  # type: ignore[arg-type]
        return o, S, torch.where(z == -torch.inf, 0.0, z)

    with use_config(ScanConfig(block=16, segment=16, steep_tile=16)):
        got = gradients(packed, inputs, upstream, "triton")
    expected = gradients(packed, [x.double() for x in inputs], upstream, "numba")
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=2 * bound)


def test_a_nan_stays_in_its_sequence() -> None:
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, 40, 16) for _ in range(3))
    alone = lightnet_packed(q[:, 21:], k[:, 21:], v[:, 21:], torch.tensor([0, 19]))
    for x in (q, k, v):
        x[:, :21] = torch.nan
    with use_config(ScanConfig(block=16, segment=16)):
        o, (S, z) = lightnet_packed(q, k, v, torch.tensor([0, 21, 40]), backend="triton")
    for a, b in zip((o[:, 21:], S[1:], z[1:]), (alone[0], *alone[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
