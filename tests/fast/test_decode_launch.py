"""What the decode engine's host side launches, on a driver that compiles and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attnspec.fast.engines.decode import DecodeConfig, decode, op, use_config
from tests.decode_cases import draw

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from attnspec.fast.engines.decode.triton_kernels import attend_kernel, join_kernel
    from tests.launches import launches

    with launches(monkeypatch, [attend_kernel, join_kernel], op._launches) as found:
        yield found


def test_lengths_never_compile_again(journal: Any) -> None:
    """Cached tokens, lengths and their strides: fifty of each, one kernel and one that joins."""
    q, k, v = draw(2, 4, 2, 1, 300, 16, 16)
    room_k, room_v = (torch.cat([x, x], 2) for x in (k, v))
    for n in range(1, 51):
        view = room_k[:, :, :n], room_v[:, :, :n]
        copied = k[:, :, :n].contiguous(), v[:, :, :n].contiguous()
        for cache in (view, copied):
            decode(q, *cache, backend="triton")
    assert journal.compiled == 2
    for n in range(1, 51):
        decode(q, k[:, :, :n], v[:, :, :n], lengths=torch.tensor([n, n // 2]), backend="triton")
    assert journal.compiled == 4
    for n in range(1, 51):
        index = torch.zeros(2, 2, n, dtype=torch.int32)
        decode(q, k, v, index=index, backend="triton")
    assert journal.compiled == 6
    for n in range(1, 51):
        index, counts = torch.zeros(2, 2, n + 3, dtype=torch.int32), torch.full((2, 2), n)
        decode(q, k, v, index=index, counts=counts, backend="triton")
    assert journal.compiled == 8
    for n in range(1, 51):
        q, k, v = draw(2, 4, 2, 4, n, 16, 16)
        decode(q, k, v, bias=torch.zeros(2, 2, n), backend="triton")
    assert journal.compiled == 10


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([9, 300])},
    "index": {"index": torch.zeros(2, 2, 7, dtype=torch.int32), "page": 4},
    "counts": {
        "index": torch.zeros(2, 2, 7, dtype=torch.int32),
        "counts": torch.ones(2, 2).int(),
    },
    "bias": {"bias": torch.zeros(1, 1, 300).expand(2, 2, 300)},
    "sink": {"sink_logit": torch.zeros(8)[::2]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_second_call_is_the_first_without_the_look_up(journal: Any, name: str) -> None:
    q, k, v = draw(2, 4, 2, 3, 300, 16, 16)
    for _ in range(2):
        decode(q, k, v, **OPTIONS[name], backend="triton")
    names = ["attend_kernel", "join_kernel"]
    assert [x[:2] for x in journal[:2]] == [(x, "looked up") for x in names]
    assert [x[:2] for x in journal[2:]] == [(x, "direct") for x in names]
    # The outputs of the two calls, and a contiguous copy of a strided sink, lie where they may.
    strided = name == "sink"
    for at, free in (
        (0, {3, 4, *([11] if strided else [])}),
        (1, {1, 2, *([5] if strided else [])}),
    ):
        slow, fast = journal[at][2], journal[at + 2][2]
        assert len(slow) == len(fast)
        assert all(a == b for i, (a, b) in enumerate(zip(slow, fast, strict=True)) if i not in free)


def test_nothing_is_joined_where_every_output_is_one_tile(journal: Any) -> None:
    q, k, v = draw(2, 4, 2, 1, 300, 16, 16)
    index, lengths = torch.zeros(2, 2, 30, dtype=torch.int32), torch.tensor([1, 30])
    short, tokens = (k[:, :, :30], v[:, :, :30]), q.expand(2, 4, 2, 16)
    for call in (
        lambda: decode(q, *short, backend="triton"),
        lambda: decode(q, k, v, index=index, backend="triton"),
        lambda: decode(tokens, *short, causal=False, backend="triton"),
    ):
        call()
        assert journal.pop()[0] == "attend_kernel"
        assert not journal
    for call in (
        lambda: decode(q, k, v, backend="triton"),
        lambda: decode(q, k[:, :, :0], v[:, :, :0], backend="triton"),
        lambda: decode(q, *short, lengths=lengths, backend="triton"),
        lambda: decode(q, k, v, index=index, counts=torch.ones(2, 2).int(), backend="triton"),
        lambda: decode(tokens, *short, causal=True, backend="triton"),
    ):
        call()
        assert journal.pop()[0] == "join_kernel"
        assert journal.pop()[0] == "attend_kernel"


def test_what_compiles_differently_is_looked_up(journal: Any) -> None:
    q, k, v = draw(1, 4, 2, 1, 64, 16, 16)
    shifted = torch.zeros(v.numel() + 1)[1:].view_as(v)
    for values in (v, shifted, v.mT.contiguous().mT, torch.zeros(1, 2, 64, 17)[..., :16], v):
        decode(q, k, values, backend="triton")
    assert journal.compiled == 4 + 1
    attended = [how for name, how, _ in journal if name == "attend_kernel"]
    assert attended == ["looked up"] * 4 + ["direct"]
    with use_config(DecodeConfig(tile=32, rows=16, workers=1, warps=2, stages=2)):
        decode(q, k, v, backend="triton")
    assert journal.compiled == 5 + 1
    decode(q, k, v, backend="triton")
    assert journal[-1][1] == "direct"


def test_partial_numbers_are_shared_by_no_two_streams() -> None:
    from attnspec.fast.engines.decode.triton_forward import KEPT, partials

    device = torch.device("cpu")
    room = partials(device, -1, 100)
    assert room.numel() >= 100
    assert partials(device, -1, 50) is room
    other = partials(device, -2, 100)
    assert other is not room
    large = partials(device, -1, KEPT + 1)
    assert large.numel() > KEPT
    assert partials(device, -1, 100) is room
    grown = partials(device, -1, room.numel() + 1)
    assert grown is not room
    assert partials(device, -1, 100) is grown
