"""What the scan's host side launches, on a driver that compiles and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines import prepared
from attnspec.fast.engines.scan import replay, scan

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

from attnspec.fast.engines.scan import triton_host  # noqa: E402

TOKENS, HEADS, D = 600, 2, 32
CALLS: dict[str, dict[str, Any]] = {
    "no decay": {},
    "slopes": {"slopes": torch.tensor([0.1, 0.2])},
    "step sizes": {"log_decay": -torch.rand(1, HEADS, TOKENS)},
    "channels": {"log_decay": -torch.rand(1, HEADS, TOKENS, D)},
    "state": {"state": torch.rand(1, HEADS, D, D)},
}


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from triton.runtime.jit import JITFunction

    from attnspec.fast.engines.scan import triton_plan
    from tests.launches import launches

    kernels = [
        x
        for module in (triton_host, triton_plan)
        for x in vars(module).values()
        if isinstance(x, JITFunction)
    ]
    with launches(monkeypatch, kernels, replay.replays, prepared._compiled) as found:
        yield found


def inputs() -> list[Tensor]:
    return [torch.ones(1, HEADS, TOKENS, D, dtype=torch.float16) for _ in range(3)]


class Run:
    """A call with its gradient. What it made stays alive, so that no address is given out twice."""

    def __init__(self, journal: Any, given: list[Tensor], upstream: Tensor, options: Any) -> None:
        before = len(journal)
        self.leaves = [x.requires_grad_() for x in given]
        self.results = scan(*self.leaves, **options, backend="triton")
        self.forward, before = journal[before:], len(journal)
        self.gradients = torch.autograd.grad(self.results[0], self.leaves, upstream)
        self.backward = journal[before:]


def numbered(launched: list[Any], own: set[int]) -> list[Any]:
    """Launches with the addresses of buffers replaced by the order in which they first appear."""
    order: dict[int, int] = {}

    def name(x: Any) -> Any:
        big = isinstance(x, int) and not isinstance(x, bool) and x > 1 << 32
        return ("buffer", order.setdefault(x, len(order))) if big and x not in own else x

    return [(kernel, [name(x) for x in values]) for kernel, _, values in launched]


@pytest.mark.parametrize("call", CALLS)
def test_a_known_call_launches_what_the_first_one_did(
    journal: Any, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CALLS[call]
    given, upstream = inputs(), torch.ones(1, HEADS, TOKENS, D, dtype=torch.float16)
    own = {x.data_ptr() for x in (*given, upstream, *options.values())}
    first = Run(journal, given, upstream, options)
    compiled = journal.compiled

    def plan(*call: Any, **options: Any) -> Any:
        raise AssertionError("a known call is not planned again")

    monkeypatch.setattr(triton_host.Call, "plan", plan)
    second = Run(journal, given, upstream, options)
    assert journal.compiled == compiled
    for before, now in ((first.forward, second.forward), (first.backward, second.backward)):
        assert before
        assert {how for _, how, _ in now} == {"direct"}
        assert numbered(now, own) == numbered(before, own)


def test_sums_by_torch_are_planned_every_time(journal: Any) -> None:
    """Heads of queries that share keys: the sum over them is no launch."""
    q = torch.ones(1, HEADS, TOKENS, D, dtype=torch.float16)
    k, v = (torch.ones(1, 1, TOKENS, D, dtype=torch.float16) for _ in range(2))
    Run(journal, [q, k, v], torch.ones_like(q), {})
    kept = len(replay.replays)
    Run(journal, [q, k, v], torch.ones_like(q), {})
    assert len(replay.replays) == kept
    assert not any(len(x.outputs) > 2 for x in replay.replays.values())
