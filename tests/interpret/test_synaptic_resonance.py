"""Synaptic Resonance's Triton kernels in the interpreter: against its definition, token by token in
float64, with autograd's gradients, and by the suite.
"""

from __future__ import annotations

import functools
import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.conformance import Kernel, Profile, certify
from attnspec.fast.backend import launch_count
from attnspec.fast.engines.scan import (
    LaneConfig,
    MemoryConfig,
    hebbian,
    trace,
    triton_hebbian_tiles,
    triton_trace,
    use_config,
)
from attnspec.fast.linear import synaptic_resonance as fast
from attnspec.fast.linear.synaptic_resonance_whole import resonance

FLOOR = 1e-6
NARROW = LaneConfig(4, 16, 8, 1)
"""Tiles of few rows, segments of few tiles."""


@pytest.fixture(autouse=True)
def _many_segments_of_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a large device, and with NaN in buffers that nobody has written."""
    empty = triton_trace.Pass.empty
    monkeypatch.setattr(
        triton_trace.Pass, "empty", lambda made, *shape: empty(made, *shape).fill_(torch.nan)
    )
    for module in (triton_trace, triton_hebbian_tiles):
        monkeypatch.setattr(module, "device_of", lambda x: (64, True))
    with use_config(NARROW):
        yield


@pytest.fixture(params=[16, 0], ids=["whole", "in parts"], autouse=True)
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of two blocks of 16 tokens, two heads at once, and either way of the gradient."""
    chosen = MemoryConfig(
        block=16, most=16, keys=32, queries=16, stack=32, items=256, whole=request.param,
        programs=8.0, least_segment=32,
    )  # fmt: skip
    monkeypatch.setattr(triton_hebbian_tiles, "memory_config", lambda *kind: chosen)


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=FLOOR)


def relevant(k: Tensor, mu: float, valid: Any, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """rho and the last trace, token by token; `valid` is a list of rows of bools or None."""
    c = k.new_zeros(*k.shape[:2], k.shape[3]) if c is None else c
    rows = []
    for t, kh in enumerate(unit(k).unbind(2)):
        norm = torch.linalg.vector_norm(c, dim=-1)
        rho = torch.relu((kh * c).sum(-1) / norm.clamp(min=FLOOR))
        rho = torch.where((c == 0).all(-1), 1.0, rho)
        real = torch.ones(len(k), 1, dtype=torch.bool) if valid is None else valid[:, t, None]
        rows.append(torch.where(real, rho, 0.0))
        c = torch.where(real[..., None], mu * c + (1 - mu) * kh, c)
    return torch.stack(rows, 2) if rows else k[..., 0], c


def remembered(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S: Tensor | None, valid: Any, eta: float,
    lam: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m and the last state, token by token."""
    group = q.shape[1] // k.shape[1]
    S = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if S is None else S
    qh, kh, rows = unit(q), unit(k), []
    for t in range(k.shape[2]):
        real = torch.ones(len(k), 1, dtype=torch.bool) if valid is None else valid[:, t, None]
        real = real[..., None]
        read = (qh[:, :, t, None] @ S.repeat_interleave(group, 1))[:, :, 0]
        rows.append(torch.where(real, read, 0.0))
        written = (eta * rho[:, :, t, None] * kh[:, :, t])[..., None] * v[:, :, t, None]
        S = torch.where(real[..., None], lam * S + written, S)
    return torch.stack(rows, 2) if rows else q.new_zeros(*q.shape[:3], v.shape[3]), S


def inputs(T: int, d: int, dv: int, group: int = 2) -> dict[str, Tensor]:
    """Strided tokens, rows of zeros, a trace of zeros in one head."""
    torch.manual_seed(31 * T + d)
    made = {
        "q": torch.randn(2, T, 2 * group, d).transpose(1, 2),
        "k": torch.randn(2, 2, T, 2 * d)[..., ::2],
        "v": torch.randn(2, 2, dv, T).mT,
        "rho": torch.rand(2, 2, T),
        "S0": torch.randn(2, 2, d, dv),
        "c0": torch.randn(2, 2, d),
    }
    made["c0"][0, 1] = 0
    if T > 2:
        made["q"][:, :, 1] = 0
        made["k"][:, :, 2] = 0
    return made


def padding(T: int) -> Tensor:
    return torch.rand(2, T, generator=torch.Generator().manual_seed(T)) < 0.7


def results(function: Any, leaves: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and the gradients of all leaves, in `dtype`."""
    given = [None if x is None else x.to(dtype).detach().requires_grad_() for x in leaves]
    out = function(*given)
    torch.manual_seed(1)
    upstream = [torch.randn(x.shape).to(x.dtype) for x in out]
    wanted = [x for x in given if x is not None]
    # Without a token the definition's outputs may depend on nothing.
    pairs = [(x, up) for x, up in zip(out, upstream, strict=True) if x.requires_grad]
    if not pairs:
        return [*out, *map(torch.zeros_like, wanted)]
    reached, upstream = map(list, zip(*pairs, strict=True))
    return [*out, *torch.autograd.grad(reached, wanted, upstream, materialize_grads=True)]


def agree(got: list[Tensor], expected: list[Tensor], bound: float = 1e-5) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        most = float(b.detach().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound * max(1.0, most))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    ("T", "d", "mu"), [(0, 5, 0.5), (1, 5, 0.9), (2, 16, 0.0), (5, 5, 0.7), (70, 16, 0.9)]
)
def test_relevance(T: int, d: int, mu: float, started: bool, padded: bool) -> None:
    made, valid = inputs(T, d, 1), padding(T) if padded else None
    leaves = [made["k"], made["c0"] if started else None]
    before = launch_count()
    got = results(lambda k, c: trace(k, mu, valid, c), leaves, torch.float32)
    assert launch_count() == before + 5
    agree(got, results(lambda k, c: relevant(k, mu, valid, c), leaves, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relevance_of_16_bits(dtype: torch.dtype) -> None:
    """Keys are widened before anything is summed; rho and c are float32."""
    k = inputs(20, 16, 1)["k"].to(dtype)
    k[:, :, 2] = 1
    rho, c = trace(k, 0.9)
    assert rho.dtype == c.dtype == torch.float32
    agree([rho, c], list(relevant(k.double(), 0.9, None, None)))
    (dk,) = torch.autograd.grad(trace(k.requires_grad_(), 0.9)[0].sum(), k)
    wide = k.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(relevant(wide, 0.9, None, None)[0].sum(), wide)
    assert dk.dtype == dtype
    agree([dk], [expected], torch.finfo(dtype).eps)


def test_an_average_without_decay() -> None:
    """mu = 0: a trace is the key before; zeros and padding between keys make relevant or wait."""
    k = inputs(40, 5, 1)["k"].clone()
    k[:, :, 7:13], k[:, :, 20] = 0, 1e-9
    valid = padding(40)
    got = results(lambda k: trace(k, 0.0, valid), [k], torch.float32)
    agree(got, results(lambda k: relevant(k, 0.0, valid, None), [k], torch.float64))


def test_later_keys_stay_out_of_relevance() -> None:
    k = inputs(70, 5, 1)["k"].clone()
    before, _ = trace(k, 0.9)
    k[:, :, 41:] = torch.nan
    after, last = trace(k, 0.9)
    assert torch.equal(before[:, :, :41], after[:, :, :41])
    assert after[:, :, 41:].isnan().all()
    assert last.isnan().all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    ("T", "d", "dv", "lam"),
    [(0, 5, 3, 0.5), (1, 5, 16, 0.9), (2, 16, 3, 0.0), (5, 5, 5, 0.9), (70, 16, 16, 1.0)],
)
def test_memory(T: int, d: int, dv: int, lam: float, started: bool, padded: bool) -> None:
    """Added to something, a share of it, with all gradients; and alone, without a gradient."""
    made, valid = inputs(T, d, dv), padding(T) if padded else None
    if valid is not None:
        made["v"] = torch.where(valid[:, None, :, None], made["v"], 0.0)
    leaves: list[Tensor | None] = [made[name] for name in ("q", "k", "v", "rho")]
    leaves += [made["S0"] if started else None, torch.randn(2, dv, 4, T).permute(0, 2, 3, 1)]

    def onto(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S: Any, o: Tensor) -> Any:
        numbers: dict[str, Any] = {"eta": 0.3, "lam": lam, "scale": -2.0, "state": S}
        return hebbian(q, k, v, rho, **numbers, valid=valid, onto=o)

    def plain(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S: Any, o: Tensor) -> Any:
        m, S = remembered(q, k, v, rho, S, valid, 0.3, lam)
        y = o - 2.0 * m
        return (y if valid is None else torch.where(valid[:, None, :, None], y, 0.0)), S

    agree(results(onto, leaves, torch.float32), results(plain, leaves, torch.float64))
    given = {"q": leaves[0], "k": leaves[1], "v": leaves[2], "rho": leaves[3], "S0": leaves[4]}
    alone: Any = fast.memory_chunked
    got = alone(**given, eta=0.3, lam=lam, valid=valid, chunk=16, backend="triton")
    wide = [None if x is None else x.double() for x in leaves[:5]]
    agree(list(got), list(remembered(*wide, valid, 0.3, lam)))  # type: ignore[arg-type]


@pytest.mark.parametrize("T", [1, 9])
def test_padding_is_not_read(T: int) -> None:
    """NaN in padded rows reaches no output and no gradient."""
    made, valid = inputs(T, 5, 3), padding(T)
    valid[0], valid[1, -1] = False, False
    made["v"] = torch.where(valid[:, None, :, None], made["v"], 0.0)
    names = ("q", "k", "v", "rho", "S0", "c0")

    def run(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S: Tensor, c: Tensor) -> Any:
        numbers: dict[str, Any] = {"eta": 0.3, "lam": 0.9, "state": S, "valid": valid}
        return *hebbian(q, k, v, rho, **numbers), *trace(k, 0.9, valid, c)

    clean = results(run, [made[name] for name in names], torch.float32)
    padded = ~valid[:, None]
    for name in ("q", "k"):
        made[name] = made[name].masked_fill(padded[..., None], torch.nan)
    made["rho"] = made["rho"].masked_fill(padded, torch.nan)
    spoilt = results(run, [made[name] for name in names], torch.float32)
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("T", "window", "padded", "started"),
    [(1, None, True, True), (6, 2, False, False), (20, 5, True, True), (20, None, False, True)],
)
def test_the_whole(T: int, window: int | None, padded: bool, started: bool) -> None:
    made = inputs(T, 5, 3)
    options: dict[str, Any] = {"eta": 0.3, "lam": 0.9, "mu": 0.8, "beta": 0.7, "window": window}
    options["valid"] = padding(T) if padded else None
    leaves: list[Tensor | None] = [made[name] for name in ("q", "k", "v")]
    leaves += [made["S0"], made["c0"]] if started else [None, None]

    def run(*given: Any, backend: str) -> list[Tensor]:
        y, state = fast.synaptic_resonance(*given, **options, backend=backend)
        return [y, *state]

    got = results(lambda *given: run(*given, backend="triton"), leaves, torch.float32)
    expected = results(lambda *given: run(*given, backend="numba"), leaves, torch.float64)
    agree(got, expected)
    agree(run(*leaves, backend="triton"), expected[:3])


def alone(offsets: list[int], options: dict[str, Any]) -> Any:
    """The packed sequences one by one, on the CPU."""

    def run(q: Tensor, k: Tensor, v: Tensor, *state: Any) -> list[Tensor]:
        parts = []
        for n, (first, last) in enumerate(pairwise(offsets)):
            own = (x[None, :, first:last] for x in (q, k, v))
            before = (None if x is None else x[n : n + 1] for x in state)
            y, after = fast.synaptic_resonance(*own, *before, **options, backend="numba")
            parts.append((y[0], *after))
        ys, memories, traces = zip(*parts, strict=True)
        return [torch.cat(ys, 1), torch.cat(memories), torch.cat(traces)]

    return run


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    ("offsets", "window", "started"),
    [
        ([0, 0, 40, 41, 75], None, True),
        ([0, 33, 70, 70], 5, False),
        ([0, 0, 0], None, True),
        ([0, 20], 3, True),
    ],
)
def test_packed_sequences(
    offsets: list[int], window: int | None, started: bool, described: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Segments that end inside a block, sequences of one token and of none; with tiles by pointers,
    and by the programs' own descriptors as on Hopper.
    """
    T, many = offsets[-1], len(offsets) - 1
    torch.manual_seed(T)
    made = [torch.randn(T, n, 8).transpose(0, 1) for n in (4, 2, 2)]
    leaves: list[Tensor | None] = [*made, None, None]
    if started:
        leaves[3:] = torch.randn(many, 2, 8, 8), torch.randn(many, 2, 8)
        leaves[4][0, 1] = 0  # type: ignore[index]
    if described:
        monkeypatch.setattr(triton_hebbian_tiles, "access", lambda *tensors: 2)
    options: dict[str, Any] = {"eta": 0.3, "lam": 0.9, "mu": 0.8, "beta": 0.7, "window": window}

    def run(*given: Any) -> list[Tensor]:
        y, state = fast.synaptic_resonance_packed(
            *given[:3], torch.tensor(offsets), *given[3:], **options, backend="triton"
        )
        return [y, *state]

    got = results(run, leaves, torch.float32)
    agree(got, results(alone(offsets, options), leaves, torch.float64))


def test_nothing_of_a_packed_neighbour_comes_through() -> None:
    """NaN in one sequence reaches no output and no gradient of the others, not even in blocks that
    they share.
    """
    offsets = torch.tensor([0, 20, 45, 75])
    torch.manual_seed(0)
    made = [torch.randn(n, 75, 8) for n in (4, 2, 2)]
    state = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8)

    def run(*given: Any) -> list[Tensor]:
        y, after = fast.synaptic_resonance_packed(*given[:3], offsets, *given[3:], backend="triton")
        return [y, *after]

    clean = results(run, [*made, *state], torch.float32)
    spoilt = [x.clone() for x in (*made, *state)]
    for x in spoilt[:3]:
        x[:, 20:45] = torch.nan
    for x in spoilt[3:]:
        x[1] = torch.nan
    got = results(run, spoilt, torch.float32)
    for x, y in zip(clean, got, strict=True):
        rows = (lambda x: x.transpose(0, 1)) if x.shape[1] == 75 else (lambda x: x)
        others = [slice(0, 20), slice(45, None)] if x.shape[1] == 75 else [0, 2]
        for own in others:
            assert torch.equal(rows(x)[own], rows(y)[own])


def test_packed_calls_compiled() -> None:
    """Bit by bit what eager calls compute, for other offsets of as many sequences too."""
    torch.manual_seed(0)
    made = [torch.randn(1, n, 40, 8) for n in (4, 2, 2)]
    numbers: dict[str, Any] = {"eta": 0.3, "lam": 0.9, "mu": 0.8, "beta": 0.7, "window": 7}

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        y, (S, c) = resonance(q, k, v, None, None, None, **numbers, offsets=offsets)
        return y.sum() + S.sum() + c.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ends in ([0, 7, 40], [0, 33, 40]):
        given = [x.clone().requires_grad_() for x in made]
        offsets = torch.tensor(ends)
        expected = torch.autograd.grad(run(*given, offsets), given)
        got = torch.autograd.grad(compiled(*given, offsets), given)
        assert all(map(torch.equal, got, expected))


def test_float16() -> None:
    """Queries of any length are brought to length 1 before they are rounded."""
    made = inputs(20, 16, 16)
    made["q"][:, :, 1:9] *= 1e3
    made["q"][:, :, 9:] *= 1e-3
    halves = [made[name].half() for name in ("q", "k", "v")]
    got = fast.memory_chunked(*halves, made["rho"], 1.0, S0=made["S0"], backend="triton")
    wide = [x.double() for x in (*halves, made["rho"], made["S0"])]
    agree(list(got), list(remembered(*wide, None, 1.0, 0.99)), 2e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_in_float16(kv_heads: int) -> None:
    """Of long and short queries, and of each number of heads that share a state."""
    torch.manual_seed(kv_heads)
    q, k, v = (torch.randn(1, n, 70, 16) for n in (4, kv_heads, kv_heads))
    q[:, :, 1:9] *= 1e3
    q[:, :, 9:20] *= 1e-3
    leaves: list[Tensor | None] = [q.half(), k.half(), v.half()]
    rho, valid = torch.rand(1, kv_heads, 70), torch.arange(70)[None] != 30
    masked = torch.where(valid[:, None, :, None], v, 0.0).half()
    leaves[2] = masked

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return hebbian(q, k, v, rho, eta=1.0, lam=0.99, valid=valid)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return remembered(q, k, v, rho.double(), None, valid, 1.0, 0.99)

    got, expected = results(run, leaves, torch.float16), results(plain, leaves, torch.float64)
    # dq goes by the inverse norm of a query.
    norms = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    got[2], expected[2] = got[2] * norms, expected[2] * norms
    agree(got, expected, 4e-3)


@pytest.mark.parametrize("window", [None, 3])
def test_the_whole_compiled(window: int | None) -> None:
    """Bit by bit what eager calls compute."""
    made, valid = inputs(20, 5, 3), padding(20)
    for name in ("q", "k", "v"):
        made[name] = torch.where(valid[:, None, :, None], made[name], 0.0)
    leaves: list[Tensor | None] = [made[name] for name in ("q", "k", "v", "S0", "c0")]

    numbers: dict[str, Any] = {"eta": 0.3, "lam": 0.9, "mu": 0.8, "beta": 0.7, "window": window}

    def run(*given: Any) -> Any:
        y, state = resonance(*given, valid, **numbers)
        return y, *state

    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    for a, b in zip(
        results(compiled, leaves, torch.float32), results(run, leaves, torch.float32), strict=True
    ):
        assert torch.equal(a, b)


def test_launches(request: pytest.FixtureRequest) -> None:
    """Forward: two for relevance, one for attention, three for the memory. A gradient: three each
    for attention and relevance, five for the memory that a program holds.
    """
    made = inputs(70, 5, 3, group=1)
    given = [made[name].requires_grad_() for name in ("q", "k", "v")]
    before = launch_count()
    y, _ = fast.synaptic_resonance(*given, window=4, backend="triton")
    assert launch_count() == before + 6
    if "in parts" not in request.node.name:
        y.sum().backward()
        assert launch_count() == before + 6 + 11


def test_a_state_goes_on() -> None:
    """In parts, one of them a single token by the step for decoding."""
    made = inputs(30, 5, 3)
    tokens = [made[name] for name in ("q", "k", "v")]
    expected, _ = fast.synaptic_resonance(*(x.double() for x in tokens))
    state, parts = fast.init_state(*tokens[1:], backend="triton"), []
    for some in (slice(0, 1), slice(1, 25), slice(25, 26), slice(26, 30)):
        y, state = fast.step(state, *(x[:, :, some] for x in tokens), backend="triton")
        parts.append(y)
    agree([torch.cat(parts, 2)], [expected])


def test_gradients_of_compiled_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    made, valid = inputs(9, 5, 3), padding(9)
    leaves: list[Tensor | None] = [made[name] for name in ("q", "k", "v", "S0", "c0")]

    def run(q: Tensor, k: Tensor, v: Tensor, S: Tensor, c: Tensor) -> Any:
        rho, last = trace(k, 0.9, valid, c)
        numbers: dict[str, Any] = {"eta": 0.3, "lam": 0.9, "state": S, "valid": valid}
        return *hebbian(q, k, v, rho, **numbers), last

    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    for a, b in zip(
        results(compiled, leaves, torch.float32), results(run, leaves, torch.float32), strict=True
    ):
        assert torch.equal(a, b)


def test_too_wide_or_in_a_type_it_has_not() -> None:
    wide = torch.randn(1, 1, 2, 257)
    with pytest.raises(ValueError, match=r"^k: got 257 channels"):
        fast.relevance(wide, backend="triton")
    with pytest.raises(ValueError, match=r"^q: got 257 channels"):
        fast.memory_chunked(wide, wide, wide, wide[..., 0], backend="triton")
    with pytest.raises(TypeError, match=r"^k: got dtype torch.float64"):
        fast.relevance(wide.double(), backend="triton")


def on_triton(operation: Any) -> Any:
    """The operation, with Triton where nothing else is asked for."""

    @functools.wraps(operation)
    def call(*arguments: Any, **options: Any) -> Any:
        return operation(*arguments, **{**options, "backend": options.get("backend") or "triton"})

    return call


# Flash attention takes the exponential of pairs in a tile that no query sees before it drops them.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize(
    "operation",
    ["relevance", "memory_recurrent", "synaptic_resonance", "synaptic_resonance_packed"],
)
def test_the_suites_gradient(operation: str) -> None:
    kernel = Kernel(
        "interpreted", f"synaptic_resonance.{operation}", on_triton(getattr(fast, operation)),
        array="torch", gradient=True, launches=launch_count, reads_values=False,
        draws={"d": (5, 16), "dv": (3, 16), "group": (1, 3)},
    )  # fmt: skip
    report = certify(kernel, profile="smoke", dtypes=["float32"], laws=["gradient"])
    assert report.passed, report.failures[0]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
def test_the_suite_of_packed_calls() -> None:
    kernel = Kernel(
        "interpreted", "synaptic_resonance.synaptic_resonance_packed",
        on_triton(fast.synaptic_resonance_packed), array="torch", launches=launch_count,
        dtypes=("float32", "float16"), blocks=(16,), reads_values=False,
        draws={"d": (5, 16), "dv": (3, 16), "group": (1, 3)},
    )  # fmt: skip
    report = certify(kernel, profile=Profile("few", examples=2, shrink=False))
    assert report.passed, report.failures[0]
