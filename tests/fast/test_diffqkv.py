"""DiffQKV attention: heads moved into the batch are repeated heads, and steps choose as rows do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.dense import attention as dense
from attnspec.fast.heads import diffqkv

HEADS = ((12, 4, 6), (12, 3, 6), (8, 1, 8), (6, 6, 2), (4, 4, 4), (4, 1, 1))


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tensors(heads: tuple[int, int, int], tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    Hq, Hk, Hv = heads
    return draw(2, Hq, tokens, 8), draw(2, Hk, keys, 8), draw(2, Hv, keys, 5)


def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[3] ** 0.5
    if causal:
        seen = torch.ones(s.shape[2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        s = s.masked_fill(~seen, -torch.inf)
    return s.softmax(-1)


def combine(P: Tensor, v: Tensor) -> Tensor:
    return P @ v.repeat_interleave(P.shape[1] // v.shape[1], 1)


def heaviest(P: Tensor, c: int, renormalise: bool) -> Tensor:
    """P with all but the c largest of each row set to 0."""
    places = P.topk(min(c, P.shape[-1]), -1).indices
    kept = torch.zeros_like(P).scatter(-1, places, P.gather(-1, places))
    return kept / kept.sum(-1, keepdim=True) if renormalise else kept


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_heads_in_the_batch_are_repeated_heads(
    heads: tuple[int, int, int], causal: bool, tokens_first: bool
) -> None:
    given = tensors(heads, 9, 20)
    if tokens_first:
        given = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in given)
    q, k, v = (x.requires_grad_() for x in given)
    out, lse = diffqkv.diffqkv_attend(q, k, v, causal=causal)
    expected = combine(weights(q, k, causal), v)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
    assert lse.shape == out.shape[:3]
    dout = draw(*out.shape)
    for got, truth in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, truth, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("c", [None, 1, 4, 100])
@pytest.mark.parametrize("renormalise", [True, False])
def test_steps_choose_among_all_keys(tokens: int, c: int | None, renormalise: bool) -> None:
    q, k, v = tensors((12, 4, 6), 30, 30)
    past = 30 - tokens
    state = dense.State(k[:, :, :past], v[:, :, :past])
    new = (x[:, :, past:] for x in (q, k, v))
    out, state = diffqkv.step(state, *new, c=c, renormalise=renormalise)
    P = weights(q[:, :, past:], k, True)
    P = P if c is None else heaviest(P, c, renormalise)
    torch.testing.assert_close(out, combine(P, v))
    torch.testing.assert_close(state.k, k)
    torch.testing.assert_close(state.v, v)


def test_what_is_not_chosen_is_not_read() -> None:
    q, k, v = tensors((6, 2, 3), 2, 30)
    _, hv = diffqkv.head_maps(6, 2, 3)
    P = weights(q, k, False)
    idx, kept = diffqkv.select_values(P, 4)
    torch.testing.assert_close(kept, heaviest(P, 4, False).sum(-1))
    union = diffqkv.union_indices(idx, hv)
    poisoned = torch.full_like(v, torch.nan)
    for b, entry in enumerate(union):
        assert len(entry) == 3
        for g, keys in enumerate(entry):
            assert keys.tolist() == sorted(set(idx[b, 2 * g : 2 * g + 2].flatten().tolist()))
            poisoned[b, g, keys] = v[b, g, keys]
    expected = combine(heaviest(P, 4, False), v)
    torch.testing.assert_close(diffqkv.attend_selected(P, idx, poisoned, hv), expected)
    torch.testing.assert_close(diffqkv.selective_attend(q, k, poisoned, 4), expected)


@pytest.mark.parametrize("hv", [[0, 0, 1, 1, 2, 2], [2, 0, 2, 1, 0, 0]])
@pytest.mark.parametrize("causal", [True, False])
def test_the_steps_put_together_are_attention(causal: bool, hv: list[int]) -> None:
    """With maps of any order: those of attention are brought into it by ordering the heads."""
    q, k, v = (x.requires_grad_() for x in tensors((6, 2, 3), 5, 9))
    hk, values = torch.tensor([1, 0, 0, 1, 1, 0]), torch.tensor(hv, dtype=torch.int32)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4) if causal else None
    P, lse = diffqkv.softmax_rows(diffqkv.scores(q, k, hk, scale=0.5), mask)
    out = diffqkv.attend(P, v, values)
    expected, norms = diffqkv.diffqkv_attend(
        q, k[:, hk], v[:, values.long()], causal=causal, scale=0.5
    )
    torch.testing.assert_close((out, lse), (expected, norms))
    dout, arguments = draw(*out.shape), (q, k, v)
    for got, truth in zip(
        torch.autograd.grad(out, arguments, dout), torch.autograd.grad(expected, arguments, dout),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, truth)


def test_hidden_scores_and_rows_that_see_nothing() -> None:
    s = draw(2, 3, 4, 5).requires_grad_()
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[0, 0, 1], mask[1, 0, :, 2] = False, False
    hidden = torch.where(mask, s, torch.nan)
    P, lse = diffqkv.softmax_rows(hidden, mask)
    assert (P[0, :, 1] == 0).all()
    assert lse[0, :, 1].isneginf().all()
    torch.testing.assert_close(P, torch.where(mask, (s - lse[..., None]).exp(), 0.0))
    (ds,) = torch.autograd.grad((P * P).sum() + lse[1].sum(), s)
    assert ds.isfinite().all()
    assert (ds[~mask.expand_as(ds)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_float32_meet_values_of_16_bits(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors((6, 2, 3), 5, 9))
    hk, hv = diffqkv.head_maps(6, 2, 3)
    s = diffqkv.scores(q, k, hk)
    P, lse = diffqkv.softmax_rows(s)
    assert s.dtype == P.dtype == lse.dtype == torch.float32
    out = diffqkv.attend(P, v, hv)
    assert out.dtype == dtype
    wide = (x.double() for x in (q, k, v))
    torch.testing.assert_close(out, diffqkv.diffqkv_attend(*wide)[0].to(dtype))
    assert diffqkv.softmax_rows(s.to(dtype))[0].dtype == dtype


X = torch.zeros(1, 4, 3, 2)
P0, IDX, MAP = torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 1, dtype=torch.int64), torch.arange(4)
FULL = dense.State(X, X)
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (diffqkv.head_maps, (12, 5, 6), {}, ValueError, "Hk"),
    (diffqkv.contract_query, (X, torch.zeros(4, 3, 2)), {}, ValueError, "E"),
    (diffqkv.diffqkv_attend, (X, X[:, :3], X), {}, ValueError, "k"),
    (diffqkv.diffqkv_attend, (X, X, X[:, :3]), {}, ValueError, "v"),
    (diffqkv.diffqkv_attend, (X, X, X), {"causal": 1}, TypeError, "causal"),
    (diffqkv.diffqkv_attend, (X, X, X), {"key_mask": MAP[None] > 0}, ValueError, "key_mask"),
    (diffqkv.diffqkv_attend, (X, X, X), {"backend": "cuda"}, ValueError, "backend"),
    (diffqkv.scores, (X, X[:, :2], MAP), {}, ValueError, "hk"),
    (diffqkv.scores, (X, X, MAP.float()), {}, TypeError, "hk"),
    (diffqkv.scores, (X, X[..., :1], MAP), {}, ValueError, "k"),
    (diffqkv.scores, (X, X, MAP), {"scale": "1"}, TypeError, "scale"),
    (diffqkv.softmax_rows, (P0, P0), {}, TypeError, "mask"),
    (diffqkv.softmax_rows, (P0, P0[..., :2] > 0), {}, ValueError, "mask"),
    (diffqkv.softmax_rows, (P0, (P0 > 0).to("meta")), {}, ValueError, "mask"),
    (diffqkv.attend, (P0.half(), X, MAP), {}, TypeError, "v"),
    (diffqkv.attend, (P0, X.double(), MAP), {}, TypeError, "v"),
    (diffqkv.attend, (P0, X[:, :, :2], MAP), {}, ValueError, "v"),
    (diffqkv.attend, (P0, X, MAP - 1), {}, ValueError, "hv"),
    (diffqkv.select_values, (P0, 0), {}, ValueError, "c"),
    (diffqkv.attend_selected, (P0, IDX + 3, X, MAP), {}, ValueError, "idx"),
    (diffqkv.attend_selected, (P0, IDX, X, MAP + 1), {}, ValueError, "hv"),
    (diffqkv.attend_selected, (P0, IDX, X, MAP[:2]), {}, ValueError, "hv"),
    (diffqkv.selective_attend, (X, X, X, 1.5), {}, TypeError, "c"),
    (diffqkv.union_indices, (IDX, MAP - 1), {}, ValueError, "hv"),
    (diffqkv.cache_bytes, (4, 0, 1, 1, 1, 1), {}, ValueError, "dk"),
    (diffqkv.step, (FULL, X, X, X), {"c": 0}, ValueError, "c"),
    (diffqkv.step, (FULL, X, X[:, :, :1], X[:, :, :1]), {}, ValueError, "k"),
    (diffqkv.step, (dense.State(X[:, :2], X), X, X, X), {}, ValueError, "state.k"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)
