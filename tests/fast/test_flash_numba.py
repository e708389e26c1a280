"""The Numba flash kernels against the formula in float64, and the rules they must keep."""

from __future__ import annotations

import math
from typing import Any

import numba
import pytest
import torch

from attnspec.fast import backend
from attnspec.fast.engines.flash import numba_cpu

ORDER = (
    "scale", "causal", "window", "sinks", "row_start", "row_end", "key_mask", "mask",
    "block_index", "block_count", "block_full", "q_block", "k_block", "q_offsets", "k_offsets",
    "sink_logit", "slopes", "slope_positions",
)  # fmt: skip
ABSENT: dict[str, Any] = {
    **dict.fromkeys(ORDER),
    "scale": 0.3,
    "causal": False,
    "sinks": 0,
    "q_block": 0,
    "k_block": 0,
}
Case = dict[str, Any]


def inputs(
    q_tokens: int,
    k_tokens: int,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    d: int = 16,
    dv: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Random q, k, v, dout and dlse."""
    random = torch.Generator().manual_seed(q_tokens * 1000 + k_tokens)
    shapes = [
        (batch, heads, q_tokens, d),
        (batch, kv_heads, k_tokens, d),
        (batch, kv_heads, k_tokens, dv),
        (batch, heads, q_tokens, dv),
    ]
    tensors = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    dlse = torch.randn((batch, heads, q_tokens), generator=random)
    return [*tensors, dlse.double() if dtype == torch.float64 else dlse]


def visible(q: torch.Tensor, k: torch.Tensor, case: Case) -> torch.Tensor:
    """bool (batch, heads, q_tokens, k_tokens), by the definition."""
    batch, heads, q_tokens, k_tokens = *q.shape[:3], k.shape[2]
    allowed = torch.zeros(batch, heads, q_tokens, k_tokens, dtype=torch.bool)
    q_ends, k_ends = [0, q_tokens], [0, k_tokens]
    if case["q_offsets"] is not None:
        q_ends, k_ends = case["q_offsets"].tolist(), case["k_offsets"].tolist()
    for n in range(len(q_ends) - 1):
        rows, columns = slice(q_ends[n], q_ends[n + 1]), slice(k_ends[n], k_ends[n + 1])
        i = torch.arange(q_ends[n + 1] - q_ends[n])[:, None]
        j = torch.arange(k_ends[n + 1] - k_ends[n])[None, :]
        position = i + len(j[0]) - len(i)
        ranged = torch.ones(len(i), len(j[0]), dtype=torch.bool)
        if case["window"] is not None:
            ranged &= j > position - case["window"]
        if case["row_start"] is not None:
            ranged &= j >= case["row_start"][rows, None]
        ranged |= j < case["sinks"]
        if case["causal"]:
            ranged &= j <= position
        allowed[:, :, rows, columns] = ranged
    if case["key_mask"] is not None:
        allowed &= case["key_mask"][:, None, None, :]
    if case["mask"] is not None:
        allowed &= case["mask"]
    if case["block_index"] is not None:
        listed = torch.zeros_like(allowed)
        for b in range(batch):
            for h in range(heads):
                for block in range(case["block_count"].shape[2]):
                    rows = slice(block * case["q_block"], (block + 1) * case["q_block"])
                    for entry in range(int(case["block_count"][b, h, block])):
                        start = int(case["block_index"][b, h, block, entry]) * case["k_block"]
                        listed[b, h, rows, start : start + case["k_block"]] = True
        allowed &= listed
    return allowed


def distances(q: torch.Tensor, k: torch.Tensor, case: Case) -> torch.Tensor:
    """key - position (q_tokens, k_tokens) of an unpacked case."""
    position = case["slope_positions"]
    if position is None:
        position = torch.arange(q.shape[2]) + k.shape[2] - q.shape[2]
    return torch.arange(k.shape[2])[None, :] - position[:, None]


def expected(tensors: list[torch.Tensor], case: Case) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv and dsink in float64, differentiated by torch."""
    q, k, v, dout, dlse = (x.detach().double() for x in tensors)
    allowed = visible(q, k, case)
    group = q.shape[1] // k.shape[1]
    sink = case["sink_logit"]
    sink = torch.full((q.shape[1],), -math.inf) if sink is None else sink
    q, k, v, sink = (x.detach().double().requires_grad_() for x in (q, k, v, sink))
    scores = case["scale"] * q @ k.repeat_interleave(group, 1).transpose(2, 3)
    if case["slopes"] is not None:
        scores = scores + case["slopes"].double()[:, None, None] * distances(q, k, case)
    scores = torch.where(allowed, scores, 0.0)
    most = torch.where(allowed, scores, -300.0).amax(-1, keepdim=True) if k.shape[2] else 0.0
    weights = torch.where(allowed, torch.exp(scores - most), 0.0)
    total = weights.sum(-1, keepdim=True) + torch.exp(sink[:, None, None] - most)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    out = weights @ v.repeat_interleave(group, 1) / total
    lse = torch.where(empty, -math.inf, most + torch.log(total))[..., 0]
    loss = (out * dout).sum() + (torch.where(lse == -math.inf, 0.0, lse) * dlse).sum()
    grads = torch.autograd.grad(loss, (q, k, v, sink), materialize_grads=True)
    dsink = torch.zeros_like(sink) if case["sink_logit"] is None else grads[3]
    return [out.detach(), lse.detach(), *grads[:3], dsink]


def computed(tensors: list[torch.Tensor], case: Case) -> list[torch.Tensor]:
    """The same from the kernels."""
    q, k, v, dout, dlse = tensors
    options = [case[name] for name in ORDER]
    out, lse = numba_cpu.forward(q, k, v, *options)
    return [out, lse, *numba_cpu.backward(dout, dlse, q, k, v, out, lse, *options)]


NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")
MACHINE = {
    torch.float64: 2e-15,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Every result is within a few roundings of the size of its largest entry."""
    for name, x, y in zip(NAMES, got, want, strict=True):
        finite = y[torch.isfinite(y)].abs()
        size = max(1.0, float(finite.max())) if finite.numel() else 1.0
        torch.testing.assert_close(
            x.double(), y, rtol=0, atol=6 * MACHINE[dtype] * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(tensors: list[torch.Tensor], **options: Any) -> None:
    case = ABSENT | options
    assert_close(computed(tensors, case), expected(tensors, case), tensors[0].dtype)


@pytest.mark.parametrize(
    ("q_tokens", "k_tokens"),
    [(1, 1), (1, 70), (5, 5), (63, 63), (64, 64), (65, 65), (130, 129), (20, 150), (150, 20)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(q_tokens: int, k_tokens: int, causal: bool) -> None:
    check(inputs(q_tokens, k_tokens), causal=causal)


@pytest.mark.parametrize(
    ("d", "dv"), [(16, 16), (80, 96), (96, 80), (20, 3), (1, 1), (64, 128), (256, 64)]
)
def test_head_sizes(d: int, dv: int) -> None:
    check(inputs(70, 90, d=d, dv=dv), causal=True, scale=d**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (5, 1), (7, 7), (3, 3)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    check(inputs(40, 70, batch=2, heads=heads, kv_heads=kv_heads), causal=True)


@pytest.mark.parametrize("sinks", [0, 1, 4, 70, 500])
@pytest.mark.parametrize("window", [1, 9, 64, 100, 1000])
def test_window_and_sinks(window: int, sinks: int) -> None:
    check(inputs(150, 170), causal=True, window=window, sinks=sinks)


def test_window_with_more_queries_than_keys() -> None:
    check(inputs(150, 60), causal=True, window=20, sinks=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sinks", [0, 3])
def test_row_start(causal: bool, sinks: int) -> None:
    start = (torch.arange(140) // 3 + torch.arange(140) // 50 * 20).to(torch.int32)
    check(inputs(140, 160), causal=causal, row_start=start, sinks=sinks)
    check(inputs(140, 160), causal=True, window=40, row_start=start, sinks=sinks)


def test_key_mask() -> None:
    keep = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[0, :70] = False
    keep[1, 100:] = False
    check(inputs(80, 150, batch=2), causal=True, key_mask=keep)


@pytest.mark.parametrize("shape", [(2, 2, 80, 150), (1, 1, 80, 150), (2, 1, 1, 150), (1, 2, 80, 1)])
def test_mask(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., : shape[-1] // 2] = shape[-1] == 1
    check(inputs(80, 150, batch=2), mask=mask)
    check(inputs(80, 150, batch=2), mask=mask, causal=True, window=60, sinks=3)


@pytest.mark.parametrize(("q_block", "k_block"), [(16, 16), (64, 64), (128, 32), (48, 100), (7, 5)])
def test_blocks(q_block: int, k_block: int) -> None:
    q_tokens, k_tokens = 150, 170
    blocks = -(-q_tokens // q_block), -(-k_tokens // k_block)
    chosen = torch.rand(1, 2, *blocks, generator=torch.Generator().manual_seed(3)) > 0.5
    chosen[:, :, 0] = False
    order = torch.argsort((~chosen).to(torch.int8), dim=-1, stable=True).to(torch.int32)
    options = {
        "block_index": order,
        "block_count": chosen.sum(-1).to(torch.int32),
        "q_block": q_block,
        "k_block": k_block,
    }
    check(inputs(q_tokens, k_tokens), **options)
    check(inputs(q_tokens, k_tokens), causal=True, window=50, sinks=6, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 9}])
def test_packed_sequences(options: Case) -> None:
    q_offsets = torch.tensor([0, 0, 3, 70, 71, 140])
    k_offsets = torch.tensor([0, 4, 10, 70, 70, 160])
    start = torch.arange(140).remainder(71).div(9, rounding_mode="floor").to(torch.int32)
    start[:3], start[70], start[71:] = 0, 0, torch.arange(69) // 2
    tensors = inputs(140, 160)
    check(tensors, q_offsets=q_offsets, k_offsets=k_offsets, **options)
    check(tensors, q_offsets=q_offsets, k_offsets=k_offsets, sinks=2, row_start=start, **options)


def test_sink_logit() -> None:
    sink = torch.tensor([0.5, -2.0])
    check(inputs(70, 80), causal=True, window=6, sink_logit=sink)
    check(inputs(80, 20), causal=True, sink_logit=sink)


def test_slopes() -> None:
    slopes = torch.tensor([0.5, -0.1])
    check(inputs(80, 150), causal=True, slopes=slopes)
    check(inputs(80, 150), causal=True, window=9, sinks=70, slopes=slopes)
    check(inputs(80, 150), slopes=slopes, slope_positions=torch.arange(80).flip(0) // 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    sink = torch.tensor([0.5, -2.0], dtype=dtype)
    tensors = inputs(70, 90, d=24, dv=40, dtype=dtype)
    check(tensors, causal=True, sink_logit=sink)
    got = computed(tensors, ABSENT)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in got] == [dtype, wide, dtype, dtype, dtype, wide]


def test_layouts() -> None:
    """Transposed, sliced, offset, stride-0 and channel-strided tensors are read where they lie."""
    q, k, v, dout, dlse = inputs(70, 70, d=16, dv=16)
    fused = torch.cat((q, k, v), -1).transpose(1, 2).contiguous().transpose(1, 2)
    sliced = [fused[..., 16 * n : 16 * n + 16] for n in range(3)]
    check([*sliced, dout.transpose(2, 3).contiguous().transpose(2, 3), dlse], causal=True)
    check([*(torch.stack((x, x), -1)[..., 1] for x in (q, k, v, dout)), dlse], causal=True)
    one = [x[:, :1].expand(2, 2, -1, -1) for x in (q, k, v)]
    check([*one, torch.ones(()).expand(2, 2, 70, 16), torch.ones(()).expand(2, 2, 70)], causal=True)


def test_no_tokens() -> None:
    check(inputs(0, 5))
    check(inputs(5, 0), causal=True)
    check(inputs(5, 0), sink_logit=torch.tensor([0.5, -2.0]))
    check(inputs(5, 5, batch=0))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_behind_the_mask(poison: float) -> None:
    """What a row may not see does not touch it, even if its neighbours in a tile do see it."""
    clean = inputs(80, 80)
    keep = torch.ones(1, 80, dtype=torch.bool)
    keep[0, 30:40] = False
    want = expected(clean, ABSENT | {"key_mask": keep})
    dirty = [x.clone() for x in clean]
    dirty[1][:, :, 30:40] = poison
    dirty[2][:, :, 30:40] = poison
    assert_close(computed(dirty, ABSENT | {"key_mask": keep}), want, torch.float32)
    dirty = [x.clone() for x in clean]
    for x in dirty[:4]:
        x[:, :, 50:] = poison
    case = ABSENT | {"causal": True}
    got, want = computed(dirty, case), expected(clean, case)
    for x, y in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(x[:, :, :50].double(), y[:, :, :50], rtol=0, atol=1e-5)
    assert all(torch.isnan(x[:, :, 50:]).all() for x in got[:1])


def test_poison_in_a_row_that_sees_nothing() -> None:
    mask = torch.ones(80, 80, dtype=torch.bool)
    mask[20] = False
    clean = inputs(80, 80)
    dirty = [x.clone() for x in clean]
    dirty[0][:, :, 20] = math.nan
    dirty[3][:, :, 20] = math.nan
    want = expected(clean, ABSENT | {"mask": mask})
    assert_close(computed(dirty, ABSENT | {"mask": mask}), want, torch.float32)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_magnitude(size: float) -> None:
    tensors = inputs(70, 70)
    tensors[0] *= size
    out, lse = computed(tensors, ABSENT | {"causal": True})[:2]
    want = expected(tensors, ABSENT | {"causal": True})
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=1e-3 if size > 1 else 1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeatable(threads: int) -> None:
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("the process has one thread")
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        tensors = inputs(200, 200, heads=3, kv_heads=1)
        case = ABSENT | {"causal": True}
        first = computed(tensors, case)
        assert all(torch.equal(x, y) for x, y in zip(first, computed(tensors, case), strict=True))
        assert_close(first, expected(tensors, case), torch.float32)
    finally:
        numba.set_num_threads(before)


def test_inputs_stay_and_launches_count() -> None:
    tensors = inputs(70, 70)
    copies = [x.clone() for x in tensors]
    before = backend.launches
    computed(tensors, ABSENT)
    assert backend.launches == before + 2
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
