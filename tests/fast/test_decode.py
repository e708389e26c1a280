"""The decode engine and lean attention on the CPU, against a plain softmax in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast import backend
from attnspec.fast.engines.decode import CANDIDATES, configs, decode, use_config
from attnspec.fast.engines.numba_math import exp_f32
from attnspec.fast.parallel import lean_attention as fast
from attnspec.reference.parallel import lean_attention as spec

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INF, NAN = math.inf, math.nan


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    causal: bool = True,
    index: Tensor | None = None,
    page: int = 1,
    bias: Tensor | None = None,
    sink_logit: Tensor | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Row by row from the definition; keywords about how the work is split change nothing."""
    batch, heads, q_tokens, d = q.shape
    kv_heads, room = k.shape[1:3]
    out = torch.zeros(batch, heads, q_tokens, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, q_tokens), -INF, dtype=torch.float64)
    for b, h, i in np.ndindex(batch, heads, q_tokens):
        head = h // (heads // kv_heads)
        length = room
        if lengths is not None:
            length = min(int(lengths[b, head] if lengths.dim() == 2 else lengths[b]), room)
        keys = torch.arange(room)
        if index is not None:
            entries = index[b, head].long()[:, None]
            keys = torch.where(entries < 0, room, entries * page + torch.arange(page)).reshape(-1)
        extra = torch.zeros(len(keys)) if bias is None else bias[b, head]
        seen = (keys < length) & (extra > -INF)
        if causal:
            seen &= keys <= i + length - q_tokens
        x = k[b, head, keys[seen]].double() @ q[b, h, i].double() / math.sqrt(d)
        x += extra[seen].double()
        sink = torch.zeros(0) if sink_logit is None else sink_logit[h : h + 1]
        lse[b, h, i] = torch.cat([x, sink.double()]).logsumexp(0)
        out[b, h, i] = torch.exp(x - lse[b, h, i]) @ v[b, head, keys[seen]].double()
    return out, lse


def check(q: Tensor, k: Tensor, v: Tensor, expected: tuple[Tensor, Tensor], **how: Any) -> None:
    out, lse = decode(q, k, v, **how)
    assert out.dtype == q.dtype
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), expected[0], atol=tolerance, rtol=tolerance)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    assert lse.dtype == exact
    torch.testing.assert_close(lse, expected[1].to(exact), atol=5e-6, rtol=1e-6)


def draw(batch: int, heads: int, kv_heads: int, queries: int, keys: int, d: int, dv: int) -> Any:
    torch.manual_seed(0)
    shapes = (batch, heads, queries, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, dv)
    return tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 4, 2, 1, 130, 64, 64),
        (2, 3, 1, 1, 65, 80, 96),
        (1, 2, 2, 3, 63, 16, 24),
        (1, 8, 2, 9, 40, 20, 16),
        (1, 2, 1, 6, 4, 5, 7),
        (2, 2, 1, 1, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_contiguous(dtype: torch.dtype, sizes: tuple[int, ...], causal: bool) -> None:
    q, k, v = (x.to(dtype) for x in draw(*sizes))
    check(q, k, v, plain(q, k, v, causal=causal), causal=causal)


@pytest.mark.parametrize("order", ["natural", "paired"])
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("split", [{"tile": 1}, {"tile": 16, "rows": 5}, {"tile": 999, "rows": 1}])
def test_how_the_work_is_split_changes_nothing(
    order: str, workers: int, split: dict[str, int]
) -> None:
    q, k, v = draw(2, 4, 2, 7, 41, 16, 8)
    lengths = torch.tensor([41, 12], dtype=torch.int32)
    expected = plain(q, k, v, lengths=lengths)
    check(q, k, v, expected, lengths=lengths, order=order, workers=workers, **split)


@pytest.mark.parametrize("lengths", [[5, 0, 33, 40], [0, 0, 0, 0], [0, 17, 1, 0], [99, 40, 3, 2]])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_ragged_batches_do_not_read_beyond_their_lengths(
    lengths: list[int], integers: torch.dtype
) -> None:
    q, k, v = draw(4, 4, 2, 2, 40, 16, 16)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = NAN, INF
    n = torch.tensor(lengths, dtype=integers)
    sink = torch.randn(4)
    for workers in (1, 3, 50):
        check(q, k, v, plain(q, k, v, lengths=n), lengths=n, workers=workers)
        expected = plain(q, k, v, lengths=n, sink_logit=sink)
        check(q, k, v, expected, lengths=n, sink_logit=sink, workers=workers)


def test_lengths_of_each_head() -> None:
    q, k, v = draw(2, 4, 2, 3, 40, 16, 16)
    lengths = torch.tensor([[5, 0], [33, 40]])
    check(q, k, v, plain(q, k, v, lengths=lengths), lengths=lengths, workers=3)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gathered(page: int, with_bias: bool) -> None:
    q, k, v = draw(2, 4, 2, 2, 64, 16, 16)
    chosen = [torch.randperm(64 // page)[:11] for _ in range(4)]
    options: dict[str, Any] = {"index": torch.stack(chosen).view(2, 2, 11).int(), "page": page}
    options["index"][0, 0, 3] = -1
    options["index"][1, 1] = -1
    options["lengths"] = torch.tensor([50, 64])
    if with_bias:
        options["bias"] = torch.randn(2, 2, 11 * page)
        options["bias"][0, 1, 2] = -INF
    expected = plain(q, k, v, **options)
    unread = torch.ones(2, 2, 64, dtype=torch.bool)
    for b, head in np.ndindex(2, 2):
        for entry in options["index"][b, head].tolist():
            unread[b, head, entry * page : (entry + 1) * page] &= entry < 0
    k[unread], v[unread] = NAN, NAN
    check(q, k, v, expected, workers=3, **options)


def test_the_same_token_twice_counts_twice() -> None:
    q, k, v = draw(1, 2, 1, 1, 8, 16, 16)
    _, once = decode(q, k, v, index=torch.tensor([[[3]]]))
    _, twice = decode(q, k, v, index=torch.tensor([[[3, 3]]]))
    torch.testing.assert_close(twice - once, torch.full_like(once, math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pool = torch.randn(2, 20, 8, 2, 16).to(dtype)
    k_pages, v_pages = pool.transpose(2, 3)
    table = torch.randperm(20)[:16].view(2, 8).int()
    k, v = (x[table.long()].transpose(1, 2).reshape(2, 2, 64, 16) for x in (k_pages, v_pages))
    q, lengths = torch.randn(2, 4, 2, 16).to(dtype), torch.tensor([13, 61])
    table[0, 2:] = -1
    options: dict[str, Any] = {"lengths": lengths, "workers": 3}
    expected = plain(q, k, v, lengths=lengths)
    check(q, k_pages, v_pages, expected, block_table=table, **options)
    options |= {"index": torch.randint(0, 15, (2, 2, 6)), "page": 4}
    check(q, k_pages, v_pages, plain(q, k, v, **options), block_table=table, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 16, 1).to(dtype).transpose(2, 3)
    fused = torch.randn(1, 50, 3, 2, 16).to(dtype)
    k, v = fused[:, :, 1].transpose(1, 2), fused[:, :, 2].transpose(1, 2)
    check(q, k, v, plain(q, k, v))
    k, v = (
        torch.randn(1, 2, 16, 50).to(dtype).mT,
        torch.randn(17).to(dtype)[1:].expand(1, 2, 50, 16),
    )
    check(q, k, v, plain(q, k, v), workers=2)
    v = torch.randn(1, 2, 50, 1).to(dtype).expand(1, 2, 50, 16)
    check(q, k, v, plain(q, k, v), lengths=torch.tensor([9, 50])[1:])


def test_bias_hides_keys() -> None:
    """Left padding: NaN behind it never leaks (K11)."""
    q, k, v = draw(1, 4, 2, 1, 50, 16, 16)
    bias = torch.zeros(1, 1, 50).masked_fill(torch.arange(50) < 7, -INF).expand(1, 2, 50)
    expected = plain(q, k, v, bias=bias)
    k[:, :, :7], v[:, :, :7] = NAN, NAN
    check(q, k, v, expected, bias=bias, workers=2)


def test_sizes_of_zero() -> None:
    q, k, v = draw(1, 4, 2, 2, 0, 16, 16)
    out, lse = decode(q, k, v)
    assert out.eq(0).all()
    assert lse.eq(-INF).all()
    assert decode(q[:, :, :0], k, v)[0].shape == (1, 4, 0, 16)
    assert decode(q[:0], k[:0], v[:0])[1].shape == (0, 4, 2)
    nothing = torch.zeros(1, 2, 0, dtype=torch.int32)
    assert decode(*draw(1, 4, 2, 2, 9, 16, 16), index=nothing)[1].eq(-INF).all()


def test_large_logits_do_not_overflow() -> None:
    q, k, v = draw(1, 2, 1, 1, 70, 16, 16)
    out, lse = decode(1e4 * q, k, v, workers=3)
    expected = plain(1e4 * q, k, v)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], atol=0, rtol=1e-6)


def test_float16_subnormals_and_infinities_are_widened_exactly() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    finite = bits[bits.isfinite()].view(1, 1, -1, 16)
    q, k = torch.zeros(1, 1, 1, 16, dtype=torch.float16), torch.zeros_like(finite)
    for at in (0, 61, 1000, 3967):
        index = torch.tensor([[[at]]])
        assert torch.equal(decode(q, k, finite, index=index)[0][0, 0, 0], finite[0, 0, at])
    infinite = torch.full_like(finite, INF)
    assert decode(q, k, infinite, index=index)[0].isinf().all()


def test_two_calls_give_the_same_bits_and_launch() -> None:
    q, k, v = draw(2, 4, 2, 1, 200, 16, 16)
    before = backend.launch_count()
    first, second = decode(q, k, v), decode(q, k, v)
    assert backend.launch_count() > before
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_decode_has_no_gradient() -> None:
    q, k, v = draw(1, 2, 1, 1, 9, 16, 16)
    out, _ = decode(q.requires_grad_(), k, v)
    with pytest.raises(NotImplementedError, match=r"attnspec\.fast\.attention"):
        out.sum().backward()


def test_the_custom_op_is_well_formed() -> None:
    q, k, v = draw(2, 4, 2, 1, 20, 16, 8)
    lengths = torch.tensor([3, 20])
    options = (0.25, True, 1, 0, 0, 0, False, "numba")
    for rest in ((lengths, None, None, None, None), (None,) * 5):
        torch.library.opcheck(torch.ops.attnspec.decode, (q, k, v, *rest, *options))


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_break() -> None:
    q, k, v = draw(2, 4, 2, 1, 20, 16, 8)
    lengths = torch.tensor([3, 20])
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(q, k, v, lengths=lengths), decode(q, k, v, lengths=lengths), strict=True
    ):
        assert torch.equal(got, expected)


WRONG = {
    "q": [(torch.zeros(2, 4, 16), ValueError), (None, TypeError)],
    "k": [(torch.zeros(2, 3, 9, 16), ValueError), (torch.zeros(2, 2, 9, 8), ValueError)],
    "v": [(torch.zeros(2, 2, 8, 16), ValueError), (torch.zeros(2, 2, 9, 16).half(), TypeError)],
    "lengths": [(torch.zeros(2), TypeError), (torch.zeros(3).int(), ValueError), (3, TypeError)],
    "index": [(torch.zeros(2, 4, 5).int(), ValueError), (torch.zeros(2, 2, 5), TypeError)],
    "page": [(0, ValueError), (1.5, TypeError)],
    "bias": [(torch.zeros(2, 2, 8), ValueError), (torch.zeros(2, 2, 9).int(), TypeError)],
    "sink_logit": [(torch.zeros(2), ValueError)],
    "scale": [("1", TypeError), (torch.tensor(1.0), TypeError)],
    "rows": [(0, ValueError)],
    "tile": [(True, TypeError)],
    "workers": [(-1, ValueError)],
    "order": [("reversed", ValueError)],
    "backend": [("cuda", ValueError)],
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, value, error) for name, cases in WRONG.items() for value, error in cases],
)
def test_wrong_arguments_are_named(name: str, value: Any, error: type[Exception]) -> None:
    q, k, v = draw(2, 4, 2, 1, 9, 16, 16)
    with pytest.raises(error, match=f"^{name}: got"):
        decode(**{"q": q, "k": k, "v": v, name: value})


def test_heads_are_at_most_256_wide() -> None:
    with pytest.raises(ValueError, match="q: got d 257"):
        decode(*draw(1, 1, 1, 1, 2, 257, 16))


def test_block_tables_are_checked() -> None:
    q, k, v = draw(2, 4, 2, 1, 9, 16, 16)
    with pytest.raises(ValueError, match="block_table: got"):
        decode(q, k, v, block_table=torch.zeros(3, 4).int())
    with pytest.raises(TypeError, match="block_table: got"):
        decode(q, k, v, block_table=torch.zeros(2, 4))


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("indirect", [True, False])
def test_every_configuration_fits_on_chip(arch: int, element_size: int, indirect: bool) -> None:
    for forced in CANDIDATES:
        for d in (16, 64, 128, 256):
            with use_config(forced):
                chosen = configs.config(arch, element_size, d, 512, indirect)
            buffers = chosen.stages // 2 if indirect else chosen.stages - 1
            held = (chosen.rows + 2 * max(buffers, 1) * chosen.tile) * d * element_size
            assert held <= configs.SHARED_BYTES.get(arch, 98304)
            assert chosen.tile >= 16


def test_exp_is_right_to_the_last_bits() -> None:
    x = np.concatenate([np.linspace(-87, 88, 20001), [0, -0.0]]).astype(np.float32)
    got = np.array([exp_f32(value) for value in x], np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(got - exact) / np.spacing(exact.astype(np.float32))) < 1.2
    edges = [exp_f32(np.float32(value)) for value in (-INF, -100, INF, NAN)]
    assert edges[:3] == [0, 0, INF]
    assert math.isnan(edges[3])


@pytest.mark.parametrize("order", ["natural", "paired"])
@pytest.mark.parametrize("M", [None, 1, 3])
def test_lean_attention_is_the_references(order: str, M: int | None) -> None:
    rng = np.random.default_rng(0)
    for case in range(8):
        q, k, v = (x.numpy().astype(np.float64) for x in draw(2, 4, 2, case + 1, 21, 8, 8))
        lengths, causal = rng.integers(0, 22, 2), bool(case % 2)
        N, G = int(rng.integers(1, 20)), int(rng.integers(1, 9))
        rest: Any = (N, G, None, causal, M, order)
        expected = spec.attend(q, k, v, lengths, *rest)
        tensors = (torch.tensor(x, dtype=torch.float32) for x in (q, k, v))
        out, lse = fast.attend(*tensors, torch.tensor(lengths), *rest)
        np.testing.assert_allclose(out.numpy(), expected[0], atol=2e-6)
        np.testing.assert_allclose(lse.numpy(), expected[1], atol=2e-6)


@pytest.mark.parametrize("order", ["natural", "paired"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_schedule_is_the_references(order: str, causal: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths, N, G = rng.integers(0, 40, 3), int(rng.integers(1, 9)), int(rng.integers(1, 9))
        rest: Any = (N, 2, 7, int(rng.integers(1, 8)), causal, order)
        n = spec.tiles_per_output(lengths, *rest)
        tiles = fast.tiles_per_output(torch.tensor(lengths), *rest)
        assert tiles.tolist() == n.tolist()
        stretches = spec.lean_schedule(n, G)
        start, end = fast.lean_schedule(tiles, G)
        assert [start.tolist(), end.tolist()] == [x.tolist() for x in stretches]
        assert fast.segments(tiles, start, end) == spec.segments(n, *stretches)
        assert fast.split_bound(tiles, G) == spec.split_bound(n, G)
        for rule in ("authors", "port"):
            assert fast.grid_size(tiles, G, rule) == spec.grid_size(n, G, rule)
        for u in range(len(n)):
            assert fast.helpers(tiles, start, end, u) == spec.helpers(n, *stretches, u)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_triples_are_the_references(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 16).to(dtype) for n in (5, 12, 12))
    mask = torch.rand(5, 12) < 0.5
    mask[0], mask[:, 3] = False, False
    v[3] = NAN
    arrays = [x.double().numpy() for x in (q, k, v)]
    parts = [fast.partial(q, k, v, lo, hi, None, mask) for lo, hi in ((0, 7), (7, 12), (0, 0))]
    expected = [
        spec.partial(*arrays, lo, hi, None, mask.numpy()) for lo, hi in ((0, 7), (7, 12), (0, 0))
    ]
    merged = fast.merge(fast.merge(*parts[:2]), parts[2])
    exact = spec.merge(spec.merge(*expected[:2]), expected[2])
    for got, want in zip(fast.finalize(*merged), spec.finalize(*exact), strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


@pytest.mark.parametrize("lengths", [[-1, 3], [3, 22]])
def test_lean_lengths_must_fit_the_cache(lengths: list[int]) -> None:
    q, k, v = draw(2, 4, 2, 1, 21, 8, 8)
    with pytest.raises(ValueError, match="lengths: got"):
        fast.attend(q, k, v, torch.tensor(lengths), 16, 2)
