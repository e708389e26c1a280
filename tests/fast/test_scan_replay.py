"""Launches that are kept: what is repeated, what is not, and which calls go past the custom op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.backend import unobserved
from attnspec.fast.engines.scan import CANDIDATES, replay, scan, use_config
from attnspec.fast.engines.scan.recorder import Recorder
from attnspec.fast.engines.scan.replay import alias, kind, known
from attnspec.fast.recent import Recent


class Kernel:
    """Stands in for a Triton kernel out = factor * x, compiled on its first launch."""

    arg_names = ("x", "out", "n", "FACTOR")

    def __init__(self, compiles: bool = True) -> None:
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(x: Tensor, out: Tensor, n: int, FACTOR: int) -> Any:
            out.copy_(x[:n] * FACTOR)
            return {(*grid, 1, 1): run} if self.compiles else None

        return run


@dataclass
class Described:
    """Stands in for a tensor descriptor."""

    base: Tensor
    rows: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    block_shape: tuple[int, ...] = ()


class DescribedKernel(Kernel):
    """The same of the first rows of a descriptor."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(x: Described, out: Tensor, n: int, FACTOR: int) -> Any:
            out.copy_(x.base[: x.rows] * FACTOR)
            return {(*grid, 1, 1): run}

        return run


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "replays", Recent())


def record(x: Tensor, key: Any, stray: bool = False, compiles: bool = True) -> Tensor:
    recorder = Recorder(follows=True)
    out = recorder.buffer(torch.empty(3))
    recorder.launch(Kernel(compiles), 2, x.clone() if stray else x, out, 3, FACTOR=5)
    recorder.keep(key, (x, None), (out,), lambda: None)
    return out


def test_repeats_on_new_tensors() -> None:
    x, y = torch.arange(4.0), torch.ones(4)
    key = kind((x, None), (0.5,))
    first = record(x, key)
    found = known(kind((y, None), (0.5,)))
    assert found is not None
    torch.testing.assert_close(found((y, None)), (torch.full((3,), 5.0),))
    torch.testing.assert_close(first, torch.tensor([0.0, 5.0, 10.0]))


def test_describes_new_tensors_as_the_first() -> None:
    x, y = torch.arange(4.0), torch.ones(4)
    recorder = Recorder(follows=True)
    out = recorder.buffer(torch.empty(3))
    recorder.launch(DescribedKernel(), 2, Described(x, 3), out, 3, FACTOR=5)
    recorder.keep("described", (x,), (out,), lambda: None)
    torch.testing.assert_close(out, torch.tensor([0.0, 5.0, 10.0]))
    found = known("described")
    assert found is not None
    torch.testing.assert_close(found((y,)), (torch.full((3,), 5.0),))
    torch.testing.assert_close(found((x,)), (out,))


@pytest.mark.parametrize(
    ("other", "options"),
    [
        (torch.ones(5), (0.5,)),
        (torch.ones(8)[::2], (0.5,)),
        (torch.ones(5)[1:], (0.5,)),
        (torch.ones(4, dtype=torch.float16), (0.5,)),
        (torch.ones(4), (0.25,)),
        (torch.ones(4), (torch.tensor(0.5),)),
        (torch.ones(4), ([],)),
    ],
    ids=["shape", "stride", "alignment", "dtype", "option", "type of option", "no hash"],
)
def test_another_kind(other: Tensor, options: tuple[Any, ...]) -> None:
    x = torch.arange(4.0)
    record(x, kind((x, None), (0.5,)))
    assert known(kind((other, None), options)) is None


def test_forced_configuration_is_another_kind() -> None:
    x = torch.arange(4.0)
    record(x, kind((x, None), ()))
    with use_config(CANDIDATES[1]):
        assert known(kind((x, None), ())) is None
    assert known(kind((x, None), ())) is not None


@pytest.mark.parametrize("options", [{"stray": True}, {"compiles": False}])
def test_not_kept(options: dict[str, bool]) -> None:
    """A call that made a tensor of its own, or ran in the interpreter, is planned every time."""
    x = torch.arange(4.0)
    record(x, "key", **options)
    assert known("key") is None


def test_one_tensor_in_two_places_is_not_kept() -> None:
    """Later calls may have two tensors there."""
    x = torch.arange(4.0)
    recorder = Recorder(follows=True)
    out = recorder.buffer(torch.empty(3))
    recorder.launch(Kernel(), 2, x, out, 3, FACTOR=5)
    recorder.keep("key", (x, x), (out,), lambda: None)
    assert known("key") is None


def test_alias_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "replays", Recent(2))
    x = torch.arange(4.0)
    alias("other", "key")
    record(x, "key")
    alias("other", "key")
    assert known("other") is known("key") is not None
    record(x, "new")
    assert known("key") is None


def test_unobserved() -> None:
    x = torch.ones(2)
    assert unobserved(x, None, torch.nn.Parameter(x, requires_grad=False))
    leaf = torch.ones(2, requires_grad=True)
    assert not unobserved(leaf)
    with torch.no_grad():
        assert unobserved(leaf)
    with torch._subclasses.FakeTensorMode() as mode:
        assert not unobserved(mode.from_tensor(x))
    seen = []
    torch.func.vmap(lambda y: seen.append(unobserved(y)) or y)(torch.ones(2, 2))
    assert seen == [False]


def test_direct_call_equals_the_op() -> None:
    """What the custom op computes for gradients is what a call without them computes."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    plain = scan(q, k, v, slopes=torch.tensor([0.1, 0.2]))
    observed = scan(q.requires_grad_(), k, v, slopes=torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(plain, observed, rtol=0, atol=0)
