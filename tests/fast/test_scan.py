"""The scan engine on the CPU against its recurrence in float64, gradients by autograd."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.scan import (
    scan,
    scan_backward,
    segment_outputs,
    segment_states,
    step,
)
from attnspec.fast.engines.scan.op import scan_backward_op, scan_op

DECAYS = ("none", "constant", "scalar", "vector")


class Case(NamedTuple):
    """Inputs of one call of `scan`, float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


def make(
    decay: str = "scalar", batch: int = 1, heads: int = 2, kv_heads: int = 1, tokens: int = 9,
    d: int = 5, dv: int = 3, sequences: int = 0, strength: float = 0.5, state: bool = True,
    weights: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, tokens, d, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, tokens, d, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, tokens, dv, dtype=torch.float64)
    options: dict[str, Any] = {"scale": 0.7}
    if decay == "constant":
        options["slopes"] = strength * torch.rand(heads, dtype=torch.float64)
    elif decay == "scalar":
        options["log_decay"] = -strength * torch.rand(batch, heads, tokens, dtype=torch.float64)
    elif decay == "vector":
        options["log_decay"] = -strength * torch.rand(batch, heads, tokens, d, dtype=torch.float64)
    if weights:
        options["reads"] = torch.randn(batch, heads, tokens, dtype=torch.float64)
        options["writes"] = torch.randn(batch, kv_heads, tokens, dtype=torch.float64)
    if state:
        options["state"] = torch.randn(sequences or batch, heads, d, dv, dtype=torch.float64)
    return Case(q, k, v, options)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None = None,
    log_decay: Tensor | None = None, reads: Tensor | None = None, writes: Tensor | None = None,
    state: Tensor | None = None, scale: float = 1.0, offsets: list[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, token by token."""
    batch, heads, tokens, d = q.shape
    q = q if reads is None else reads[..., None] * q
    k = k if writes is None else writes[..., None] * k
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    g = torch.zeros(batch, heads, tokens, 1, dtype=q.dtype)
    if slopes is not None:
        g = g - slopes[:, None, None]
    if log_decay is not None:
        g = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    spans = [(b, 0, tokens) for b in range(batch)]
    if offsets is not None:
        spans = [(0, *pair) for pair in pairwise(offsets)]
    rows, states = {}, []
    for n, (b, low, high) in enumerate(spans):
        S = q.new_zeros(heads, d, v.shape[3]) if state is None else state[n]
        for t in range(low, high):
            S = g[b, :, t].exp()[..., None] * S + k[b, :, t, :, None] * v[b, :, t, None, :]
            rows[b, t] = scale * torch.einsum("hde,hd->he", S, q[b, :, t])
        states.append(S)
    out = q.new_empty(batch, heads, 0, v.shape[3])
    if tokens:
        lines = [torch.stack([rows[b, t] for t in range(tokens)], 1) for b in range(batch)]
        out = torch.stack(lines)
    return out, torch.stack(states)


def narrow(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def check(case: Case, dtype: torch.dtype = torch.float32, offsets: list[int] | None = None) -> None:
    """Outputs and all gradients agree with the recurrence to the precision of `dtype`."""
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    q, k, v = (x.to(dtype).double().requires_grad_() for x in case[:3])
    options = {
        name: x.requires_grad_() if isinstance(x, Tensor) else x for name, x in case.options.items()
    }
    expected = recurrence(q, k, v, offsets=offsets, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    Q, K, V = (narrow(x, dtype) for x in (q, k, v))
    given = {name: narrow(x, wide) for name, x in options.items()}
    packed = None if offsets is None else torch.tensor(offsets)
    got = scan(Q, K, V, offsets=packed, **given)
    upstream = [torch.randn_like(x) for x in expected]
    upstream[0] = upstream[0].to(dtype).double()

    leaves = [x for x in (q, k, v, *options.values()) if isinstance(x, Tensor)]
    own = [x for x in (Q, K, V, *given.values()) if isinstance(x, Tensor)]
    right = torch.autograd.grad(expected, leaves, upstream)
    left = torch.autograd.grad(
        got, own, [x.to(y.dtype) for x, y in zip(upstream, got, strict=True)]
    )
    assert got[0].dtype == dtype
    assert got[1].dtype == wide
    for a, b in zip([*got, *left], [*expected, *right], strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max() / (1 + b.abs().max()) if b.numel() else 0.0
        assert error < bound[dtype]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 63, 65])
def test_matches_recurrence(decay: str, tokens: int) -> None:
    check(make(decay, tokens=tokens))


@pytest.mark.parametrize("decay", ["none", "constant", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights(decay: str, dtype: torch.dtype) -> None:
    check(make(decay, batch=2, heads=4, kv_heads=2, tokens=13, weights=True), dtype)


def test_weights_refused() -> None:
    case = make("vector", weights=True)
    with pytest.raises(ValueError, match=r"^reads: got weights beside a decay for every channel"):
        scan(*case[:3], **case.options)
    case = make("scalar", heads=2, kv_heads=1, weights=True)
    wrong = {**case.options, "writes": case.options["reads"]}
    with pytest.raises(ValueError, match=r"^writes: got shape \(1, 2, 9\), expected \(1, 1, 9\)"):
        scan(*case[:3], **wrong)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(decay: str, dtype: torch.dtype) -> None:
    check(make(decay, batch=2, heads=4, kv_heads=2, tokens=13), dtype)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("d", "dv"), [(16, 48), (80, 16), (33, 96), (1, 1)])
def test_widths(decay: str, d: int, dv: int) -> None:
    check(make(decay, tokens=7, d=d, dv=dv, state=False))


@pytest.mark.parametrize("decay", DECAYS)
def test_packed(decay: str) -> None:
    offsets = [0, 0, 5, 6, 6, 20, 20]
    check(make(decay, tokens=20, sequences=6), offsets=offsets)


@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
def test_strong_decay(decay: str) -> None:
    check(make(decay, tokens=40, strength=200.0))


def test_reset() -> None:
    case = make("scalar", tokens=12, heads=1)
    q, k, v = (x.float() for x in case[:3])
    g = case.options["log_decay"].float()
    g[:, :, 7] = -torch.inf
    whole, last = scan(q, k, v, log_decay=g)
    part, end = scan(q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], log_decay=g[:, :, 7:])
    torch.testing.assert_close(whole[:, :, 7:], part)
    torch.testing.assert_close(last, end)


@pytest.mark.parametrize("decay", DECAYS)
def test_layouts(decay: str) -> None:
    """Transposed, sliced, expanded and odd storage give what contiguous inputs give."""
    case = make(decay, batch=2, heads=4, kv_heads=4, tokens=11, d=6, dv=6)
    options = {name: narrow(x, torch.float32) for name, x in case.options.items()}
    q, k, v = (x.float() for x in case[:3])
    expected, _ = scan(q, k, v, **options)
    fused = torch.cat([x.transpose(1, 2) for x in (q, k, v)], -1)
    views = [x.transpose(1, 2) for x in fused.split(6, -1)]
    torch.testing.assert_close(scan(*views, **options)[0], expected)
    apart = [x.mT.contiguous().mT for x in (q, k, v)]
    torch.testing.assert_close(scan(*apart, **options)[0], expected)
    one = k[:, :, :1].expand(k.shape)
    torch.testing.assert_close(
        scan(q, one, v, **options)[0], scan(q, one.contiguous(), v, **options)[0]
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_and_steps(decay: str) -> None:
    """Segments of any length and single steps compose to the whole."""
    case = make(decay, batch=2, heads=4, kv_heads=2, tokens=11)
    q, k, v = (x.float() for x in case[:3])
    options = {name: narrow(x, torch.float32) for name, x in case.options.items()}
    whole, last = scan(q, k, v, **options)
    scale, state = options.pop("scale"), options.pop("state")
    for segment in (1, 3, 11, 20):
        entering, end = segment_states(k, v, segment, heads=4, state=state, **options)
        torch.testing.assert_close(end, last)
        o = segment_outputs(q, k, v, entering, segment, scale=scale, **options)
        torch.testing.assert_close(o, whole)
    for t in range(11):
        now = slice(t, t + 1)
        if "log_decay" in options:
            given = {"log_decay": options["log_decay"][:, :, now]}
        else:
            given = options
        o, state = step(state, q[:, :, now], k[:, :, now], v[:, :, now], scale=scale, **given)
        torch.testing.assert_close(o, whole[:, :, now])
    torch.testing.assert_close(state, last)


def test_explicit_backward() -> None:
    case = make("scalar", tokens=6)
    q, k, v = (x.float().requires_grad_() for x in case[:3])
    options = {name: narrow(x, torch.float32) for name, x in case.options.items()}
    o, _ = scan(q, k, v, **options)
    do = torch.randn_like(o)
    expected = torch.autograd.grad(o, (q, k, v), do)
    got = scan_backward(q.detach(), k.detach(), v.detach(), do, **options)
    for a, b in zip(got[:3], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_tokens() -> None:
    state = torch.randn(1, 2, 4, 3)
    empty = torch.zeros(1, 2, 0, 4, requires_grad=True)
    o, last = scan(empty, empty, empty[..., :3], state=state)
    assert o.shape == (1, 2, 0, 3)
    torch.testing.assert_close(last, state)
    last.sum().backward()
    assert empty.grad is not None


def test_inputs_unchanged() -> None:
    case = make("vector")
    q, k, v = (x.float() for x in case[:3])
    options = {name: narrow(x, torch.float32) for name, x in case.options.items()}
    tensors = [q, k, v, *(x for x in options.values() if isinstance(x, Tensor))]
    copies = [x.clone() for x in tensors]
    scan_backward(q, k, v, torch.ones(1, 2, 9, 3), **options)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_strided_upstream() -> None:
    case = make("constant", tokens=8)
    q, k, v = (x.float().requires_grad_() for x in case[:3])
    o, _ = scan(q, k, v, slopes=case.options["slopes"].float())
    summed = torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)
    dense = torch.autograd.grad(o, (q, k, v), torch.ones_like(o).contiguous())
    for a, b in zip(summed, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("decay", DECAYS)
def test_opcheck(decay: str) -> None:
    case = make(decay, tokens=5, weights=decay != "vector")
    q, k, v = (x.float().requires_grad_() for x in case[:3])
    options = {name: narrow(x, torch.float32) for name, x in case.options.items()}
    slopes, log_decay = options.get("slopes"), options.get("log_decay")
    reads, writes = options.get("reads"), options.get("writes")
    given = (q, k, v, slopes, log_decay, reads, writes, options["state"], None)
    arguments = (*given, 0.7, 0, "numba")
    torch.library.opcheck(scan_op.op, arguments)
    o, last = scan_op(*arguments)
    inputs = (o, last, *given, last, 0.7, 0)
    inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    torch.library.opcheck(scan_backward_op.op, (*inputs, decay != "none", "numba"))


def test_compiles() -> None:
    case = make("scalar")
    q, k, v = (x.float() for x in case[:3])
    options = {name: narrow(x, torch.float32) for name, x in case.options.items()}
    compiled = torch.compile(scan, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, **options), scan(q, k, v, **options))


def test_double_backward_raises() -> None:
    case = make("none", tokens=4)
    q, k, v = (x.float().requires_grad_() for x in case[:3])
    (dq,) = torch.autograd.grad(scan(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="scan_backward"):
        dq.sum().backward()


X = torch.zeros(1, 2, 4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q: got NoneType"),
        ({"q": X.int()}, TypeError, "q: got dtype torch.int32"),
        ({"k": X[:, :, :3]}, ValueError, "v: got 4, expected 3"),
        ({"k": X[..., :2]}, ValueError, "k: got 2, expected 3"),
        ({"q": X[:, :1]}, ValueError, "k: got 2 kv heads for 1 query heads"),
        ({"slopes": torch.zeros(3)}, ValueError, "slopes: got 3, expected 2"),
        ({"slopes": -torch.ones(2)}, ValueError, "slopes: got .* expected slopes >= 0"),
        ({"log_decay": torch.ones(1, 2, 4)}, ValueError, "log_decay: got values up to 1.0"),
        ({"log_decay": torch.zeros(1, 2, 5)}, ValueError, "log_decay: got shape"),
        ({"log_decay": torch.zeros(2, 4)}, ValueError, "log_decay: got shape"),
        (
            {"log_decay": torch.zeros(1, 2, 4), "slopes": torch.zeros(2)},
            ValueError,
            "log_decay: got one beside slopes",
        ),
        ({"state": torch.zeros(1, 2, 3, 4)}, ValueError, "state: got shape"),
        ({"state": X.mT.double()}, TypeError, "state: got dtype torch.float64"),
        ({"offsets": torch.tensor([0, 2])}, ValueError, "offsets: got .* from 0 to 4"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, ValueError, "offsets: got .* from 0 to 4"),
        ({"offsets": torch.tensor([0.0, 4.0])}, TypeError, "offsets: got dtype"),
        ({"block": 0}, ValueError, "block: got 0, expected an integer >= 1"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
        ({"backend": "triton"}, ValueError, "backend: got 'triton' with CPU tensors"),
        ({"v": torch.zeros(1, 2, 4, 300)}, ValueError, "v: got 300 channels, expected 1 to 256"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"q": X, "k": X, "v": X, **change}
    with pytest.raises(error, match=message):
        scan(**arguments)
