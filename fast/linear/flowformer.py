"""Flowformer: flows and aggregation on the scan engine.

The flows are float32 statistics of the tokens, so cheap that memory traffic decides: on Triton they
are two passes of q and k each, which take the features on the way, and only in training are q and k
widened first, so that the parts of their gradients are added in float32. What is left is linear
attention with a read that sees everything (the state behind the last token, for which the scan
engine walks the sources once) or everything up to itself (its causal output).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_device,
    check_size,
    check_tensor,
    choose_backend,
    product,
    wide,
    wide_dtype,
)
from attnspec.fast.engines.scan import scan, step
from attnspec.fast.linear.flowformer_flows import (
    Clamp,
    allocation,
    check_eps,
    check_mask,
    clip,
    competition,
    competition_causal,
    conserved_flows,
    conserved_flows_causal,
    dot,
    flow_features,
    flows,
    flows_causal,
    inverse,
    quotient,
    wide_competition,
    wide_features,
)
from attnspec.fast.linear.flowformer_pair import Pair

__all__ = [
    "allocation",
    "competition",
    "competition_causal",
    "conserved_flows",
    "conserved_flows_causal",
    "flow_attend",
    "flow_attend_causal",
    "flow_decode_step",
    "flow_features",
    "flows",
    "flows_causal",
]

STEPS = (
    "flow_features", "flows", "conserved_flows", "competition", "allocation", "flows_causal",
    "conserved_flows_causal", "competition_causal",
)  # fmt: skip
CLAIMS = {
    **{name: {"launches": None} for name in STEPS},
    "flow_attend": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    "flow_attend_causal": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    "flow_decode_step": {"triton": {"graph": True}},
}
"""What the suite is told beyond the defaults; the steps alone are arithmetic in torch."""


class FlowState(NamedTuple):
    """The sums of b, a, b N / O and a N / I (batch, heads, d), of exp(Oh) (batch, heads), of b
    (c v)^T (batch, heads, d, dv), and the number of tokens N (batch, heads): float32, for query
    heads. N is exact up to 2^24 tokens. Nothing is updated in place.
    """

    sb: Tensor
    sa: Tensor
    sbO: Tensor  # noqa: N815
    saI: Tensor  # noqa: N815
    se: Tensor
    KV: Tensor
    N: Tensor


def flow_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out (batch, heads, n, dv) without a causal order.

    q (batch, heads, n, d), k (batch, kv_heads, m, d), v (batch, kv_heads, m, dv); `key_mask` bool
    (batch, m) and `query_mask` bool (batch, n), True = a real token. Differentiable.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_eps(eps)
    n: Any = q.shape[2]
    m: Any = k.shape[2]
    # Padded rows are replaced before the features, whose slope would be that of NaN. Their own
    # flows are numbers nobody reads: they have no weight in a sum.
    sinks = sources = None
    if query_mask is not None:
        check_mask("query_mask", query_mask, (q.shape[0], n), q)
        q, n = q.masked_fill(~query_mask[:, None, :, None], 0), query_mask.sum(1)
        sinks = query_mask[:, None]
    if key_mask is not None:
        check_mask("key_mask", key_mask, (k.shape[0], m), k)
        no_source = ~key_mask[:, None, :, None]
        k, v, m = k.masked_fill(no_source, 0), v.masked_fill(no_source, 0), key_mask.sum(1)
        sources = key_mask[:, None]
    keys, values = _repeated(q, k, v)
    pair = Pair(q, keys, kind, eps, choose_backend(backend, q))
    ones = pair.ones(sinks, sources)
    I, O, _, _ = pair.flows(ones, None, causal=False)
    of_sinks, of_sources = inverse(I), inverse(O)
    if ones is not None:
        of_sinks, of_sources = of_sinks * ones[0], of_sources * ones[1]
    Ih, Oh, _, _ = pair.flows((of_sinks, of_sources), None, causal=False)
    c = wide_competition(clip(Oh, clamp), key_mask)
    kind_of = _products(q)
    b, weighted = pair.features(pair.y, kind_of), (c[..., None] * values).to(kind_of)
    _, KV = scan(b, b, weighted, backend=backend)
    read = product(pair.features(pair.x, kind_of), KV.to(kind_of))
    g = allocation(Ih, n, m) * of_sinks
    return (g[..., None] * read).to(q.dtype)


def flow_attend_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FlowState | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    backend: str | None = None,
) -> tuple[Tensor, FlowState]:
    """out (batch, heads, T, dv), and the state, float32, behind the last token.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv). Differentiable in
    q, k, v and the state.
    """
    first = _check_causal(q, k, v, state, eps)
    keys, values = _repeated(q, k, v)
    pair = Pair(q, keys, kind, eps, choose_backend(backend, q))
    N = first.N[..., None] + torch.arange(1, q.shape[2] + 1, device=q.device).to(first.N.dtype)
    I, O, sa, sb = pair.flows(None, (first.sa, first.sb))
    share = inverse(I)
    Ih, Oh, saI, sbO = pair.flows((N * share, N * inverse(O)), (first.saI, first.sbO))
    e = torch.exp(clip(Oh / N, clamp))
    se = pair.running(first.se, e)
    u = (N * e / se)[..., None] * values
    kind_of = _products(q)
    a, b = pair.features(pair.x, kind_of), pair.features(pair.y, kind_of)
    read, KV = scan(a, b, u.to(kind_of), state=first.KV, backend=backend)
    out = (torch.sigmoid(Ih / N) * share)[..., None] * read
    if not q.shape[2]:
        return out.to(q.dtype), first
    return out.to(q.dtype), FlowState(sb, sa, sbO, saI, se[:, :, -1], KV, N[:, :, -1])


def flow_decode_step(
    state: FlowState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    backend: str | None = None,
) -> tuple[Tensor, FlowState]:
    """out (batch, heads, 1, dv) of one token, and a new state with it. Nothing waits for the GPU.

    For inference: there is no gradient.
    """
    if state is None:
        raise TypeError("state: got NoneType, expected FlowState")
    first = _check_causal(q, k, v, state, eps)
    check_size("q", q.shape[2], 1, "one token")
    keys, values = _repeated(q, k.detach(), v.detach())
    a, b, values = wide_features(q.detach(), kind), wide_features(keys, kind), wide(values)
    A, B, N = a[:, :, 0], b[:, :, 0], first.N + 1
    sb, sa = first.sb + B, first.sa + A
    I, O = dot(A + eps, sb + eps), dot(B + eps, sa + eps)
    sbO, saI = first.sbO + quotient(B, O / N), first.saI + quotient(A, I / N)
    Ih, Oh = dot(A + eps, sbO + eps) / N, dot(B + eps, saI + eps) / N
    e = torch.exp(clip(Oh, clamp))
    se = first.se + e
    u = (N * e / se)[..., None, None] * values
    read, KV = step(first.KV.to(a.dtype), a, b, u, backend=backend)
    out = torch.sigmoid(Ih)[..., None, None] * quotient(read, I[..., None])
    return out.to(q.dtype), FlowState(sb, sa, sbO, saI, se, KV, N)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v of every query head."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _products(q: Tensor) -> torch.dtype:
    """The dtype of products: sums over all tokens leave the range of float16, and the CPU computes
    in float32 anyway, so that only bfloat16 on CUDA is worth keeping.
    """
    kept = q.dtype == torch.float64 or (q.dtype == torch.bfloat16 and q.is_cuda)
    return q.dtype if kept else torch.float32


def _check_causal(q: Any, k: Any, v: Any, state: Any, eps: Any) -> FlowState:
    """The first state, zeros if there is none, once everything fits."""
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_eps(eps)
    d, dtype = q.shape[3], wide_dtype(q)
    shapes = [(d,)] * 4 + [(), (d, v.shape[3]), ()]
    if state is None:
        return FlowState(
            *(torch.zeros(*q.shape[:2], *s, dtype=dtype, device=q.device) for s in shapes)
        )
    if not isinstance(state, tuple) or len(state) != len(shapes):
        raise TypeError(f"state: got {type(state).__name__}, expected FlowState")
    parts = []
    for name, x, shape in zip(FlowState._fields, state, shapes, strict=True):
        check_tensor(f"state.{name}", x, ("batch", "heads", "d", "dv")[: 2 + len(shape)], FLOATS)
        expected = (*q.shape[:2], *shape)
        if tuple(x.shape) != expected:
            raise ValueError(f"state.{name}: got shape {tuple(x.shape)}, expected {expected}")
        check_device(f"state.{name}", x, "q", q)
        parts.append(x.to(dtype))
    return FlowState(*parts)
