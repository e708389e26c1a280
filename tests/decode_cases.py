"""Cases of the decode engine that every backend runs, against a plain softmax in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnspec.fast.engines.decode import decode

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INF, NAN = math.inf, math.nan


class Case(NamedTuple):
    """A call, and the keys bool (batch, kv_heads, tokens) that it must not read."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    unread: Tensor | None = None


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    causal: bool = True,
    index: Tensor | None = None,
    counts: Tensor | None = None,
    page: int = 1,
    block_table: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logit: Tensor | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Row by row from the definition; keywords about how the work is split change nothing."""
    if block_table is not None:
        pages = block_table.long().clamp(0)
        k, v = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k, v))
    batch, heads, q_tokens, d = q.shape
    kv_heads, room = k.shape[1:3]
    v_group = heads // v.shape[1]
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
            if counts is not None:
                listed = torch.arange(len(entries))[:, None] < counts[b, head]
                entries = torch.where(listed, entries, -1)
            keys = torch.where(entries < 0, room, entries * page + torch.arange(page)).reshape(-1)
        extra = torch.zeros(len(keys)) if bias is None else bias[b, head]
        seen = (keys < length) & (extra > -INF)
        if causal:
            seen &= keys <= i + length - q_tokens
        x = k[b, head, keys[seen]].double() @ q[b, h, i].double() / math.sqrt(d)
        x += extra[seen].double()
        sink = torch.zeros(0) if sink_logit is None else sink_logit[h : h + 1]
        lse[b, h, i] = torch.cat([x, sink.double()]).logsumexp(0)
        out[b, h, i] = torch.exp(x - lse[b, h, i]) @ v[b, h // v_group, keys[seen]].double()
    return out, lse


def draw(batch: int, heads: int, kv_heads: int, queries: int, keys: int, d: int, dv: int) -> Any:
    torch.manual_seed(0)
    shapes = (batch, heads, queries, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, dv)
    return tuple(torch.randn(shape) for shape in shapes)


def contiguous(*sizes: int, **options: Any) -> Case:
    return Case(*draw(*sizes), options)


def ragged(*lengths: int, heads: bool = False, sink: bool = False, **options: Any) -> Case:
    """A batch of these lengths; with `heads`, of these for (batch, kv head)."""
    n = torch.tensor(lengths, dtype=torch.int32)
    n = n.view(-1, 2) if heads else n
    q, k, v = draw(len(n), 4, 2, 2, 40, 16, 16)
    unread = torch.arange(40) >= (n if heads else n[:, None].expand(-1, 2))[..., None]
    if sink:
        options["sink_logit"] = torch.randn(4)
    return Case(q, k, v, {"lengths": n, **options}, unread)


def gathered(
    page: int, with_bias: bool = False, counts: Sequence[int] | None = None, **how: Any
) -> Case:
    """Unsorted pages, -1 among them, some beyond the length; one list chooses nothing."""
    q, k, v = draw(2, 4, 2, 2, 128, 16, 16)
    entries = min(11, 128 // page)
    index = torch.stack([torch.randperm(128 // page)[:entries] for _ in range(4)])
    index = index.view(2, 2, entries).int()
    index[0, 0, entries // 3] = -1
    index[1, 1] = -1
    options = {"index": index, "page": page, "lengths": torch.tensor([50, 127])}
    options |= {"workers": 3, **how}
    if with_bias:
        options["bias"] = torch.randn(2, 2, entries * page)
        options["bias"][0, 1, 2] = -INF
    unread = torch.ones(2, 2, 128, dtype=torch.bool)
    if counts is not None:
        options["counts"] = torch.tensor(counts).view(2, 2)
    for b, head in np.ndindex(2, 2):
        end = None if counts is None else max(counts[2 * b + head], 0)
        for entry in index[b, head, :end].tolist():
            unread[b, head, entry * page : (entry + 1) * page] &= entry < 0
    return Case(q, k, v, options, unread)


def paged(page: int = 0) -> Case:
    """A pool of pages of 8 tokens; with `page`, a list of pages of that many is read from it."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 20, 8, 2, 16).transpose(2, 3)
    table = torch.randperm(20)[:16].view(2, 8).int()
    table[0, 2:] = -1
    options: dict[str, Any] = {"lengths": torch.tensor([13, 61]), "workers": 3}
    if page:
        options |= {"index": torch.randint(0, 60 // page, (2, 2, 6)), "page": page}
    return Case(torch.randn(2, 4, 2, 16), k, v, {"block_table": table, **options})


def fused() -> Case:
    """q, k and v as slices of one projection; q's channels lie apart."""
    torch.manual_seed(0)
    x = torch.randn(1, 50, 3, 2, 16)
    q = torch.randn(1, 2, 16, 1).transpose(2, 3)
    return Case(q, x[:, :, 1].transpose(1, 2), x[:, :, 2].transpose(1, 2), {})


def transposed() -> Case:
    """Keys column by column, one value shared by all tokens at an odd address, strided lists."""
    torch.manual_seed(0)
    k, v = torch.randn(1, 2, 16, 50).mT, torch.randn(17)[1:].expand(1, 2, 50, 16)
    index = torch.randint(0, 50, (1, 1, 2, 9)).expand(1, 2, 2, 9)[:, :, 0]
    return Case(torch.randn(1, 2, 1, 16), k, v, {"index": index, "workers": 2})


def expanded() -> Case:
    """Values that are one number a token, a length at an odd address."""
    q, k, v = draw(1, 2, 2, 1, 50, 16, 1)
    lengths = torch.tensor([9, 50])[1:]
    return Case(
        q, k, v.expand(1, 2, 50, 16), {"lengths": lengths, "sink_logit": torch.ones(1)[[0, 0]]}
    )


def several_values(keys: int = 90, *lengths: int, **how: Any) -> Case:
    """Two value heads a key head, each of which serves two query heads."""
    q, k, v = draw(2, 8, 4, 3, keys, 16, 24)
    options = {"lengths": torch.tensor(lengths)} if lengths else {}
    return Case(q, k[:, ::2], v, {**options, **how})


def paged_values() -> Case:
    q, k, v, options, _ = paged(4)
    return Case(q.repeat(1, 2, 1, 1), k[:, :1], v, {**options, "index": options["index"][:, :1]})


def left_padded() -> Case:
    q, k, v = draw(1, 4, 2, 1, 50, 16, 16)
    hidden = torch.arange(50) < 7
    bias = torch.zeros(1, 1, 50).masked_fill(hidden, -INF).expand(1, 2, 50)
    return Case(q, k, v, {"bias": bias, "workers": 2}, hidden.expand(1, 2, 50))


CASES: dict[str, Callable[[], Case]] = {
    "one token": partial(contiguous, 1, 4, 2, 1, 70, 16, 16),
    "heads of 64": partial(contiguous, 1, 4, 2, 1, 130, 64, 64),
    "heads of 80 and 24": partial(contiguous, 2, 4, 1, 1, 65, 80, 24, workers=5),
    "odd heads": partial(contiguous, 1, 2, 1, 6, 4, 5, 7),
    "one of everything": partial(contiguous, 2, 2, 1, 1, 1, 1, 1),
    "many workers": partial(contiguous, 1, 1, 1, 1, 300, 16, 16, workers=19),
    "more workers than tiles": partial(contiguous, 1, 2, 1, 3, 33, 16, 16, workers=50),
    "several tokens": partial(contiguous, 1, 4, 2, 9, 40, 20, 16, workers=7, rows=5),
    "paired": partial(contiguous, 1, 4, 2, 9, 40, 20, 16, workers=7, rows=5, order="paired"),
    "more queries than keys": partial(contiguous, 1, 2, 1, 6, 4, 16, 16, rows=3),
    "not causal": partial(contiguous, 1, 2, 1, 4, 33, 16, 16, causal=False, workers=2),
    "a prompt": partial(contiguous, 1, 2, 1, 20, 20, 16, 16, rows=2, workers=9),
    "no keys": partial(contiguous, 1, 2, 1, 2, 0, 16, 16),
    "no queries": partial(contiguous, 1, 2, 1, 0, 5, 16, 16),
    "no batch": partial(contiguous, 0, 2, 1, 1, 5, 16, 16),
    "ragged": partial(ragged, 5, 0, 33, 40),
    "ragged, three workers": partial(ragged, 5, 0, 33, 40, workers=3, sink=True),
    "all empty": partial(ragged, 0, 0, 0, 0, sink=True),
    "mostly empty": partial(ragged, 0, 17, 1, 0, workers=5),
    "lengths beyond the cache": partial(ragged, 99, 40, 3, 2, workers=1),
    "one length": partial(ragged, 33, workers=5),
    "lengths of each head": partial(ragged, 5, 0, 33, 40, heads=True, workers=3, rows=3),
    **{f"gathered, pages of {n}": partial(gathered, n) for n in (1, 4, 16, 64)},
    "gathered, with bias": partial(gathered, 4, with_bias=True),
    "counted": partial(gathered, 4, counts=(7, 0, 11, 11)),
    "counted, with bias": partial(gathered, 16, with_bias=True, counts=(1, 8, 0, 3)),
    "counts beyond the list": partial(gathered, 1, counts=(-3, 99, 4, 2), rows=3, workers=7),
    "paged": paged,
    "paged and gathered": partial(paged, 4),
    "fused": fused,
    "transposed": transposed,
    "expanded": expanded,
    "left padded": left_padded,
    "several value heads": partial(several_values, workers=3, rows=5),
    "several value heads, ragged": partial(several_values, 70, 33, 70, workers=7),
    "several value heads of a pool": paged_values,
}


def arguments(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Case, Any]:
    """The case in `dtype` on `device`, NaN in what is not to be read, and what it should give."""
    case = CASES[name]()
    q, k, v = (x.to(dtype) if x.dtype == torch.float32 else x for x in case[:3])
    expected = plain(q, k, v, **case.options)
    if case.unread is not None:
        k[case.unread], v[case.unread] = NAN, INF
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in case.options.items()}
    return Case(*(x.to(device) for x in (q, k, v)), options), expected


def compare(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: Any) -> None:
    out, lse = got
    assert out.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double().cpu(), expected[0], atol=tolerance, rtol=tolerance)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert lse.dtype == exact
    torch.testing.assert_close(lse.cpu(), expected[1].to(exact), atol=5e-6, rtol=1e-6)


def check_values_apart(dtype: torch.dtype, device: str = "cpu", **how: Any) -> None:
    """What is not finite in a value head reaches its own query heads alone."""
    q, k, v = (x.to(dtype) for x in several_values()[:3])
    expected = plain(q, k, v)
    v[:, 2, :40] = NAN
    v[:, 3, 5, 7] = INF
    q, k, v = (x.to(device) for x in (q, k, v))
    out, lse = decode(q, k, v, workers=3, **how)
    assert out[:, 4:6].isnan().all()
    assert out[:, 6:, :, 7].isinf().all()
    out[:, 4:6], out[:, 6:, :, 7] = 0, 0
    expected[0][:, 4:6], expected[0][:, 6:, :, 7] = 0, 0
    compare((out, lse), expected, dtype)


def check(name: str, dtype: torch.dtype, device: str = "cpu", **how: Any) -> None:
    """decode gives on `device` what it should; `how` holds where the case leaves it open."""
    (q, k, v, options, _), expected = arguments(name, dtype, device)
    compare(decode(q, k, v, **{**how, **options}), expected, dtype)
