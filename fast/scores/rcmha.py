"""RCMHA on the relative engine and the filter engine.

The relative engine adds to the band of products with R a number for each distance, b, and one for
each key, u . k, so that one product with the queries serves both: scores (q + u) . k + q . R + b
need no second set of queries. The filters of q, k and v are one pass over memory each. Steps that
hand out whole matrices of scores, and the projections, are products of torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.backend import (
    FLOATS,
    check_choice,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.engines.filters import causal_filter
from attnspec.fast.engines.relative import relative
from attnspec.fast.engines.weights import average
from attnspec.fast.growing import Room, append

CLAIMS: dict[str, dict[str, Any]] = {
    "relative_attention": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"graph": True},
    },
    "depthwise_causal_conv": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    "attend_segment": {"compiled": True},
    "step": {"compiled": True},
    **{
        name: {"launches": None}
        for name in (
            "project_heads", "content_scores", "relative_shift", "relative_scores", "memory_mask",
            "attend", "update_memory", "init_state",
        )
    },
}  # fmt: skip


class State(NamedTuple):
    """The last K - 1 rows before the filters, (batch, heads, K - 1, dk), and the filtered keys and
    values so far, with u . k of each key in float32 at least, (batch, heads, tokens).

    A step writes its tokens **in place** into the spare `room` behind them and returns a new state;
    the old one still sees its own tokens. A state goes with the filters and the u of one model.
    """

    q_rows: Tensor
    k_rows: Tensor
    v_rows: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None = None
    room: Room | None = None


def _check_like(name: str, x: Any, other: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of exactly this shape, with the dtype and device of `other`, the tokens."""
    check_tensor(name, x, ("size",) * len(shape), FLOATS)
    check_same(name, x, "the tokens", other)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {shape}")


def _check_heads(name: str, x: Any, q: Tensor) -> None:
    """Keys or values (batch, heads, S, width) for queries q."""
    check_tensor(name, x, ("batch", "heads", "S", "width"), FLOATS)
    _check_like(name, x, q, (*q.shape[:2], *x.shape[2:]))


def project_heads(x: Tensor, W: Tensor, b: Tensor | None, heads: int) -> Tensor:
    """x (batch, T, D) times W (D, D) plus b (D,) if any, as a view (batch, heads, T, D / heads)."""
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    D = x.shape[2]
    _check_like("W", W, x, (D, D))
    check_integer("heads", heads, least=1)
    if D % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of D = {D}")
    y = product(x, W)
    if b is not None:
        _check_like("b", b, x, (D,))
        y = y + b
    return y.unflatten(-1, (heads, D // heads)).transpose(1, 2)


def depthwise_causal_conv(
    p: Tensor, w: Tensor, b: Tensor, state: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel of p (batch, heads, T, dk) mixed with its K - 1 predecessors, and the new state.

    w (dk, K) and b (dk,) serve all heads, w[:, K - 1] is the tap of the token itself; `state`
    (batch, heads, K - 1, dk) holds the rows before p, None zeros. Differentiable in all of them.
    """
    y = causal_filter(p, w, b, state, backend=backend)
    past, T = w.shape[1] - 1, p.shape[2]
    if past <= T:
        return y, p[:, :, T - past :].clone()
    older = pad(p, (0, 0, past - T, 0)) if state is None else torch.cat([state[:, :, T:], p], 2)
    return y, older


def relative_shift(Bmat: Tensor) -> Tensor:
    """(batch, heads, T, S) with result[i, j] = Bmat[i, T + j - i], Bmat having S + T columns."""
    check_tensor("Bmat", Bmat, ("batch", "heads", "T", "S + T"), FLOATS)
    T, columns = Bmat.shape[2:]
    if columns < 2 * T:
        raise ValueError(f"Bmat: got {columns} columns, expected at least 2 T = {2 * T}")
    flat = pad(Bmat, (0, 1)).flatten(2)[..., : T * columns]
    return flat.unflatten(-1, (T, columns))[..., T:]


def content_scores(q: Tensor, u: Tensor, k: Tensor) -> Tensor:
    """(q_i + u) . k_j, unscaled, (batch, heads, T, S).

    q (batch, heads, T, dk), u (heads, dk), k (batch, heads, S, dk).
    """
    check_tensor("q", q, ("batch", "heads", "T", "dk"), FLOATS)
    _check_like("u", u, q, (q.shape[1], q.shape[3]))
    _check_heads("k", k, q)
    check_size("k", k.shape[3], q.shape[3], "dk, as in q")
    return product(wide(q) + wide(u)[:, None], wide(k).mT).to(q.dtype)


def _check_tables(R: Any, b: Any, tokens: Tensor, heads: int, dk: int, S: int) -> int:
    """Tables R (2 P, heads, dk) and b (2 P, heads), P at least the S = M + T tokens; returns P."""
    check_tensor("R", R, ("2 P", "heads", "dk"), FLOATS)
    _check_like("R", R, tokens, (R.shape[0], heads, dk))
    P = R.shape[0] // 2
    if R.shape[0] % 2 or P < S:
        raise ValueError(
            f"R: got {R.shape[0]} rows, expected 2 P of them with P >= M + T = {S} tokens"
        )
    _check_like("b", b, tokens, (R.shape[0], heads))
    return P


def relative_scores(q: Tensor, R: Tensor, b: Tensor, M: int) -> Tensor:
    """q_i . R_r + b_r at r = P + (j - M) - i, unscaled, (batch, heads, T, M + T).

    q (batch, heads, T, dk), R (2 P, heads, dk), b (2 P, heads), `M` tokens of memory before the T.
    """
    check_tensor("q", q, ("batch", "heads", "T", "dk"), FLOATS)
    check_integer("M", M, least=0)
    T = q.shape[2]
    P = _check_tables(R, b, q, q.shape[1], q.shape[3], M + T)
    rows = slice(P - (M + T), P + T)
    products = product(wide(q), wide(R[rows]).permute(1, 2, 0))
    return relative_shift(products + wide(b[rows]).T[:, None]).to(q.dtype)


def memory_mask(T: int, M: int) -> Tensor:
    """bool (T, M + T) on the CPU, True = visible: all of the memory, and j - M <= i."""
    check_integer("T", T, least=0)
    check_integer("M", M, least=0)
    return torch.arange(M + T)[None, :] - M <= torch.arange(T)[:, None]


def attend(scores: Tensor, mask: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (batch, heads, T, dv) and weights (batch, heads, T, S) of scaled scores.

    `mask` is bool (T, S), True = visible, None all; v (batch, heads, S, dv).
    """
    check_tensor("scores", scores, ("batch", "heads", "T", "S"), FLOATS)
    _check_heads("v", v, scores)
    check_size("v", v.shape[2], scores.shape[3], "S, as in scores")
    if mask is not None:
        check_tensor("mask", mask, ("T", "S"), (torch.bool,))
        if mask.shape != scores.shape[2:]:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected {tuple(scores.shape[2:])}"
            )
        scores = torch.where(mask.to(scores.device), scores, -float("inf"))
    return average(scores, v)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    R: Tensor,
    b: Tensor,
    u: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, T, dv) of filtered q, k and v, in linear memory.

    q (batch, heads, T, dk), k (batch, heads, S, dk), v (batch, heads, S, dv) with M = S - T >= 0
    tokens of memory first, dk and dv up to 256; R (2 P, heads, dk) and b (2 P, heads) with P >= S,
    u (heads, dk). Differentiable in all of them; u . k and b are kept in float32.
    """
    check_tensor("q", q, ("batch", "heads", "T", "dk"), FLOATS)
    _check_heads("k", k, q)
    _check_heads("v", v, q)
    T, S = q.shape[2], k.shape[2]
    check_size("k", k.shape[3], q.shape[3], "dk, as in q")
    if S < T:
        raise ValueError(f"k: got {S} tokens, expected at least the {T} of q")
    check_size("v", v.shape[2], S, "S tokens, as in k")
    _check_like("u", u, q, (q.shape[1], q.shape[3]))
    _check_tables(R, b, q, q.shape[1], q.shape[3], S)
    return _attend_keys(q, k, v, _key_bias(k, u), R, b, scale, causal, backend)


def _key_bias(k: Tensor, u: Tensor) -> Tensor:
    """u . k_j of the keys k (batch, heads, S, dk), (batch, heads, S), in float32 at least."""
    return product(wide(k), wide(u)[..., None])[..., 0]


def _attend_keys(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, R: Tensor, b: Tensor, scale: float | None,
    causal: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    """`relative_attention` with u . k computed."""
    T, S, P = q.shape[2], k.shape[2], R.shape[0] // 2
    first, stop = P - max(S - 1, 0), P + (1 if causal else max(T, 1))
    return relative(
        q, k, v, R[first:stop].transpose(0, 1), zero=P - first, scale=scale, causal=causal,
        table_bias=wide(b[first:stop]).T, key_bias=key_bias, backend=backend,
    )[0]  # fmt: skip


def _check_filters(w: Any, c: Any, tokens: Tensor, dk: int) -> None:
    check_tensor("w", w, ("qkv", "dk", "K"), FLOATS)
    _check_like("w", w, tokens, (3, dk, w.shape[2]))
    _check_like("c", c, tokens, (3, dk))


def attend_segment(
    x: Tensor,
    memory: Tensor | None,
    W: Tensor,
    biases: Tensor,
    w: Tensor,
    c: Tensor,
    R: Tensor,
    b: Tensor,
    u: Tensor,
    q_conv_state: str = "reset",
    *,
    backend: str | None = None,
) -> Tensor:
    """A segment x (batch, T, D) after its memory (batch, M, D) or none, (batch, T, D).

    W (4, D, D) holds Wq, Wk, Wv and Wo, `biases` (2, D) those of v and of the output, w (3, dk, K)
    and c (3, dk) the filters of q, k and v; tables as in `relative_attention`. With `q_conv_state`
    "reset" the filters of q see zeros before the segment, with "carry" the memory. Differentiable.
    """
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    check_tensor("u", u, ("heads", "dk"), FLOATS)
    (_, T, D), (heads, dk) = x.shape, u.shape
    _check_like("W", W, x, (4, D, D))
    _check_like("biases", biases, x, (2, D))
    check_same("u", u, "x", x)
    check_size("u", heads * dk, D, "heads times dk, as in x")
    _check_filters(w, c, x, dk)
    check_choice("q_conv_state", q_conv_state, ("reset", "carry"))
    kvx = x
    if memory is not None:
        _check_memory("memory", memory, x)
        kvx = torch.cat([memory, x], 1)
    _check_tables(R, b, x, heads, dk, kvx.shape[1])
    source = kvx if q_conv_state == "carry" else x
    q, k, v = (
        causal_filter(
            project_heads(y, W[n], biases[0] if n == 2 else None, heads), w[n], c[n],
            backend=backend,
        )
        for n, y in enumerate((source, kvx, kvx))
    )  # fmt: skip
    o = relative_attention(q[:, :, q.shape[2] - T :], k, v, R, b, u, backend=backend)
    return product(o.transpose(1, 2).reshape(x.shape), W[3]) + biases[1]


def _check_memory(name: str, memory: Any, x: Tensor) -> None:
    check_tensor(name, memory, ("batch", "M", "D"), FLOATS)
    _check_like(name, memory, x, (x.shape[0], memory.shape[1], x.shape[2]))


def update_memory(old: Tensor | None, new: Tensor, mem_len: int) -> Tensor:
    """The last `mem_len` tokens of old (batch, M, D), or none, and new (batch, T, D), detached."""
    check_tensor("new", new, ("batch", "T", "D"), FLOATS)
    check_integer("mem_len", mem_len, least=0)
    kept = new
    if old is not None:
        _check_memory("old", old, new)
        kept = torch.cat([old, new], 1)
    return kept[:, max(kept.shape[1] - mem_len, 0) :].detach().clone()


def init_state(p: Tensor, K: int) -> State:
    """The state before the first token, for rows like p (batch, heads, T, dk) and `K` taps."""
    check_tensor("p", p, ("batch", "heads", "T", "dk"), FLOATS)
    check_integer("K", K, least=1)
    rows, cache = p.new_zeros(*p.shape[:2], K - 1, p.shape[3]), p[:, :, :0]
    return State(rows, rows.clone(), rows.clone(), cache.clone(), cache.clone())


@torch.no_grad()
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    c: Tensor,
    R: Tensor,
    b: Tensor,
    u: Tensor,
    state: State,
    *,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Outputs (batch, heads, T, dk) of T new tokens, and the state after them.

    q, k and v (batch, heads, T, dk) are projected and not yet filtered; w (3, dk, K) and c (3, dk)
    are their filters; the tables need P of at least all tokens so far. For inference: there is no
    gradient.
    """
    check_tensor("q", q, ("batch", "heads", "T", "dk"), FLOATS)
    for name, x in (("k", k), ("v", v)):
        _check_like(name, x, q, tuple(q.shape))
    _check_filters(w, c, q, q.shape[3])
    if not (isinstance(state, tuple) and hasattr(state, "v_rows")):
        raise TypeError(f"state: got {type(state).__name__}, expected a State")
    _check_heads("state", state.k, q)
    _check_like("state", state.v, q, tuple(state.k.shape))
    check_size("state", state.k.shape[3], q.shape[3], "dk, as in q")
    _check_like("u", u, q, (q.shape[1], q.shape[3]))
    _check_tables(R, b, q, q.shape[1], q.shape[3], state.k.shape[2] + q.shape[2])
    (qf, q_rows), (kf, k_rows), (vf, v_rows) = (
        depthwise_causal_conv(x, w[n], c[n], rows, backend=backend)
        for n, (x, rows) in enumerate(zip((q, k, v), state[:3], strict=True))
    )
    # A state of another making has neither yet.
    key_bias, room = getattr(state, "key_bias", None), getattr(state, "room", None)
    old = (state.k, state.v, _key_bias(state.k, u) if key_bias is None else key_bias)
    (keys, values, key_bias), room = append(room, old, (kf, vf, _key_bias(kf, u)))
    out = _attend_keys(qf, keys, values, key_bias, R, b, None, True, backend)
    return out, State(q_rows, k_rows, v_rows, keys, values, key_bias, room)
