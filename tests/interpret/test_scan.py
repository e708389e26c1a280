"""The scan engine's Triton kernels in the interpreter against the CPU kernels in float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.conformance import Kernel, Profile, certify
from attnspec.fast.engines.scan import (
    ScanConfig,
    scan,
    segment_outputs,
    segment_states,
    step,
    use_config,
)
from attnspec.fast.linear import dsf
from attnspec.fast.linear.dsf import linear_attention

FEW = Profile("few", examples=6, shrink=False)
DECAYS = ("none", "constant", "scalar", "vector")
SMALL = ScanConfig(
    block=16,
    segment=32,
    states_items=512,
    walk_items=512,
    pairs_tile=16,
    steep_tile=16,
    gates_tile=16,
    descriptors=False,
)


def make(
    decay: str, batch: int = 1, heads: int = 2, kv_heads: int = 1, tokens: int = 40, d: int = 16,
    dv: int = 16, sequences: int = 0, strength: float = 0.5, weights: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    torch.manual_seed(tokens + d)
    inputs = {
        "q": torch.randn(batch, heads, tokens, d),
        "k": torch.randn(batch, kv_heads, tokens, d),
        "v": torch.randn(batch, kv_heads, tokens, dv),
        "state": torch.randn(sequences or batch, heads, d, dv),
    }
    if decay == "constant":
        inputs["slopes"] = strength * torch.rand(heads)
    elif decay != "none":
        shape = (batch, heads, tokens, d)[: 3 if decay == "scalar" else 4]
        inputs["log_decay"] = -strength * torch.rand(shape)
    if weights:
        inputs["reads"] = torch.randn(batch, heads, tokens)
        inputs["writes"] = torch.randn(batch, tokens, kv_heads).transpose(1, 2)
    return inputs


def run(inputs: dict[str, Tensor], upstream: list[Tensor], backend: str, **options: Any) -> Any:
    """Outputs of `scan` and the gradients of all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    got = scan(**leaves, scale=0.7, backend=backend, **options)
    upstream = [x.to(y.dtype) for x, y in zip(upstream, got, strict=True)]
    return [*got, *torch.autograd.grad(got, list(leaves.values()), upstream)]


def check(
    inputs: dict[str, Tensor], config: ScanConfig = SMALL, dtype: torch.dtype = torch.float32,
    bound: float = 1e-5, **options: Any,
) -> None:  # fmt: skip
    """The Triton kernels agree with float64 on the CPU, outputs and gradients."""
    inputs = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}
    shape = (*inputs["q"].shape[:3], inputs["v"].shape[3])
    upstream = [torch.randn(shape).to(dtype), torch.randn_like(inputs["state"])]
    wide = {name: x.double() for name, x in inputs.items()}
    expected = run(wide, upstream, "numba", **options)
    with use_config(config):
        got = run(inputs, upstream, "triton", **options)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() / (1 + b.abs().max()) < bound


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_tokens(decay: str, tokens: int) -> None:
    check(make(decay, heads=1, tokens=tokens))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("d", "dv"), [(20, 40), (40, 16)])
def test_widths(decay: str, d: int, dv: int) -> None:
    """Widths that fill no tile, and several tiles."""
    check(make(decay, heads=1, tokens=17, d=d, dv=dv), replace(SMALL, segment=None))


@pytest.mark.parametrize("decay", DECAYS)
def test_batches_and_groups(decay: str) -> None:
    check(make(decay, batch=2, tokens=17), replace(SMALL, segment=16))


@pytest.mark.parametrize("decay", ["none", "constant", "scalar"])
def test_weights(decay: str) -> None:
    """In several segments, with keys shared by heads; in float16 with padded heads too."""
    check(make(decay, batch=2, tokens=40, weights=True), replace(SMALL, segment=16))
    inputs = make(decay, heads=1, tokens=18, d=20, strength=0.1, weights=True)
    check(inputs, dtype=torch.float16, bound=5e-3)


@pytest.mark.parametrize("decay", DECAYS)
def test_descriptors(decay: str) -> None:
    check(make(decay, heads=1, tokens=20, dv=24), replace(SMALL, segment=16, descriptors=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_half(decay: str) -> None:
    check(make(decay, heads=1, tokens=18), dtype=torch.float16, bound=5e-3)


@pytest.mark.parametrize("decay", ["none", "vector"])
def test_half_widths(decay: str) -> None:
    """Heads that are padded to whole tiles, in several segments."""
    inputs = make(decay, heads=1, tokens=50, d=20, dv=1, strength=0.1)
    check(inputs, dtype=torch.float16, bound=5e-3)
    q, k, v = (inputs[name].half() for name in "qkv")
    with use_config(SMALL):
        entering, _ = segment_states(k, v, 20, backend="triton")
        o = segment_outputs(q, k, v, entering, 20, backend="triton")
    torch.testing.assert_close(o, scan(q, k, v)[0], rtol=5e-3, atol=5e-2)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed(decay: str) -> None:
    offsets = torch.tensor([0, 0, 5, 6, 6, 24, 24])
    inputs = make(decay, heads=1, tokens=24, sequences=6)
    check(inputs, replace(SMALL, segment=16), offsets=offsets)


@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("strength", [8.0, 400.0])
def test_strong_decay(decay: str, strength: float) -> None:
    """Rows that can weigh nothing are not read, and no exponent overflows."""
    check(make(decay, heads=1, tokens=50, strength=strength), bound=1e-4)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("strength", [0.3, 0.8, 400.0])
def test_half_strong_decay(strength: float) -> None:
    """A block that is one product, one of groups of 16 rows, and one of halves of halves."""
    inputs = make("vector", heads=1, tokens=40, strength=strength)
    check(inputs, replace(SMALL, block=32), torch.float16, 5e-3)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unknown_decay(dtype: torch.dtype) -> None:
    """A decay that is NaN spoils no earlier output."""
    inputs = make("vector", heads=1, tokens=20)
    inputs = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}
    clean, _ = scan(**inputs)
    inputs["log_decay"][0, 0, 5, 3] = float("nan")
    with use_config(SMALL):
        o, last = scan(**inputs, backend="triton")
    torch.testing.assert_close(o[:, :, :5], clean[:, :, :5], rtol=1e-2, atol=1e-2)
    assert o[:, :, 5:].isnan().all()
    assert last[0, 0, 3].isnan().all()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("segment", [7, 40])
def test_segments(decay: str, segment: int) -> None:
    inputs = make(decay, heads=2, kv_heads=1, tokens=20)
    whole, last = scan(**inputs, scale=0.7)
    q, k, v, state = (inputs.pop(name) for name in ("q", "k", "v", "state"))
    with use_config(SMALL):
        entering, end = segment_states(
            k, v, segment, heads=2, state=state, backend="triton", **inputs
        )
        o = segment_outputs(q, k, v, entering, segment, scale=0.7, backend="triton", **inputs)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
def test_step(decay: str) -> None:
    inputs = make(decay, batch=2, heads=4, kv_heads=2, tokens=1, d=20, dv=40)
    expected = scan(**inputs, scale=0.7)
    got = step(**inputs, scale=0.7, backend="triton")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_layouts(decay: str) -> None:
    """Strided inputs and a strided upstream gradient give what contiguous ones give."""
    inputs = make(decay, heads=2, kv_heads=2, tokens=18)
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items() if x.dim() == 4}
    upstream = [torch.randn(1, 2, 16, 18).mT, torch.randn(1, 2, 16, 16).mT]
    dense = [x.contiguous() for x in upstream]
    with use_config(SMALL):
        a = run({**inputs, **strided}, upstream, "triton")
        b = run(inputs, dense, "triton")
    torch.testing.assert_close(a, b)


def test_poison_beyond_the_end() -> None:
    """What lies behind a sequence, in memory or in the next sequence, never leaks (K11)."""
    inputs = make("scalar", tokens=64)
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name in ("q", "k", "v", "log_decay"):
        poisoned[name][:, :, 21:] = float("nan")
    views = {name: x[:, :, :21] if name != "state" else x for name, x in poisoned.items()}
    with use_config(SMALL):
        expected, last = scan(
            **{n: x[:, :, :21].contiguous() if n != "state" else x for n, x in inputs.items()},
            backend="triton",
        )
        got = scan(**views, backend="triton")
        poisoned["state"] = inputs["state"].expand(2, -1, -1, -1)
        packed = scan(**poisoned, offsets=torch.tensor([0, 21, 64]), backend="triton")
    torch.testing.assert_close(got, (expected, last))
    torch.testing.assert_close(packed[0][:, :, :21], expected)
    torch.testing.assert_close(packed[1][:1], last)


def test_gradients_of_the_suite() -> None:
    """Those of the linear attention of `dsf`, in the state it starts from and through its last."""
    started = []

    def call(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> Any:
        started.append(state is not None)
        return linear_attention(q, k, v, state, backend="triton")

    kernel = Kernel(
        "interpreted", "dsf.linear_attention", call, array="torch", dtypes=("float32",),
        gradient=True, reads_values=False,
    )  # fmt: skip
    with use_config(SMALL):
        report = certify(kernel, profile=FEW, laws=["gradient"])
    assert report.passed, report.failures[0]
    assert any(started)


@pytest.mark.parametrize("name", ["linear_attention_packed", "ssd_packed"])
def test_packed_sequences_of_the_suite(name: str) -> None:
    """Alone, going on from their states, and their gradients."""
    kernel = Kernel(
        "interpreted", f"dsf.{name}", partial(getattr(dsf, name), backend="triton"),
        array="torch", dtypes=("float32",), gradient=True, reads_values=False,
        draws={"tokens": (1, 9, 20), "d": (3, 16), "dv": (2, 16), "kv_heads": (1, 2)},
    )  # fmt: skip
    laws = ["agreement", "gradient", "alone", "continued", "refusal"]
    with use_config(SMALL):
        report = certify(kernel, profile=FEW, laws=laws)
    assert report.passed, report.failures[0]


def test_bfloat16_raises() -> None:
    x = torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"q: got dtype torch\.bfloat16"):
        scan(x, x, x, backend="triton")
