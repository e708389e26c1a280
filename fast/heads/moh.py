"""Mixture-of-Head attention on the flash, decode and select engines.

The active rows of all heads are gathered into one packed sequence a (batch entry, kv head), tokens
ascending, with the chosen heads of a group side by side: they share the keys they read. That is
what the flash engine's offsets and row ends describe, so tiles hold active rows only, forward and
backward, and no kernel is new. The other rows form a last sequence without keys: its tiles write
the zeros. The lists are made from sums over the mask on the device, by two kernels on Triton, and
nothing waits for them.

Padded keys are moved to the end in the same way, since packed sequences take no mask. Keys and
values are read in place where batch, heads and tokens are one axis, else copied. A decoding step
gives the heads that no new token uses a length of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_bool,
    check_device,
    check_same,
    check_size,
    check_tensor,
    product,
    unobserved,
    wide,
)
from attnspec.fast.dense.attention import MOST_DECODED, State
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.engines.select import inverse, take_rows
from attnspec.fast.growing import append
from attnspec.fast.heads.moh_routing import (
    combine_gates,
    group_weights,
    load_balance_loss,
    norm_probs,
    norm_router,
    route,
    routed_gates,
    routed_probs,
    shared_gates,
    straight_through,
    topk_mask,
)
from attnspec.fast.heads.moh_rows import Gathered, front, list_rows

__all__ = [
    "combine_gates",
    "group_weights",
    "head_outputs",
    "load_balance_loss",
    "mix_heads",
    "moh_attend",
    "norm_probs",
    "norm_router",
    "route",
    "routed_gates",
    "routed_probs",
    "shared_gates",
    "step",
    "straight_through",
    "topk_mask",
]

ATTENTION = {
    "gradient": True,
    "blocks": (16, 64),
    "compiled": True,
    "triton": {"graph": True, "configs": SPECIALISED_CONFIGS},
}
CLAIMS: dict[str, dict[str, Any]] = {
    "head_outputs": ATTENTION,
    "moh_attend": ATTENTION,
    **{
        name: {"launches": None, "gradient": True}
        for name in (
            "routed_probs", "routed_gates", "shared_gates", "group_weights", "combine_gates",
            "mix_heads", "norm_probs", "straight_through", "load_balance_loss",
        )
    },
}  # fmt: skip
"""Routers and the mix are dense products and sums as wide as there are heads."""


def head_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor | None = None,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """h (batch, heads, q_tokens, dv), 0 in the rows that are not active, which are not computed.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv); `active` bool (batch, q_tokens, heads), in the layout of gates, all heads unless given;
    `key_mask` bool (batch, k_tokens), True = a real key. With `active`, h is stored tokens before
    heads, as the projection behind it reads it. d and dv up to 256. Differentiable.
    """
    check_attention_inputs(q, k, v, FLOATS)
    options: dict[str, Any] = {"scale": scale, "backend": backend}
    if key_mask is not None:
        _check_key_mask(key_mask, k)
    if active is not None:
        _check_active(active, q)
    if active is None or not (q.numel() and k.numel()):
        return flash(q, k, v, causal=causal, key_mask=key_mask, **options)[0]
    check_bool("causal", causal)
    batch, heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    # Where q lies tokens before heads, it is gathered from there.
    token_first = not q.is_contiguous() and q.transpose(1, 2).is_contiguous()
    rows = list_rows(active, q, k, causal, token_first, key_mask, backend)
    k_offsets = rows.k_offsets
    if key_mask is not None:
        real = front(key_mask[:, None].expand(-1, kv_heads, -1))
        order = inverse(real.places)
        k, v = (_gathered(x.flatten(0, 2), order, real.places) for x in (k, v))
        k_offsets = real.offsets
    else:
        k, v = k.flatten(0, 2), v.flatten(0, 2)
    packed = _gathered(
        (q.transpose(1, 2) if token_first else q).flatten(0, 2), rows.order, rows.back
    )
    out, _ = flash(
        packed[None, None],
        k[None, None],
        v[None, None],
        row_end=rows.ends,
        offsets=(rows.offsets, k_offsets),
        **options,
    )
    h = _gathered(out[0, 0], rows.places, rows.source)
    return h.view(batch, tokens, heads, v.shape[1]).transpose(1, 2)


def mix_heads(
    gates: Tensor,
    head_outputs: Tensor,
    Wo: Tensor,
    bo: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """out (batch, tokens, D) of gates (batch, tokens, H) and head_outputs (batch, H, tokens, dv).

    Wo (D, H * dv), bo (D,); gates float32 or of the others' dtype. Differentiable.
    """
    check_tensor("head_outputs", head_outputs, ("batch", "H", "tokens", "dv"), FLOATS)
    _check_mix(gates, head_outputs, head_outputs.shape, Wo, bo)
    # A gate's gradient is a sum over dv: like the product itself it is taken in float32 or wider.
    mixed = (wide(gates)[..., None] * head_outputs.transpose(1, 2)).to(head_outputs.dtype)
    out = product(mixed.flatten(2), Wo.mT)
    return out if bo is None else out + bo


def moh_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    Wo: Tensor,
    bo: Tensor | None = None,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """out (batch, q_tokens, D); heads whose gate is 0 are not active.

    q, k, v and the keywords as in `head_outputs`; gates (batch, q_tokens, heads), Wo (D, heads *
    dv), bo (D,). Differentiable.
    """
    check_attention_inputs(q, k, v, FLOATS)
    _check_mix(gates, q, (*q.shape[:3], v.shape[3]), Wo, bo)
    h = head_outputs(
        q, k, v, gates != 0, causal=causal, key_mask=key_mask, scale=scale, backend=backend
    )
    return mix_heads(gates, h, Wo, bo)


def step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """h (batch, heads, tokens, dv) of new tokens, and the state that includes them.

    The state is dense attention's and grows **in place**; the first one is `attention.init_state`.
    The cache of a kv head is not read if no new token has an active head in its group. Arguments as
    in `head_outputs`. For inference: there is no gradient.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    if active is not None:
        _check_active(active, q)
    for name, cached, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        check_same(name, cached, "q", q)
        if cached.shape[:2] != new.shape[:2] or cached.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name}: got shape {tuple(cached.shape)}, expected that of {tuple(new.shape)}"
            )
    room = getattr(state, "room", None)
    (keys, values), room = append(room, (state.k, state.v), (k.detach(), v.detach()))
    q = q.detach()
    if q.shape[2] > MOST_DECODED:
        h = head_outputs(q, keys, values, active, causal=True, scale=scale, backend=backend)
    elif active is None:
        h, _ = decode(q, keys, values, scale=scale, backend=backend)
    else:
        used = active.unflatten(2, (k.shape[1], -1)).any(3).any(1)
        lengths = used.to(torch.int32) * keys.shape[2]
        h, _ = decode(q, keys, values, lengths=lengths, scale=scale, backend=backend)
        h = torch.where(active.mT[..., None], h, 0.0)
    return h, State(keys, values, room)


def _gathered(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Rows of x in another order, and of its gradient in that of `back`."""
    return take_rows(x, order) if unobserved(x) else Gathered.apply(x, order, back)


def _check_active(active: Any, q: Tensor) -> None:
    check_tensor("active", active, ("batch", "q_tokens", "heads"), (torch.bool,))
    check_device("active", active, "q", q)
    expected = (q.shape[0], q.shape[2], q.shape[1])
    if tuple(active.shape) != expected:
        raise ValueError(f"active: got shape {tuple(active.shape)}, expected {expected}")


def _check_key_mask(key_mask: Any, k: Tensor) -> None:
    check_tensor("key_mask", key_mask, ("batch", "k_tokens"), (torch.bool,))
    check_device("key_mask", key_mask, "k", k)
    check_size("key_mask", key_mask.shape[0], k.shape[0], "batch, as in k")
    check_size("key_mask", key_mask.shape[1], k.shape[2], "k_tokens, as in k")


def _check_mix(gates: Any, h: Tensor, shape: tuple[int, ...], Wo: Any, bo: Any) -> None:
    """Gates, weight and bias fit head outputs of the dtype and device of `h` and of `shape`."""
    batch, heads, tokens, dv = shape
    check_tensor("gates", gates, ("batch", "tokens", "H"), FLOATS)
    check_tensor("Wo", Wo, ("D", "H * dv"), FLOATS)
    if gates.dtype != torch.float32 or h.dtype == torch.float64:
        check_same("gates", gates, "the heads", h)
    check_device("gates", gates, "the heads", h)
    check_same("Wo", Wo, "the heads", h)
    if tuple(gates.shape) != (batch, tokens, heads):
        raise ValueError(
            f"gates: got shape {tuple(gates.shape)}, expected {(batch, tokens, heads)}"
        )
    check_size("Wo", Wo.shape[1], heads * dv, "H * dv of the heads")
    if bo is not None:
        check_tensor("bo", bo, ("D",), FLOATS)
        check_same("bo", bo, "the heads", h)
        check_size("bo", bo.shape[0], Wo.shape[0], "D, as in Wo")
