"""The decode engine and lean attention on the CPU, against a plain softmax in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attnspec.fast import backend
from attnspec.fast.engines.decode import CANDIDATES, configs, decode, use_config
from attnspec.fast.engines.numba_math import exp_f32
from attnspec.fast.parallel import lean_attention as fast
from attnspec.reference.parallel import lean_attention as spec
from tests.decode_cases import (
    CASES,
    INF,
    NAN,
    TOLERANCE,
    check,
    check_values_apart,
    compare,
    draw,
    plain,
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.mark.parametrize("order", ["natural", "paired"])
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("split", [{"tile": 1}, {"tile": 16, "rows": 5}, {"tile": 999, "rows": 1}])
def test_how_the_work_is_split_changes_nothing(
    order: str, workers: int, split: dict[str, int]
) -> None:
    q, k, v = draw(2, 4, 2, 7, 41, 16, 8)
    lengths = torch.tensor([41, 12], dtype=torch.int32)
    expected = plain(q, k, v, lengths=lengths)
    got = decode(q, k, v, lengths=lengths, order=order, workers=workers, **split)
    compare(got, expected, torch.float32)


def test_the_same_token_twice_counts_twice() -> None:
    q, k, v = draw(1, 2, 1, 1, 8, 16, 16)
    _, once = decode(q, k, v, index=torch.tensor([[[3]]]))
    _, twice = decode(q, k, v, index=torch.tensor([[[3, 3]]]))
    torch.testing.assert_close(twice - once, torch.full_like(once, math.log(2)))


def test_values_of_one_key_head_do_not_meet() -> None:
    check_values_apart(torch.float32)


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


def test_twenty_calls_give_the_same_bits_and_launch() -> None:
    q, k, v = draw(2, 4, 2, 1, 200, 16, 16)
    before = backend.launch_count()
    first = decode(q, k, v, workers=5)
    assert backend.launch_count() > before
    for _ in range(20):
        again = decode(q, k, v, workers=5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_known_kind_of_call_is_still_checked() -> None:
    q, k, v = draw(2, 4, 2, 1, 9, 16, 16)
    bias = torch.zeros(2, 2, 9)
    for _ in range(2):
        decode(q, k, v, bias=bias, page=1, scale=1.0)
    for wrong in ({"page": True}, {"scale": True}, {"scale": [1.0]}, {"page": 1.0}):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))}: got"):
            decode(q, k, v, bias=bias, **{"page": 1, "scale": 1.0, **wrong})
    for name, call in {
        "v": (q, k, v[:, :, :8]),
        "k": (q, k[:1], v),
        "bias": (q, k[:, :, :8], v[:, :, :8]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: got"):
            decode(*call, bias=bias, page=1, scale=1.0)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracers_see_the_custom_op() -> None:
    q, k, v = draw(2, 4, 2, 1, 9, 16, 16)
    decode(q, k, v)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        for out in (*decode(q, k, v), *decode(*fakes)):
            assert isinstance(out, FakeTensor)
    assert "attnspec.decode" in make_fx(lambda *x: decode(*x))(q, k, v).code


def test_decode_has_no_gradient() -> None:
    q, k, v = draw(1, 2, 1, 1, 9, 16, 16)
    out, _ = decode(q.requires_grad_(), k, v)
    with pytest.raises(NotImplementedError, match=r"attnspec\.fast\.attention"):
        out.sum().backward()


def test_the_custom_op_is_well_formed() -> None:
    q, k, v = draw(2, 4, 2, 1, 20, 16, 8)
    lengths = torch.tensor([3, 20])
    options = (0.25, True, 1, 0, 0, 0, False, "numba")
    for rest in ((lengths, None, None, None, None, None), (None,) * 6):
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
    "v": [
        (torch.zeros(2, 3, 9, 16), ValueError),
        (torch.zeros(2, 2, 8, 16), ValueError),
        (torch.zeros(2, 2, 9, 16).half(), TypeError),
    ],
    "lengths": [(torch.zeros(2), TypeError), (torch.zeros(3).int(), ValueError), (3, TypeError)],
    "index": [(torch.zeros(2, 4, 5).int(), ValueError), (torch.zeros(2, 2, 5), TypeError)],
    "counts": [(torch.zeros(2, 2).int(), ValueError), (torch.zeros(2, 2), TypeError)],
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


def test_there_is_a_count_for_each_list() -> None:
    q, k, v = draw(2, 4, 2, 1, 9, 16, 16)
    index = torch.zeros(2, 2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^counts: got shape \(2, 4\), expected \(2, 2\)"):
        decode(q, k, v, index=index, counts=torch.zeros(2, 4).int())


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


def test_quick_memory_has_two_workers_of_few_rows() -> None:
    slow, quick = (
        configs.config(90, 2, 128, 4, False, bandwidth=bandwidth) for bandwidth in (25e9, 37e9)
    )
    assert (slow.workers, quick.workers) == (1, 2)
    for d, packed, indirect in ((64, 4, False), (128, 64, False), (128, 4, True)):
        choices = {
            configs.config(90, 2, d, packed, indirect, bandwidth=bandwidth)
            for bandwidth in (0.0, 37e9)
        }
        assert len(choices) == 1


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
