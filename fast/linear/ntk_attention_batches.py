"""NTK-Attention over sequences laid end to end: packed flash attention, then one prefix for all."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.backend import FLOATS, check_tensor
from attnspec.fast.engines.flash import flash
from attnspec.fast.linear.ntk_attention_prefix import check_inputs, check_prefix, merge_in


def ntk_packed(
    q: Tensor,
    K: Tensor,
    V: Tensor,
    Z: Tensor,
    k: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    positivity: str = "abs",
    backend: str | None = None,
) -> Tensor:
    """Outputs (heads, q_total, dv) inside each of the sequences laid end to end, which share one
    learned prefix.

    q (heads, q_total, d), K (kv_heads, k_total, d), V (kv_heads, k_total, dv), Z (heads, d, dv), k
    (heads, d); offsets int (sequences + 1), increasing from 0 to the total, which is checked on CPU
    tensors only: a check on a CUDA device would wait for it. A row whose sequence has no key
    answers with the prefix alone. Differentiable in q, K, V, Z and k.
    """
    for name, x, axes in (
        ("q", q, ("heads", "q_total", "d")),
        ("K", K, ("kv_heads", "k_total", "d")),
        ("V", V, ("kv_heads", "k_total", "dv")),
    ):
        check_tensor(name, x, axes, FLOATS)
    q, K, V = q[None], K[None], V[None]
    check_inputs(q, K, V, Z, scale)
    check_prefix(q, Z, k, positivity)
    soft, lse = flash(
        q, K, V, causal=causal, offsets=(q_offsets, k_offsets), scale=scale, backend=backend
    )
    return merge_in(q, soft, lse, Z, k, positivity, backend)[0]
