"""Where tokens stand and how they are moved, in the interpreter, against plain Python."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines import select
from attnspec.fast.engines.select import triton_places

BACKENDS = ("triton", "numba")


def expected_places(flags: list[bool], positions: list[int], rows: int, ahead: bool) -> list[Any]:
    tokens = range(len(flags))
    order = sorted(tokens, key=lambda i: (ahead and not flags[i], positions[i], i))
    kinds = sorted(tokens, key=lambda i: not flags[i])
    own = kinds[len(kinds) - rows :]
    place = [order.index(i) for i in tokens]
    row_order = sorted(range(rows), key=lambda r: place[own[r]])
    return [
        order,
        place,
        [positions[i] for i in order],
        row_order,
        [row_order.index(r) for r in range(rows)],
        [place[own[r]] + 1 for r in row_order],
        [positions[own[r]] for r in row_order],
    ]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 6, 35])
def test_places(n: int, backend: str, ahead: bool) -> None:
    """Of flagged tokens and of two parts; strided, of both integer dtypes, far and below 0."""
    torch.manual_seed(n)
    flags = (torch.rand(2 * n) < 0.4)[::2]
    positions = (torch.randperm(3 * n)[:n] - n) * (1 << 33)
    text = n - int(flags.sum())
    for rows in {0, text // 2, text, min(n, text + 1)}:
        got = select.places(flags, positions, rows=rows, ahead=ahead, backend=backend)
        expected = expected_places(flags.tolist(), positions.tolist(), rows, ahead)
        assert [x.tolist() for x in got] == expected
        got = select.places(flags, None, rows=rows, ahead=ahead, backend=backend)
        expected = expected_places(flags.tolist(), list(range(n)), rows, ahead)
        assert [x.tolist() for x in got] == expected
    every = torch.randperm(2 * n)
    first, second = every[: n // 3], every.to(torch.int32)[n // 3 : n]
    joined = [*first.tolist(), *second.tolist()]
    kinds = [i < len(first) for i in range(n)]
    rows = len(second)
    got = select.places(None, first, second, rows=rows, ahead=ahead, backend=backend)
    assert [x.tolist() for x in got] == expected_places(kinds, joined, rows, ahead)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_positions_have_places_of_their_own(backend: str) -> None:
    got = select.places(torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.int32),
                        rows=3, backend=backend)  # fmt: skip
    assert got.place.tolist() == [0, 1, 2, 3, 4]
    assert got.ends.tolist() == [3, 4, 5]


def test_many_tokens_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_places, "MOST", 4)
    flags, positions = torch.rand(9) < 0.5, torch.randperm(9)
    text = 9 - int(flags.sum())
    got = select.places(flags, positions, rows=text, backend="triton")
    expected = expected_places(flags.tolist(), positions.tolist(), text, False)
    assert [x.tolist() for x in got] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("d", "dv"), [(8, 1), (5, 24)])
def test_tokens_are_taken(d: int, dv: int, dtype: torch.dtype) -> None:
    """From strided tensors, with gradients, which go back, and second ones."""
    torch.manual_seed(d)
    order = torch.randperm(19)
    place = select.inverse(order)
    x = torch.randn(2, 19, 3, d).to(dtype).transpose(1, 2).requires_grad_()
    y = torch.randn(2, 1, 19, 2 * dv).to(dtype)[..., ::2].requires_grad_()
    got = select.take_tokens(x, y, order, place, backend="triton")
    for a, b in zip(got, (x, y), strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b[:, :, order])
    up = [torch.randn(*z.shape[:2], z.shape[3], 19).to(dtype).mT for z in got]
    gradients = torch.autograd.grad(got, (x, y), up)
    for a, b in zip(gradients, up, strict=True):
        assert torch.equal(a, b[:, :, place])
    alone, empty = select.take_tokens(x.detach(), None, order, place, backend="triton")
    assert torch.equal(alone, got[0])
    assert empty.numel() == 0


def test_no_tokens() -> None:
    none = torch.empty(0, dtype=torch.int64)
    at = select.places(none.bool(), none, rows=0, backend="triton")
    assert all(x.numel() == 0 for x in at)
    x: Tensor = torch.empty(2, 3, 0, 4)
    assert select.take_tokens(x, x, none, none, backend="triton")[1].shape == x.shape
