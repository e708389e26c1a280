"""Mixture-of-Head attention: packed rows against masked attention, in every way q may lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.dense import attention as dense
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
