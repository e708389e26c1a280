"""The prefix engine's Triton kernels in the interpreter: against their formula in float64, and
NTK-Attention on them against the suite.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from attnspec.conformance import Kernel, Profile, certify
from attnspec.fast.backend import launch_count
from attnspec.fast.dense.attention import init_state
from attnspec.fast.engines.prefix import PrefixConfig, add_prefix, triton_host, use_config
from attnspec.fast.linear import ntk_attention
from attnspec.fast.linear.ntk_attention import (
    merge_prefix,
    ntk_attend,
    ntk_packed,
    prefix_terms,
    step,
)

SMALL = PrefixConfig(rows=16, chunk=16, warps=1, stages=1, tiles=1, programs=64, columns=16)
FEW = Profile("few", examples=2, shrink=False)
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3}


def make(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, state: torch.dtype | None = None
) -> list[Tensor]:
    """q, soft, lse, Z, k and the gradient of the output: some rows see no key, others have an lse
    whose exponential leaves float32.
    """
    batch, heads, tokens, d, dv = sizes
    random = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, d), (batch, heads, tokens, dv), (batch, heads, tokens),
              (heads, d, dv), (heads, d), (batch, heads, tokens, dv))  # fmt: skip
    q, soft, lse, Z, k, dout = (torch.randn(shape, generator=random) for shape in shapes)
    lse = torch.where(torch.arange(tokens) % 3 == 2, 80 * lse, 2 * lse)
    if tokens > 1:
        lse[..., 1], soft[:, :, 1] = -torch.inf, 0.0
    q, soft, dout = (x.to(dtype) for x in (q, soft, dout))
    return [q, soft, lse, Z.to(state or dtype), k.to(state or dtype), dout]


def run(given: list[Tensor], positivity: str, add: Callable[..., Tensor]) -> list[Tensor]:
    """The output, and the gradients of q, soft, lse, Z and k."""
    *inputs, dout = given
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = add(*inputs, positivity=positivity)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def formula(q: Tensor, soft: Tensor, lse: Tensor, Z: Tensor, k: Tensor, positivity: str) -> Tensor:
    return merge_prefix(soft, lse, *prefix_terms(q, Z, k, positivity=positivity))


def check(given: list[Tensor], positivity: str = "abs", bound: float | None = None) -> None:
    got = run(given, positivity, add_prefix)
    expected = run([x.double() for x in given], positivity, formula)
    for x, exact, like in zip(got, expected, (given[5], *given[:5]), strict=True):
        assert x.dtype == like.dtype
        assert x.shape == exact.shape
        error = (x.double() - exact).norm()
        assert error <= (bound or BOUND[given[0].dtype]) * max(exact.norm(), 1e-3)


@pytest.mark.parametrize("positivity", ["abs", "softplus"])
@pytest.mark.parametrize(
    ("sizes", "dtype", "state"),
    [
        ((2, 2, 5, 5, 17), torch.float32, None),
        ((1, 2, 40, 16, 24), torch.float32, None),
        ((20, 1, 1, 1, 1), torch.float32, None),
        ((3, 2, 9, 20, 3), torch.float16, None),
        ((2, 1, 1, 5, 17), torch.float16, torch.float32),
    ],
)
def test_outputs_and_gradients(
    sizes: tuple[int, ...], dtype: torch.dtype, state: torch.dtype | None, positivity: str
) -> None:
    given = make(sizes, dtype, state)
    check(given, positivity)
    with use_config(SMALL):
        check(given, positivity)


@pytest.mark.parametrize("zeros", ["k", "Z", "Zk"])
def test_a_state_of_zeros(zeros: str) -> None:
    given = make((2, 2, 5, 5, 17))
    # A row without a prefix whose scores are very low has a gradient of k beyond float32.
    given[2] = given[2].clamp(min=-30.0).masked_fill(given[2] == -torch.inf, -torch.inf)
    for place, name in ((3, "Z"), (4, "k")):
        if name in zeros:
            given[place] = torch.zeros_like(given[place])
    out, *gradients = run(given, "abs", add_prefix)
    if "k" in zeros:
        assert torch.all(gradients[4] == 0)
    if zeros == "Zk":
        torch.testing.assert_close(out, given[1])
    check(given)


@pytest.mark.parametrize("sizes", [(1, 1, 20, 130, 40), (1, 1, 18, 40, 140)])
def test_wide_heads(sizes: tuple[int, ...]) -> None:
    check(make(sizes))


def test_parts_of_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Z, the features and the upstream gradient are split, here into float16: the interpreter's
    bfloat16 products are wrong.
    """
    monkeypatch.setattr(triton_host, "math_type", lambda q: tl.float16)
    monkeypatch.setattr(triton_host, "exact", lambda x, math: False)
    monkeypatch.setattr(triton_host, "PARTS", torch.float16)
    monkeypatch.setattr(triton_host, "_kinds", {})
    given = make((2, 2, 21, 20, 24))
    given[2] = given[2].clamp(-3, 3)
    check(given, bound=3e-6)


def test_layouts() -> None:
    q, soft, lse, Z, k, dout = make((2, 3, 18, 8, 8))
    expected = run([q, soft, lse, Z, k, dout], "abs", add_prefix)
    apart = [torch.stack([x, -x], -1)[..., 0] for x in (q, soft, dout)]
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, soft, dout)]
    for a, b, c in (apart, heads_last):
        got = run([a, b, lse.mT.contiguous().mT, Z.mT.contiguous().mT, k, c], "abs", add_prefix)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)
    same = torch.ones(()).expand(dout.shape)
    expected = run([q, soft, lse, Z, k, same.contiguous()], "abs", add_prefix)
    for x, y in zip(run([q, soft, lse, Z, k, same], "abs", add_prefix), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("sizes", [(2, 2, 0, 4, 4), (0, 2, 3, 4, 4)])
def test_no_rows(sizes: tuple[int, ...]) -> None:
    out, *gradients = run(make(sizes), "abs", add_prefix)
    assert out.shape == (*sizes[:3], sizes[4])
    assert all(torch.all(x == 0) for x in gradients)


def test_a_row_keeps_its_nan() -> None:
    given = make((1, 2, 20, 8, 12))
    clean = run(given, "abs", add_prefix)
    given[0][0, 0, 3, 2] = torch.nan
    dirty = run(given, "abs", add_prefix)
    for x, y in zip(clean[:4], dirty[:4], strict=True):
        spoilt = y.isnan()
        assert spoilt[0, 0, 3].any()
        assert torch.equal(x[~spoilt], y[~spoilt])
        spoilt[0, 0, 3] = False
        assert not spoilt.any()


def test_gradients_that_nobody_wants() -> None:
    q, soft, lse, Z, k, dout = make((1, 2, 20, 8, 12))
    expected = run([q, soft, lse, Z, k, dout], "abs", add_prefix)
    rows = [x.requires_grad_() for x in (q, soft, lse)]
    before = launch_count()
    got = torch.autograd.grad(add_prefix(*rows, Z, k, positivity="abs"), rows, dout)
    assert launch_count() - before == 2
    assert all(map(torch.equal, got, expected[1:4]))


def on_triton(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, with Triton where nothing else is asked for."""

    @functools.wraps(operation)
    def call(*arguments: Any, **options: Any) -> Any:
        return operation(*arguments, **{**options, "backend": options.get("backend") or "triton"})

    return call


# A numerator without a denominator may leave float32, as it does in the reference.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["ntk_attend", "ntk_packed", "step"])
def test_the_suite(name: str) -> None:
    kernel = Kernel(
        name="interpreted",
        operation=f"ntk_attention.{name}",
        call=on_triton(getattr(ntk_attention, name)),
        array="torch",
        dtypes=("float32", "float16"),
        draws={"d": (5, 16), "dv": (3, 16), "group": (1, 3)},
        blocks=(16,),
        launches=launch_count,
        reads_values=False,
    )
    report = certify(kernel, profile=FEW)
    assert report.passed, report.failures[0]


@pytest.mark.parametrize("operation", [ntk_attend, ntk_packed])
def test_gradients_of_the_suite(operation: Callable[..., Any]) -> None:
    kernel = Kernel(
        name="interpreted",
        operation=f"ntk_attention.{operation.__name__}",
        call=on_triton(operation),
        array="torch",
        dtypes=("float32", "float16"),
        draws={"d": (5, 16), "dv": (3, 16), "group": (1, 3)},
        gradient=True,
        reads_values=False,
    )
    report = certify(kernel, profile=FEW, laws=["gradient"])
    assert report.passed, report.failures[0]


def test_fewer_and_more_rows_than_a_small_tile() -> None:
    torch.manual_seed(1)
    q, K, V, Z, k = (
        torch.randn(shape)
        for shape in ((9, 2, 3, 8), (9, 1, 3, 8), (9, 1, 3, 5), (2, 8, 5), (2, 8))
    )
    state = init_state(K[:, :, :0], V[:, :, :0])
    out = ntk_attend(q, K, V, Z, k, causal=True, backend="triton")
    for t in range(3):
        now = slice(t, t + 1)
        got, state = step(state, q[:, :, now], K[:, :, now], V[:, :, now], Z, k, backend="triton")
        torch.testing.assert_close(got, out[:, :, now])


def test_fitted_tiles() -> None:
    chosen = replace(SMALL, rows=64, stages=3, registers=128)
    assert chosen.fitted(17) is chosen
    assert chosen.fitted(16) == replace(chosen, rows=16, stages=1, registers=0)
