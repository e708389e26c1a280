"""The flash operation as torch sees it: schema, compilation, gradients, refusals, and its users."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import attnspec.fast
from attnspec.fast.dense.attention import attend, attend_packed, init_state, step
from attnspec.fast.engines.flash import BlockLists, flash
from attnspec.fast.engines.flash.blocks import transposed, transposed_parts
from attnspec.fast.engines.merge import merge


def tensors(
    q_tokens: int, k_tokens: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2,
    d: int = 16, dv: int = 8, dtype: torch.dtype = torch.float64,
) -> list[Tensor]:  # fmt: skip
    """Random q, k and v that want gradients."""
    random = torch.Generator().manual_seed(q_tokens + 100 * k_tokens)
    shapes = [(heads, q_tokens, d), (kv_heads, k_tokens, d), (kv_heads, k_tokens, dv)]
    made = [torch.randn((batch, *shape), generator=random).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


def formula(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse by the definition, for bool `allowed` (..., q_tokens, k_tokens)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~allowed, -math.inf)
    if sink is not None:
        extra = sink[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return weights[..., : k.shape[2]] @ v, lse


def causal(q_tokens: int, k_tokens: int) -> Tensor:
    return torch.ones(q_tokens, k_tokens, dtype=torch.bool).tril(k_tokens - q_tokens)


@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(1, 1), (64, 64), (65, 63), (63, 65), (1, 130)])
def test_against_the_formula(q_tokens: int, k_tokens: int) -> None:
    given = tensors(q_tokens, k_tokens)
    results = [flash(*given, causal=True), formula(*given, causal(q_tokens, k_tokens))]
    upstream = torch.randn_like(results[0][0]), torch.rand_like(results[0][1])
    gradients = []
    for out, lse in results:
        used = lse.isfinite()
        total = (out * upstream[0])[used].sum() + (lse * upstream[1])[used].sum()
        gradients.append(torch.autograd.grad(total, given))
    for got, expected in zip(
        (*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True
    ):
        torch.testing.assert_close(got, expected.nan_to_num(0.0, neginf=-math.inf))


@pytest.mark.parametrize("started", [False, True])
def test_row_ends_against_the_formula(started: bool) -> None:
    """Ends before the first key and behind the last one count too, and some ranges are empty."""
    given = tensors(70, 130)
    ends = torch.cat([torch.tensor([-1, 0, 1]), torch.arange(67) * 2 + 4])
    starts = torch.cat([torch.zeros(40), torch.full((30,), 90)]).long() if started else None
    keys = torch.arange(130)
    allowed = keys < ends[:, None]
    if starts is not None:
        allowed &= keys >= starts[:, None]
    for got, expected in zip(
        flash(*given, row_end=ends, row_start=starts), formula(*given, allowed), strict=True
    ):
        torch.testing.assert_close(got, expected.nan_to_num(0.0, neginf=-math.inf))


def two_part_lists(q_tokens: int, k_tokens: int) -> tuple[BlockLists, Tensor, Tensor]:
    """Lists in two parts, and which pairs of tokens lie in blocks seen whole, and in the others."""
    random = torch.Generator().manual_seed(q_tokens)
    shape = (1, 4, -(-q_tokens // 32), -(-k_tokens // 16))
    kind = torch.randint(0, 3, shape, generator=random)
    kind[..., k_tokens // 16 :] = 1
    index = torch.argsort(torch.tensor([2, 1, 0])[kind], dim=-1, stable=True)
    counts = [(kind >= least).sum(-1, dtype=torch.int32) for least in (1, 2)]
    lists = BlockLists(index.int(), counts[0], 32, 16, counts[1])
    pairs = kind.repeat_interleave(32, 2).repeat_interleave(16, 3)[..., :q_tokens, :k_tokens]
    return lists, pairs == 2, pairs == 1


def test_blocks_seen_whole_against_the_formula() -> None:
    given = tensors(70, 75)
    lists, whole, part = two_part_lists(70, 75)
    starts = torch.arange(70) // 2
    ruled = causal(70, 75) & (torch.arange(75) >= starts[:, None])
    for got, expected in zip(
        flash(*given, blocks=lists, causal=True, row_start=starts),
        formula(*given, whole | (part & ruled)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected.nan_to_num(0.0, neginf=-math.inf))


def test_transposed_parts() -> None:
    lists, _, _ = two_part_lists(70, 75)
    assert lists.full is not None
    rows, count, full = transposed_parts(lists.index, lists.count, lists.full, 5)
    got = {
        (h, int(i), j, bool(n >= count[0, h, j] - full[0, h, j]))
        for h in range(4) for j in range(5) for n, i in enumerate(rows[0, h, j, : count[0, h, j]])
    }  # fmt: skip
    expected = {
        (h, i, int(j), n < int(lists.full[0, h, i]))
        for h in range(4) for i in range(3)
        for n, j in enumerate(lists.index[0, h, i, : lists.count[0, h, i]])
    }  # fmt: skip
    assert got == expected


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {"causal": True, "window": 3, "sinks": 2},
    "masks": {"key_mask": torch.rand(1, 9) > 0.3, "mask": torch.rand(1, 1, 7, 9) > 0.3},
    "row starts": {"row_start": torch.arange(7)},
    "row ends": {"row_end": torch.arange(7) // 2 + 3, "row_start": torch.arange(7) // 3},
    "blocks": {"blocks": BlockLists.from_mask(torch.rand(1, 4, 4, 3) > 0.4, 2, 4)},
    "packed": {"offsets": (torch.tensor([0, 3, 7]), torch.tensor([0, 4, 9])), "causal": True},
    "sink": {"sink_logit": torch.zeros(4, dtype=torch.float64, requires_grad=True)},
    "slopes": {"slopes": torch.ones(4), "slope_positions": torch.arange(7)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name: str) -> None:
    given = tensors(7, 9, d=4, dv=3)
    options = dict(OPTIONS[name])
    sink = options.pop("sink_logit", None)
    inputs = given if sink is None else [*given, sink]

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = flash(q, k, v, sink_logit=sink, **options)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck(name: str) -> None:
    options = dict(OPTIONS[name])
    blocks, offsets = options.pop("blocks", None), options.pop("offsets", (None, None))
    listed = (None, None, None, 0, 0) if blocks is None else (
        blocks.index, blocks.count, blocks.full, blocks.q_block, blocks.k_block
    )  # fmt: skip
    arguments = (
        *tensors(7, 9), 0.3, options.get("causal", False), options.get("window"),
        options.get("sinks", 0), options.get("row_start"), options.get("row_end"),
        options.get("key_mask"), options.get("mask"), *listed, *offsets,
        options.get("sink_logit"), options.get("slopes"), options.get("slope_positions"), "numba",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.attnspec.flash_forward.default, arguments)


def test_compiles_to_one_graph() -> None:
    given = tensors(9, 9, dtype=torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flash(q, k, v, causal=True, window=4)
        return out.sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*given), given)
    expected = torch.autograd.grad(loss(*given), given)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_second_derivative_is_refused() -> None:
    given = tensors(3, 3)
    first = torch.autograd.grad(flash(*given)[0].sum(), given, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(first[0].sum(), given)


@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(0, 4), (4, 0), (0, 0)])
def test_nothing_to_attend_to(q_tokens: int, k_tokens: int) -> None:
    given = tensors(q_tokens, k_tokens)
    out, lse = flash(*given, causal=True)
    assert torch.equal(out, torch.zeros(1, 4, q_tokens, 8, dtype=torch.float64))
    assert torch.equal(lse, torch.full((1, 4, q_tokens), -math.inf, dtype=torch.float64))
    assert all(not x.any() for x in torch.autograd.grad(out.sum(), given))
    sink = torch.arange(4.0, requires_grad=True)
    out, lse = flash(*given, sink_logit=sink)
    assert torch.equal(lse, sink.double()[None, :, None].expand(1, 4, q_tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in tensors(33, 33, dtype=dtype))
    out, lse = flash(q, k, v, causal=True)
    exact, exact_lse = formula(q.double(), k.double(), v.double(), causal(33, 33))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (out.double() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "q of three axes": (ValueError, "q: got shape", {"q": torch.zeros(4, 3, 16)}),
    "integer q": (TypeError, "q: got dtype", {"q": torch.zeros(1, 4, 3, 16).long()}),
    "d too large": (
        ValueError,
        "q: got d 257",
        {"q": torch.zeros(1, 4, 3, 257), "k": torch.zeros(1, 2, 5, 257)},
    ),
    "heads that do not divide": (ValueError, "k: got 2 kv heads", {"q": torch.zeros(1, 3, 3, 16)}),
    "causal 1": (TypeError, "causal: got 1", {"causal": 1}),
    "window 0": (ValueError, "window: got 0", {"window": 0, "causal": True}),
    "window without causal": (ValueError, "window: got 4", {"window": 4}),
    "negative sinks": (ValueError, "sinks: got -1", {"sinks": -1}),
    "short row_start": (ValueError, "row_start: got 2", {"row_start": torch.arange(2)}),
    "float row_start": (TypeError, "row_start: got dtype", {"row_start": torch.zeros(3)}),
    "float mask": (TypeError, "mask: got dtype", {"mask": torch.zeros(3, 5)}),
    "wide mask": (ValueError, "mask: got shape", {"mask": torch.ones(3, 6, dtype=torch.bool)}),
    "mask of five axes": (
        ValueError,
        "mask: got shape",
        {"mask": torch.ones(1, 1, 1, 3, 5, dtype=torch.bool)},
    ),
    "key_mask of another length": (
        ValueError,
        "key_mask: got 4",
        {"key_mask": torch.ones(1, 4, dtype=torch.bool)},
    ),
    "blocks of another grid": (
        ValueError,
        "blocks.index: got shape",
        {"blocks": BlockLists.from_mask(torch.ones(1, 4, 2, 1, dtype=torch.bool), 4, 8)},
    ),
    "blocks as a tensor": (TypeError, "blocks: got Tensor", {"blocks": torch.ones(1)}),
    "offsets as a tensor": (TypeError, "offsets: got Tensor", {"offsets": torch.ones(1)}),
    "offsets that stop short": (
        ValueError,
        "q_offsets: got",
        {"offsets": (torch.tensor([0, 2]), torch.tensor([0, 5]))},
    ),
    "offsets with a mask": (
        ValueError,
        "mask: got one together with offsets",
        {
            "offsets": (torch.tensor([0, 3]), torch.tensor([0, 5])),
            "mask": torch.ones(3, 5, dtype=torch.bool),
        },
    ),
    "one sink logit": (ValueError, "sink_logit: got 1", {"sink_logit": torch.zeros(1)}),
    "one slope": (ValueError, "slopes: got 1", {"slopes": torch.zeros(1)}),
    "positions without slopes": (
        ValueError,
        "slope_positions: got",
        {"slope_positions": torch.arange(3)},
    ),
    "a word for the scale": (TypeError, "scale: got 'one'", {"scale": "one"}),
    "an infinite scale": (ValueError, "scale: got inf", {"scale": math.inf}),
    "an unknown backend": (ValueError, "backend: got 'cuda'", {"backend": "cuda"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    error, message, wrong = REFUSED[name]
    good = {
        "q": torch.zeros(1, 4, 3, 16),
        "k": torch.zeros(1, 2, 5, 16),
        "v": torch.zeros(1, 2, 5, 8),
    }
    with pytest.raises(error, match=message):
        flash(**{**good, **wrong})


def test_block_lists() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    lists = BlockLists.from_mask(mask[None, None], 16, 32)
    assert lists.count[0, 0].tolist() == [2, 0, 3]
    assert lists.index[0, 0, 0, :2].tolist() == [0, 2]
    assert lists.index[0, 0, 2].tolist() == [0, 1, 2]
    index, count = transposed(lists.index, lists.count, 3)
    assert count[0, 0].tolist() == [2, 1, 2]
    assert index[0, 0, 0, :2].tolist() == [0, 2]


def test_merged_parts_are_the_whole() -> None:
    """Values and gradients; the keys are cut in three, and the middle part is hidden altogether."""
    given = tensors(20, 30)
    allowed = torch.rand(20, 30) > 0.5
    allowed[:, 10:17] = False
    whole = flash(*given, mask=allowed)
    q, k, v = given
    parts = [
        flash(q, k[:, :, cut], v[:, :, cut], mask=allowed[:, cut])
        for cut in (slice(0, 10), slice(10, 17), slice(17, 30))
    ]
    merged = merge(*merge(*parts[0], *parts[1]), *parts[2])
    upstream = [torch.randn_like(x) for x in whole]
    for x, y in zip(
        (*whole, *torch.autograd.grad(whole, given, upstream)),
        (*merged, *torch.autograd.grad(merged, given, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_merge_of_nothing() -> None:
    out = torch.zeros(2, 3, requires_grad=True)
    lse = torch.full((2,), -math.inf, requires_grad=True)
    merged, total = merge(out, lse, out, lse)
    assert torch.equal(merged, out)
    assert torch.equal(total, lse)
    gradients = torch.autograd.grad(merged.sum(), (out, lse))
    assert all(not x.any() for x in gradients)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.2}, {"attn_mask": torch.rand(2, 1, 9, 9) > 0.2}],
)
def test_scaled_dot_product_attention(options: dict[str, Any]) -> None:
    q, k, v = tensors(9, 9, batch=2, dtype=torch.float32)
    got = attnspec.fast.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    expected = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    torch.testing.assert_close(got, expected)


def test_scaled_dot_product_attention_without_a_batch() -> None:
    x = torch.randn(2, 7, 4)
    got = attnspec.fast.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(got, functional.scaled_dot_product_attention(x, x, x))


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (ValueError, "dropout_p: got 0.5", {"dropout_p": 0.5}),
        (TypeError, "attn_mask: got dtype", {"attn_mask": torch.zeros(3, 5)}),
        (ValueError, "is_causal: got True for 3 queries and 5 keys.*attend", {"is_causal": True}),
        (ValueError, "key: got 2 heads, expected 4", {"enable_gqa": False}),
        (
            ValueError,
            "attn_mask: got a mask",
            {"is_causal": True, "attn_mask": torch.ones(3, 5, dtype=torch.bool)},
        ),
    ],
)
def test_scaled_dot_product_attention_refuses(
    error: type[Exception], message: str, wrong: dict[str, Any]
) -> None:
    q, k, v = tensors(3, 5)
    options = {"enable_gqa": True, **wrong}
    with pytest.raises(error, match=message):
        attnspec.fast.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize("shape", [(2, 1, 1, 12), (1, 1, 1, 12), (2, 4, 12, 12), (12,), (12, 1)])
def test_attend_takes_any_mask(shape: tuple[int, ...]) -> None:
    given = tensors(12, 12, batch=2)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    out, lse = attend(*given, causal=True, mask=mask)
    exact, exact_lse = formula(*given, causal(12, 12) & mask)
    torch.testing.assert_close(out, exact.nan_to_num(0.0))
    torch.testing.assert_close(lse, exact_lse)


def test_packing_and_steps() -> None:
    q, k, v = (x.detach() for x in tensors(12, 12))
    whole, _ = attend(q, k, v, causal=True)
    ends = torch.tensor([0, 5, 12])
    packed, _ = attend_packed(q[0], k[0], v[0], ends, ends, causal=True)
    torch.testing.assert_close(packed[:, :5], whole[0, :, :5])
    alone, _ = attend(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], causal=True)
    torch.testing.assert_close(packed[:, 5:], alone[0])
    state, outputs = init_state(k, v), []
    for first, last in ((0, 1), (1, 2), (2, 9), (9, 12)):
        out, state = step(state, *(x[:, :, first:last] for x in (q, k, v)))
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    assert torch.equal(state.k, k)
