"""Triton kernels of the scans without matrix products, in the interpreter, against the CPU's."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.conformance import Kernel, Profile, certify
from attnspec.fast.backend import launch_count
from attnspec.fast.engines.scan import (
    LaneConfig,
    elementwise,
    gated_scan,
    selective,
    triton_elementwise,
    triton_gated_host,
    use_config,
)
from attnspec.fast.engines.scan.configs import lanes
from attnspec.fast.engines.scan.gated import gated_op
from attnspec.fast.linear import dsf


@pytest.fixture(autouse=True)
def _many_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Segments of two tiles of four rows, two channels a program, as on a large processor."""
    monkeypatch.setattr(triton_elementwise, "device_of", lambda x: (64, True))
    with use_config(LaneConfig(4, 2, 8, 8)):
        yield


def compare(
    function: Any, inputs: list[Tensor | None], bound: float = 1e-5, spoilt: bool = False
) -> None:
    """Outputs and gradients of both backends, the CPU's in float64."""
    made = []
    for backend in ("triton", "numba"):
        given = [x if x is None or backend == "triton" else x.double() for x in inputs]
        leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        out = function(*leaves, backend=backend)
        torch.manual_seed(0)
        upstream = [torch.randn(y.shape).to(y.dtype) for y in out]
        wanted = [x for x in leaves if x is not None]
        made.append([*out, *torch.autograd.grad(out, wanted, upstream)])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=bound, atol=10 * bound, equal_nan=spoilt
        )


@pytest.mark.parametrize(("tokens", "started"), [(8, False), (17, True)])
def test_elementwise(tokens: int, started: bool) -> None:
    torch.manual_seed(tokens)
    a = torch.where(torch.rand(2, tokens, 3) < 0.2, 0.0, torch.randn(2, tokens, 3))
    x, h0 = torch.randn(2, 3, tokens).mT, torch.randn(2, 3)
    compare(elementwise, [a, x, h0 if started else None])


@pytest.mark.parametrize(("tokens", "started"), [(1, False), (17, True)])
def test_selective(tokens: int, started: bool) -> None:
    torch.manual_seed(tokens)
    channels, n = 3, 3
    Delta, u = torch.rand(2, tokens, channels), torch.randn(2, channels, tokens).mT
    A, D, h0 = torch.rand(channels, n) * 3, torch.randn(channels), torch.randn(2, channels, n)
    b, c = torch.randn(2, tokens, 2 * n).split(n, -1)
    Delta[:, tokens // 2] = 40.0
    compare(selective, [Delta, A, b, c, u, *((D, h0) if started else (None, None))])


def gates(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """f, i, o, z, parts of one projection, and h0; some gates are open, shut or saturated."""
    torch.manual_seed(tokens)
    f, i, o, z = (2 * torch.randn(2, tokens, 4 * channels)).to(dtype).split(channels, -1)
    far = torch.tensor([-200.0, 200.0, -30.0, 30.0]).to(dtype)
    for x in (f, i, o):
        places = torch.rand(x.shape) < 0.2
        x[places] = far[torch.randint(4, (int(places.sum()),))]
    return [f, i, o, z, torch.randn(2, channels)]


SHUT = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
"""A gate that is shut is 1 / inf."""


OFFSETS = [0, 0, 5, 6, 6, 29, 37, 37]
"""Without a token at the start, in the middle and at the end; of one token; of four segments, the
last of which is a row over a tile; of a whole segment."""


def packed(function: Any, offsets: list[int]) -> Any:
    """`function` of sequences laid end to end."""
    ends = torch.tensor(offsets, dtype=torch.int32)
    return lambda *given, backend: function(*given, offsets=ends, backend=backend)


@pytest.mark.parametrize("started", [False, True])
def test_packed_elementwise(started: bool) -> None:
    torch.manual_seed(0)
    a = torch.where(torch.rand(1, 37, 3) < 0.2, 0.0, torch.randn(1, 37, 3))
    x, h0 = torch.randn(1, 3, 37).mT, torch.randn(7, 3)
    compare(packed(elementwise, OFFSETS), [a, x, h0 if started else None])


@pytest.mark.parametrize("started", [False, True])
def test_packed_selective(started: bool) -> None:
    torch.manual_seed(1)
    channels, n = 3, 3
    Delta, u = torch.rand(1, 37, channels), torch.randn(1, channels, 37).mT
    A, D, h0 = torch.rand(channels, n) * 3, torch.randn(channels), torch.randn(7, channels, n)
    b, c = torch.randn(1, 37, 2 * n).split(n, -1)
    Delta[:, 20] = 40.0
    given = [Delta, A, b, c, u, *((D, h0) if started else (None, None))]
    compare(packed(selective, OFFSETS), given)


@SHUT
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("gate", ["plain", "learned"])
@pytest.mark.parametrize(("channels", "rows"), [(3, 4), (64, 4), (3, 16)])
def test_packed_gates(started: bool, gate: str, channels: int, rows: int) -> None:
    """Also two channels a thread, and marks within a tile, of which the gradient's are halves."""
    *inputs, _ = gates(37, channels)
    inputs = [x[:1] for x in inputs]
    h0 = torch.randn(7, channels) if started else None

    def function(f: Any, i: Any, o: Any, z: Any, first: Any, alpha: Any, **options: Any) -> Any:
        power = 1.0 if alpha is None else alpha
        return gated_scan(f, i, o, z, power, gate != "plain", first, **options)

    alpha = None if gate == "plain" else torch.tensor(1.5)
    with use_config(LaneConfig(rows, 64 if channels == 64 else 2, 8, 8)):
        compare(packed(function, OFFSETS), [*inputs, h0, alpha], 2e-5)


def test_neighbours_of_nan_are_not_felt() -> None:
    """Nor states of infinity: what restarts is chosen, not multiplied by 0."""
    torch.manual_seed(2)
    offsets, own = torch.tensor([0, 11, 30, 37]), slice(11, 30)
    inputs = [torch.full((1, 37, 3), torch.nan) for _ in range(4)]
    for x in inputs:
        x[:, own] = torch.randn(1, 19, 3)
    h0 = torch.tensor([torch.inf, 0.5, torch.nan])[:, None].expand(3, 3)
    for function, given in ((gated_scan, inputs), (elementwise, inputs[:2])):
        options = {"h0": h0.contiguous(), "backend": "triton"}
        y, last = function(*given, **options, offsets=offsets)
        options["h0"] = h0[1:2].contiguous()
        alone = function(*(x[:, own] for x in given), **options)
        torch.testing.assert_close((y[:, own], last[1:2]), alone)
        leaves = [x.detach().requires_grad_() for x in given]
        y, last = function(*leaves, h0=h0.contiguous(), offsets=offsets, backend="triton")
        for slope in torch.autograd.grad(y.nan_to_num().sum() + last[1].sum(), leaves):
            assert slope[:, own].isfinite().all()


@SHUT
@pytest.mark.parametrize("tokens", [1, 8, 17])
@pytest.mark.parametrize("gate", ["plain", "reversed", "learned", "growing", "learned to grow"])
def test_gated(tokens: int, gate: str) -> None:
    *inputs, h0 = gates(tokens, 3)
    alpha = {"reversed": 1.5, "growing": -1.0}.get(gate, 1.0)
    if gate.startswith("learned"):
        inputs.append(torch.tensor(1.5 if gate == "learned" else -1.5))

    def function(*given: Any, backend: str) -> Any:
        *gates, first = given if tokens == 17 else (*given, None)
        power = gates.pop() if len(gates) > 4 else alpha
        return gated_scan(*gates, power, gate != "plain", first, backend=backend)

    compare(function, [*inputs, h0] if tokens == 17 else inputs, 2e-5)


@SHUT
@pytest.mark.parametrize(("channels", "dtype"), [(70, torch.float32), (64, torch.float16)])
def test_neighbouring_channels_in_a_thread(channels: int, dtype: torch.dtype) -> None:
    *inputs, h0 = gates(11, channels, dtype)
    f, i, o, z = (x.contiguous() for x in inputs)
    with use_config(LaneConfig(4, 64, 8, 8)):
        assert triton_gated_host.in_pairs(triton_elementwise.Cut(z, lanes("gated")), f, z, i, o)
        compare(
            lambda *given, backend: gated_scan(*given[:4], h0=given[4], backend=backend),
            [f, i, o, z, h0], 2e-5 if dtype == torch.float32 else 2e-3,
        )  # fmt: skip


@SHUT
def test_marks_within_a_tile() -> None:
    f, i, o, z, h0 = gates(19, 3)

    def function(*given: Any, backend: str) -> Any:
        f, i, o, z, h0 = given
        if backend == "numba":
            return gated_scan(*given[:4], h0=h0, backend=backend)
        return gated_op(f, z, i, o, None, 1.0, False, h0, None, 2)[:2]

    compare(function, [f, i, o, z, h0], 2e-5)
    marks = gated_op(f, z, i, o, None, 1.0, False, h0, None, 2)[2]
    states, _ = elementwise(torch.sigmoid(f), torch.sigmoid(i) * z, h0, backend="numba")
    before = torch.cat([h0[:, None], states[:, 1:-1:2]], 1)
    torch.testing.assert_close(marks, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("gate", ["plain", "reversed"])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_numbers_that_are_none(which: int, value: float, gate: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 17, 2) for _ in range(4)]
    inputs[which][:, 6, 0] = value
    compare(
        lambda *given, backend: gated_scan(*given, 1.5, gate == "reversed", backend=backend),
        inputs, 2e-5, spoilt=True,
    )  # fmt: skip


@SHUT
def test_gated_op_is_well_registered() -> None:
    f, i, o, z, h0 = (x.detach().requires_grad_() for x in gates(5, 3))
    alpha = torch.tensor(1.5, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for learned in (None, alpha):
        given = (f, z, i, o, learned, 1.5, True, h0, None, 4)
        torch.library.opcheck(gated_op.op, given, test_utils=checks)


@SHUT
def test_a_last_state_alone_has_a_gradient() -> None:
    f, i, o, z, _ = gates(9, 3)

    def last(f: Tensor, i: Tensor, z: Tensor, backend: str) -> tuple[Tensor, ...]:
        return gated_scan(f, i, o.to(z), z, backend=backend)[1:]

    compare(last, [f, i, z])


@pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_nothing_to_scan(sizes: tuple[int, int, int]) -> None:
    f, i, o, z = (torch.randn(sizes, requires_grad=True) for _ in range(4))
    alpha = torch.tensor(1.5, requires_grad=True)
    h0 = torch.randn(sizes[0], sizes[2], requires_grad=True)
    y, last = gated_scan(f, i, o, z, alpha, True, h0, backend="triton")
    assert y.shape == sizes
    assert torch.equal(last, h0)
    slope, first = torch.autograd.grad(last.sum() + y.sum(), (alpha, h0))
    assert slope == 0
    assert torch.equal(first, torch.ones_like(h0))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_the_suite() -> None:
    kernel = Kernel(
        "interpreted", "dsf.qlstm", dsf.qlstm, array="torch", dtypes=("float32", "float16"),
        backend="triton", gradient=True, blocks=(4, 8), launches=launch_count, reads_values=False,
    )  # fmt: skip
    report = certify(kernel, profile="smoke")
    assert report.passed, report.failures[0]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["qlstm_packed", "s6_packed", "rg_lru_packed"])
def test_packed_sequences_of_the_suite(name: str) -> None:
    kernel = Kernel(
        "interpreted", f"dsf.{name}", partial(getattr(dsf, name), backend="triton"),
        array="torch", dtypes=("float32",), gradient=True, reads_values=False,
        draws={"tokens": (1, 4, 9, 20), "N": (1, 3), "dv": (1, 3), "n": (1, 4)},
    )  # fmt: skip
    laws = ["agreement", "gradient", "alone", "continued", "prefix", "refusal", "tiny"]
    report = certify(kernel, profile=Profile("few", examples=6, shrink=False), laws=laws)
    assert report.passed, report.failures[0]


@pytest.mark.parametrize("name", ["rg_lru", "s6_scan", "dsf_scan", "elementwise_scan"])
def test_gradients_of_the_suite(name: str) -> None:
    """Those of what these scans are part of, in the state at the start and through the last."""
    kernel = Kernel(
        "interpreted", f"dsf.{name}", partial(getattr(dsf, name), backend="triton"),
        array="torch", dtypes=("float32",), gradient=True, reads_values=False,
        draws={"tokens": (1, 4, 9), "batch": (1,)},
    )  # fmt: skip
    report = certify(kernel, profile=Profile("few", examples=6, shrink=False), laws=["gradient"])
    assert report.passed, report.failures[0]
    assert any("dh0" in result.used for result in report.results)
