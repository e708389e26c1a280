"""Flowformer: flows and aggregation on the scan engine.

The flows are float32 statistics of the tokens, so cheap that memory traffic decides. On Triton and
without a gradient the whole chain is a few kernels, which read the tokens and write the output.
Otherwise flows are two passes of q and k each, which take the features on the way; in training q
and k are widened first, so that the parts of their gradients are added in float32. What is left is
linear attention with a read that sees everything (the state behind the last token, for which the
scan engine walks the sources once) or everything up to itself (its causal output).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_choice,
    check_size,
    check_tensor,
    choose_backend,
    choose_by_dtype,
    product,
    wide,
)
from attnspec.fast.engines.scan import DirectFlows, packed_flows, scan, step
from attnspec.fast.linear.flowformer_flows import (
    KINDS,
    Clamp,
    allocation,
    check_clamp,
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
from attnspec.fast.linear.flowformer_state import (
    FlowState,
    check_tokens,
    checked_state,
    no_tokens,
)
from attnspec.fast.packing import check_offsets

__all__ = [
    "allocation",
    "competition",
    "competition_causal",
    "conserved_flows",
    "conserved_flows_causal",
    "flow_attend",
    "flow_attend_causal",
    "flow_attend_packed",
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
    "flow_attend_packed": {"gradient": True, "triton": {"compiled": True}},
    "flow_decode_step": {"triton": {"graph": True}},
}
"""What the suite is told beyond the defaults; the steps alone are arithmetic in torch."""


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
    options = (eps, kind, clamp)
    direct = DirectFlows("flow_attend", (q, k, v, key_mask, query_mask), backend, *options)
    if direct.known is not None:
        return direct.known[0]
    check_attention_inputs(q, k, v, FLOATS)
    check_eps(eps)
    check_choice("kind", kind, KINDS)
    bounds = check_clamp(clamp)
    n: Any = q.shape[2]
    m: Any = k.shape[2]
    if query_mask is not None:
        check_mask("query_mask", query_mask, (q.shape[0], n), q)
    if key_mask is not None:
        check_mask("key_mask", key_mask, (k.shape[0], m), k)
    if choose_backend(backend, q) == "triton" and direct.serves():
        return direct.attend(eps, kind, bounds)
    # Padded rows are replaced before the features, whose slope would be that of NaN. Their own
    # flows are numbers nobody reads: they have no weight in a sum.
    sinks = sources = None
    if query_mask is not None:
        q, n = q.masked_fill(~query_mask[:, None, :, None], 0), query_mask.sum(1)
        sinks = query_mask[:, None]
    if key_mask is not None:
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
    parts = () if state is None else state if isinstance(state, tuple) else (state,)
    options = (state is None, eps, kind, clamp)
    direct = DirectFlows("flow_attend_causal", (q, k, v, *parts), backend, *options)
    if direct.known is not None:
        out, *last = direct.known
        return out, FlowState(*last)
    check_tokens(q, k, v, eps)
    check_choice("kind", kind, KINDS)
    bounds = check_clamp(clamp)
    given = None if state is None else checked_state(state, q, v)
    if choose_backend(backend, q) == "triton" and direct.serves(gradient=True):
        out, *last = direct.attend_in_order(given, eps, kind, bounds)
        return out, FlowState(*last)
    first = no_tokens(q, v) if given is None else given
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


def flow_attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    state: FlowState | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    backend: str | None = None,
) -> tuple[Tensor, FlowState]:
    """out (heads, total, dv), and the float32 states, whose parts have an axis of sequences in
    front, behind the last token of each.

    q (heads, total, d), k (kv_heads, total, d), v (kv_heads, total, dv), offsets int (sequences +
    1) increasing from 0 to total; `state` is likewise. Differentiable in q, k, v and the state.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, ("heads", "total", "d"), FLOATS)
    check_tokens(q[None], k[None], v[None], eps)
    check_choice("kind", kind, KINDS)
    bounds = check_clamp(clamp)
    check_offsets(offsets, "q", q, q.shape[1])
    like = q.new_empty(offsets.shape[0] - 1, q.shape[0], 0, q.shape[2])
    first = None if state is None else checked_state(state, like, v[None])
    if not q.numel():
        first = no_tokens(like, v[None]) if first is None else first
        return q.new_empty(*q.shape[:2], v.shape[2]), first
    if choose_by_dtype(backend, "q", q) == "triton":
        out, *last = packed_flows(q, k, v, offsets, first, eps=eps, kind=kind, clamp=bounds)
        return out, FlowState(*last)
    first = no_tokens(like, v[None]) if first is None else first
    outputs, states = [], []
    options: dict[str, Any] = {"eps": eps, "kind": kind, "clamp": clamp, "backend": backend}
    for n, (start, end) in enumerate(pairwise(offsets.tolist())):
        Q, K, V = (x[None, :, start:end] for x in (q, k, v))
        before = FlowState(*(x[n, None] for x in first))
        out, after = flow_attend_causal(Q, K, V, before, **options)
        outputs.append(out[0])
        states.append(after)
    parts = (torch.cat(x) for x in zip(*states, strict=True))
    return torch.cat(outputs, 1), FlowState(*parts)


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
    check_tokens(q, k, v, eps)
    first = checked_state(state, q, v)
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
