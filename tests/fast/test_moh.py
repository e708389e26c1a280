"""Mixture-of-Head attention: packed rows against masked attention, in every way q may lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.dense import attention as dense
from attnspec.fast.engines.flash import flash
from attnspec.fast.heads import moh

SHAPES = ((4, 4, 70, 70), (6, 2, 65, 130), (4, 1, 40, 17), (3, 3, 1, 64))


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def formula(q: Tensor, k: Tensor, v: Tensor, active: Tensor, causal: bool) -> Tensor:
    """All rows, softmax and all; inactive ones are left out by `where`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT / q.shape[3] ** 0.5
    if causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        empty = ~seen.any(1, keepdim=True)
        scores = torch.where(empty, 0.0, scores.masked_fill(~seen & ~empty, -torch.inf))
        v = torch.where(seen.any(), v, 0.0)
        return torch.where(active.mT[..., None] & ~empty, scores.softmax(-1) @ v, 0.0)
    return torch.where(active.mT[..., None], scores.softmax(-1) @ v, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lies", ["heads first", "tokens first", "strided"])
def test_packed_rows_are_masked_rows(
    shape: tuple[int, int, int, int], causal: bool, lies: str
) -> None:
    heads, kv_heads, tokens, keys = shape
    q, k, v = draw(2, heads, tokens, 8), draw(2, kv_heads, keys, 8), draw(2, kv_heads, keys, 5)
    if lies == "tokens first":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    elif lies == "strided":
        q, v = (torch.cat([x, x], -1)[..., : x.shape[-1]] for x in (q, v))
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    active = draw(2, tokens, heads) > 0
    active[:, :, 0] = False
    out = moh.head_outputs(*given, active, causal=causal)
    expected = formula(*given, active, causal)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
    dout = draw(*out.shape)
    for got, truth in zip(
        torch.autograd.grad(out, given, dout), torch.autograd.grad(expected, given, dout),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, truth, atol=1e-12, rtol=1e-10)


def test_the_projection_reads_the_heads_without_a_copy() -> None:
    q, active = draw(2, 4, 9, 8), torch.ones(2, 9, 4, dtype=torch.bool)
    h = moh.head_outputs(q, q, q, active)
    assert h.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(h, moh.head_outputs(q, q, q))


@pytest.mark.parametrize("causal", [True, False])
def test_only_active_rows_meet_keys(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed sequences hold (hs + k) / H of all rows; the one behind them has no keys."""
    calls: list[tuple[Tensor, Tensor]] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options["offsets"])
        return flash(*args, **options)

    monkeypatch.setattr(moh, "flash", counted)
    q, k, v = draw(2, 6, 20, 8), draw(2, 3, 25, 8), draw(2, 3, 25, 5)
    active = moh.norm_router(q, 2, 1) != 0
    moh.head_outputs(q, k, v, active, causal=causal)
    ((rows, keys),) = calls
    rows, keys = rows.diff(), keys.diff()
    assert keys.tolist() == [25] * 6 + [0]
    assert rows[:-1].sum() == active.sum() == 2 * 20 * 3
    of_group = active.unflatten(2, (3, 2)).sum((1, 3))
    torch.testing.assert_close(rows[:-1], of_group.flatten())


def test_groups_that_are_switched_off() -> None:
    x, Wr, Ws, W0 = draw(2, 7, 4), draw(5, 4), draw(3, 4), draw(2, 4)
    p = moh.routed_probs(x, Wr)
    routed = moh.routed_gates(p, moh.topk_mask(p, 2), 2)
    same = torch.testing.assert_close
    same(moh.route(x, Wr, None, None, 2), routed)
    same(moh.route(x, None, Ws, None, 0), moh.shared_gates(x, Ws))
    first = moh.route(x, Wr, Ws, None, 0)
    same(first, torch.cat([moh.shared_gates(x, Ws), torch.zeros_like(p)], -1))
    same(moh.route(x, Wr, None, W0, 2), moh.route(x, Wr, Ws[:1], W0, 2))
    same(moh.route(x, None, None, W0, 0), torch.ones_like(p[..., :1]))
    same(moh.combine_gates(None, routed, p[..., :2]), routed)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_steps_skip_heads_and_cache_all(tokens: int) -> None:
    q, k, v = (draw(2, heads, 30, 8) for heads in (6, 3, 3))
    active = draw(2, 30, 6) > 0
    active[:, -tokens:, :2] = False
    past = 30 - tokens
    state = dense.State(k[:, :, :past], v[:, :, :past])
    new = [x[:, :, past:] for x in (q, k, v)]
    h, state = moh.step(state, *new, active[:, past:])
    expected = moh.head_outputs(q, k, v, active, causal=True)[:, :, past:]
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(state.v, v)


BAD: tuple[tuple[dict[str, Any], type, str], ...] = (
    ({"active": torch.ones(1, 4, 3, dtype=torch.bool)}, ValueError, "active"),
    ({"active": torch.ones(1, 3, 4)}, TypeError, "active"),
    ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "key_mask"),
    ({"causal": 1, "active": torch.ones(1, 3, 4, dtype=torch.bool)}, TypeError, "causal"),
    ({"backend": "cuda"}, ValueError, "backend"),
)


@pytest.mark.parametrize(("options", "error", "name"), BAD)
def test_bad_input_is_named(options: dict[str, Any], error: type, name: str) -> None:
    q = torch.zeros(1, 4, 3, 2)
    with pytest.raises(error, match=f"^{name}: got"):
        moh.head_outputs(q, q, q, **options)


X, W = torch.zeros(1, 3, 4), torch.zeros(5, 4)
BAD_ROUTES: tuple[tuple[Any, tuple[Any, ...], str], ...] = (
    (moh.route, (X, None, W, None, 1), "k"),
    (moh.route, (X, W, None, None, 0), "k"),
    (moh.route, (X, W, W, None, 1), "W0"),
    (moh.combine_gates, (None, None), "gs"),
    (moh.norm_router, (X[None], 0, 0), "k"),
    (moh.norm_router, (X[None], 1, 0), "hs"),
    (moh.topk_mask, (X, 5), "k"),
)


@pytest.mark.parametrize(("function", "args", "name"), BAD_ROUTES)
def test_bad_routes_are_named(function: Any, args: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        function(*args)
