"""DiffQKV attention on the flash, decode, columns and select engines.

The engines know one count of kv heads. The heads that keys and values have in common are moved into
the batch, where each part has the smaller count divide the larger one, as a rule, and be 1: it is
then expanded with stride 0, not copied. Only counts like 4 and 6 copy, and layouts in which batch
and heads are no single axis (tokens before heads, and a batch of several).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_device,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    choose_by_dtype,
    product,
    wide,
)
from attnspec.fast.dense.attention import MOST_DECODED, State
from attnspec.fast.engines.columns import selected_attention, weight_rows
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.engines.select import top_k
from attnspec.fast.growing import append, checkable
from attnspec.fast.heads.diffqkv_steps import attend, scores, softmax_rows

__all__ = [
    "attend",
    "attend_selected",
    "cache_bytes",
    "contract_query",
    "diffqkv_attend",
    "head_maps",
    "scores",
    "select_values",
    "selective_attend",
    "softmax_rows",
    "step",
    "union_indices",
]

CLAIMS: dict[str, dict[str, Any]] = {
    "diffqkv_attend": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"graph": True, "configs": SPECIALISED_CONFIGS},
    },
    "contract_query": {"gradient": True, "launches": None},
    "attend_selected": {"launches": None, "triton": {"reads_values": False}},
    **{
        name: {"launches": None}
        for name in (
            "head_maps", "scores", "softmax_rows", "attend", "union_indices",
            "cache_bytes",
        )
    },
}  # fmt: skip
"""A contraction is one batched product, and torch sums the few rows that were gathered."""


def head_maps(Hq: int, Hk: int, Hv: int) -> tuple[Tensor, Tensor]:
    """The key head and the value head of each query head, int64 (Hq,) on the CPU."""
    check_integer("Hq", Hq, least=1)
    for name, heads in (("Hk", Hk), ("Hv", Hv)):
        check_integer(name, heads, least=1)
        if Hq % heads:
            raise ValueError(f"{name}: got {heads}, expected a divisor of the {Hq} query heads")
    h = torch.arange(Hq)
    return h // (Hq // Hk), h // (Hq // Hv)


def contract_query(q: Tensor, E: Tensor, *, backend: str | None = None) -> Tensor:
    """qe (batch, heads, q_tokens, d) of q (batch, heads, q_tokens, wide) by E (heads, wide, d).

    One batched product, accumulated in float32. Differentiable.
    """
    check_tensor("q", q, ("batch", "heads", "q_tokens", "wide"), FLOATS)
    check_tensor("E", E, ("heads", "wide", "d"), FLOATS)
    check_same("E", E, "q", q)
    check_size("E", E.shape[0], q.shape[1], "heads, as in q")
    check_size("E", E.shape[1], q.shape[3], "wide, as in q")
    return product(q, E)


def diffqkv_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, q_tokens, dv) and lse (batch, heads, q_tokens), float32.

    q (batch, heads, q_tokens, d), contracted if it was wider; k (batch, k_heads, k_tokens, d),
    v (batch, v_heads, k_tokens, dv), both head counts dividing that of q; `key_mask` bool (batch,
    k_tokens), True = a real key. d and dv up to 256. Differentiable.
    """
    _check_inputs(q, k, v)
    _check_key_mask(key_mask, k)
    parts = _shared_heads(k, v)
    mask = None if key_mask is None else key_mask[:, None].expand(-1, parts, -1).flatten(0, 1)
    out, lse = flash(
        *_one_head_count(q, k, v), causal=causal, key_mask=mask, scale=scale, backend=backend
    )
    shape = (k.shape[0], parts)
    return out.unflatten(0, shape).flatten(1, 2), lse.unflatten(0, shape).flatten(1, 2)


def select_values(P: Tensor, c: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The keys kept, int64 (batch, heads, q_tokens, min(c, k_tokens)), and their mass.

    P (batch, heads, q_tokens, k_tokens) are the weights of whole rows; the mass (batch, heads,
    q_tokens) has their dtype. By descending weight, equal ones by index.
    """
    check_tensor("P", P, ("batch", "heads", "q_tokens", "k_tokens"), FLOATS)
    check_integer("c", c, least=1)
    idx = top_k(P, c, backend=backend)
    # Ascending indices and a stable sort keep equal weights in the order of their indices.
    kept, order = P.gather(-1, idx).sort(dim=-1, descending=True, stable=True)
    return idx.gather(-1, order), wide(kept).sum(-1).to(P.dtype)


def attend_selected(
    P: Tensor,
    idx: Tensor,
    v: Tensor,
    hv: Tensor,
    *,
    renormalise: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv), in v's dtype, from the kept values alone.

    P (batch, heads, q_tokens, k_tokens), float32 or v's dtype; idx int (batch, heads, q_tokens, c),
    v (batch, v_heads, k_tokens, dv), hv int (heads,), the value head of each query head. Indices
    and map are checked on CPU tensors only: a check on a CUDA device would wait for it.
    """
    check_tensor("P", P, ("batch", "heads", "q_tokens", "k_tokens"), FLOATS)
    check_tensor("idx", idx, ("batch", "heads", "q_tokens", "c"), INTEGERS)
    check_tensor("v", v, ("batch", "v_heads", "k_tokens", "dv"), FLOATS)
    check_tensor("hv", hv, ("heads",), INTEGERS)
    if P.dtype != torch.float32 or v.dtype == torch.float64:
        check_same("v", v, "P", P)
    check_size("v", v.shape[0], P.shape[0], "batch, as in P")
    check_size("v", v.shape[2], P.shape[3], "k_tokens, as in P")
    check_size("hv", hv.shape[0], P.shape[1], "heads, as in P")
    if idx.shape[:3] != P.shape[:3]:
        raise ValueError(f"idx: got shape {tuple(idx.shape)}, expected {tuple(P.shape[:3])} first")
    for name, x, limit in (("idx", idx, P.shape[3]), ("hv", hv, v.shape[1])):
        check_device(name, x, "P", P)
        if checkable(x) and x.numel() and not bool(((x >= 0) & (x < limit)).all()):
            raise ValueError(f"{name}: got entries outside, expected 0..{limit - 1}")
    return _gathered(wide(P).gather(-1, idx.long()), idx, v, hv, renormalise)


def union_indices(idx: Tensor, hv: Tensor) -> list[list[Tensor]]:
    """For each batch entry and value head the keys whose values must be read, ascending.

    idx int (batch, heads, q_tokens, c), hv int (heads,): the union over the heads of a group and
    all rows. How many there are depends on the data: the call waits for the device.
    """
    check_tensor("idx", idx, ("batch", "heads", "q_tokens", "c"), INTEGERS)
    check_tensor("hv", hv, ("heads",), INTEGERS)
    check_size("hv", hv.shape[0], idx.shape[1], "heads, as in idx")
    if hv.numel() == 0 or int(hv.min()) < 0:
        raise ValueError(f"hv: got {hv.tolist()}, expected the value head of each query head")
    hv = hv.to(idx.device)
    return [[torch.unique(entry[hv == g]) for g in range(int(hv.max()) + 1)] for entry in idx]


def cache_bytes(Hk: int, dk: int, Hv: int, dv: int, itemsize: int, S: int) -> int:
    """Bytes of the cache of one sequence of S tokens."""
    sizes = {"Hk": Hk, "dk": dk, "Hv": Hv, "dv": dv, "itemsize": itemsize}
    for name, size in sizes.items():
        check_integer(name, size, least=1)
    check_integer("S", S, least=0)
    return S * itemsize * (Hk * dk + Hv * dv)


def selective_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: int,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    renormalise: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv) from the values of each row's c heaviest keys.

    Arguments as in `diffqkv_attend`. Every key is read, and the weights of whole rows are stored:
    meant for the few queries of a decoder. For inference: there is no gradient.
    """
    _check_inputs(q, k, v)
    check_integer("c", c, least=1)
    _check_key_mask(key_mask, k)
    q, k, v = q.detach(), k.detach(), v.detach()
    if choose_by_dtype(backend, "q", q) == "triton":
        return selected_attention(
            q, k, v, c, causal=causal, key_mask=key_mask, scale=scale, renormalise=renormalise
        )
    P = weight_rows(q, k, causal=causal, key_mask=key_mask, scale=scale, backend=backend)
    idx = top_k(P, c, backend=backend)
    heads = q.shape[1]
    hv = torch.arange(heads, device=v.device) // (heads // v.shape[1])
    return _gathered(P.gather(-1, idx), idx, v, hv, renormalise)


def step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    c: int | None = None,
    renormalise: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Outputs of one or more new tokens, and the state that includes them; with `c`, selective.

    The state is dense attention's and grows **in place**; the first one is `attention.init_state`.
    q (batch, heads, tokens, d), k (batch, k_heads, tokens, d), v (batch, v_heads, tokens, dv). For
    inference: there is no gradient.
    """
    _check_inputs(q, k, v)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    if c is not None:
        check_integer("c", c, least=1)
    for name, cached, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        check_same(name, cached, "q", q)
        if cached.shape[:2] != new.shape[:2] or cached.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name}: got shape {tuple(cached.shape)}, expected that of {tuple(new.shape)}"
            )
    room = getattr(state, "room", None)
    (keys, values), room = append(room, (state.k, state.v), (k.detach(), v.detach()))
    if c is None:
        attention = decode if q.shape[2] <= MOST_DECODED else flash
        rows = q.detach()
        if attention is decode and v.shape[1] % k.shape[1] == 0:
            # A key head is read once for its value heads.
            out, _ = decode(rows, keys, values, scale=scale, backend=backend)
        else:
            out, _ = attention(
                *_one_head_count(rows, keys, values), causal=True, scale=scale, backend=backend
            )
            out = out.unflatten(0, (k.shape[0], _shared_heads(k, v))).flatten(1, 2)
    else:
        out = selective_attend(
            q, keys, values, c, causal=True, scale=scale, renormalise=renormalise, backend=backend
        )
    return out, State(keys, values, room)


def _shared_heads(k: Tensor, v: Tensor) -> int:
    """How many parts the heads fall into such that no key or value head serves two of them."""
    return math.gcd(k.shape[1], v.shape[1])


def _one_head_count(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with the parts in the batch, and as many key as value heads in each."""
    parts = _shared_heads(k, v)
    heads = math.lcm(k.shape[1], v.shape[1]) // parts
    q, k, v = (x.unflatten(1, (parts, x.shape[1] // parts)).flatten(0, 1) for x in (q, k, v))
    return q, _repeated(k, heads), _repeated(v, heads)


def _repeated(x: Tensor, heads: int) -> Tensor:
    if x.shape[1] == 1:
        return x.expand(-1, heads, -1, -1)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _gathered(weights: Tensor, idx: Tensor, v: Tensor, hv: Tensor, renormalise: bool) -> Tensor:
    """The weighted sum of the rows `idx` of v; rows of weight 0 are not looked at."""
    entry = torch.arange(v.shape[0], device=v.device)[:, None, None, None]
    rows = wide(v[entry, hv[:, None, None], idx])
    rows = torch.where((weights == 0)[..., None], 0.0, rows)
    out = product(weights[..., None, :], rows)[..., 0, :]
    if renormalise:
        kept = weights.sum(-1, keepdim=True)
        out = out / torch.where(kept == 0, 1.0, kept)
    return out.to(v.dtype)


def _check_key_mask(key_mask: Any, k: Tensor) -> None:
    if key_mask is None:
        return
    check_tensor("key_mask", key_mask, ("batch", "k_tokens"), (torch.bool,))
    check_size("key_mask", key_mask.shape[0], k.shape[0], "batch, as in k")
    check_size("key_mask", key_mask.shape[1], k.shape[2], "k_tokens, as in k")


def _check_inputs(q: Any, k: Any, v: Any) -> None:
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_tensor("k", k, ("batch", "k_heads", "k_tokens", "d"), FLOATS)
    check_tensor("v", v, ("batch", "v_heads", "k_tokens", "dv"), FLOATS)
    for name, x in (("k", k), ("v", v)):
        check_same(name, x, "q", q)
        check_size(name, x.shape[0], q.shape[0], "batch, as in q")
        if x.shape[1] < 1 or q.shape[1] % x.shape[1]:
            raise ValueError(
                f"{name}: got {x.shape[1]} heads, "
                f"expected a divisor of the {q.shape[1]} query heads"
            )
    check_size("k", k.shape[3], q.shape[3], "d, as in q, contracted if it is wider")
    check_size("v", v.shape[2], k.shape[2], "k_tokens, as in k")
