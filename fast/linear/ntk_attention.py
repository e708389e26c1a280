"""NTK-Attention on the flash and decode engines: the prefix is merged in by the lse.

The softmax part is any attention that returns its lse; the prefix costs one small product a query,
whatever its length, and is never seen by the attention kernel: see `ntk_attention_prefix`.
"""

from __future__ import annotations

import functools

from torch import Tensor

from attnspec.fast.backend import check_same, check_size
from attnspec.fast.dense.attention import MOST_DECODED, State
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.prefix import use_config
from attnspec.fast.engines.prefix.configs import CANDIDATES
from attnspec.fast.growing import append
from attnspec.fast.linear.ntk_attention_batches import ntk_packed
from attnspec.fast.linear.ntk_attention_prefix import (
    check_inputs,
    check_prefix,
    merge_in,
    merge_prefix,
    phi,
    prefix_state,
    prefix_terms,
)

__all__ = [
    "merge_prefix",
    "ntk_attend",
    "ntk_packed",
    "phi",
    "prefix_state",
    "prefix_terms",
    "step",
]

CONFIGS = {str(c): functools.partial(use_config, forward=c) for c in CANDIDATES["forward", 128]}
CLAIMS = {
    "ntk_attend": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"graph": True, "configs": CONFIGS},
    },
    "ntk_packed": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"graph": True, "configs": CONFIGS},
    },
    **{
        name: {"launches": None} for name in ("phi", "prefix_state", "prefix_terms", "merge_prefix")
    },
}
"""The prefix alone is a few products and launches no kernel of ours."""


def ntk_attend(
    q: Tensor,
    K: Tensor,
    V: Tensor,
    Z: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    positivity: str = "abs",
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv) of softmax attention with a learned prefix.

    q (batch, heads, q_tokens, d), K (batch, kv_heads, k_tokens, d), V (batch, kv_heads, k_tokens,
    dv), Z (heads, d, dv), k (heads, d), both one for each *query* head; `key_mask` bool (batch,
    k_tokens), True = a real key. A row that sees no key answers with the prefix alone. d and dv up
    to 256. Differentiable in all five.
    """
    check_inputs(q, K, V, Z, scale)
    check_prefix(q, Z, k, positivity)
    soft, lse = flash(q, K, V, causal=causal, key_mask=key_mask, scale=scale, backend=backend)
    return merge_in(q, soft, lse, Z, k, positivity, backend)


def step(
    state: State,
    q: Tensor,
    K: Tensor,
    V: Tensor,
    Z: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    positivity: str = "abs",
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Outputs of one or more new tokens, and the state that includes them.

    The state is dense attention's and grows **in place**; the first one is `attention.init_state`.
    q (batch, heads, tokens, d), K (batch, kv_heads, tokens, d), V (batch, kv_heads, tokens, dv).
    For inference: there is no gradient.
    """
    if not all(hasattr(state, name) for name in ("k", "v")):
        raise TypeError(f"state: got {type(state).__name__}, expected State")
    check_inputs(q, K, V, Z, scale)
    check_prefix(q, Z, k, positivity)
    check_size("K", K.shape[2], q.shape[2], "tokens, as in q")
    for name, cached, new in (("state.k", state.k, K), ("state.v", state.v, V)):
        check_same(name, cached, "q", q)
        if cached.shape[:2] != new.shape[:2] or cached.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name}: got shape {tuple(cached.shape)}, expected that of {tuple(new.shape)}"
            )
    (keys, values), room = append(
        getattr(state, "room", None), (state.k, state.v), (K.detach(), V.detach())
    )
    q, Z, k = q.detach(), Z.detach(), k.detach()
    attention = decode if q.shape[2] <= MOST_DECODED else flash
    soft, lse = attention(q, keys, values, causal=True, scale=scale, backend=backend)
    out = merge_in(q, soft, lse, Z, k, positivity, backend)
    return out, State(keys, values, room)
