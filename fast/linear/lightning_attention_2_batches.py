"""Lightning Attention-2 over batches of unequal sequences: packed end to end, or padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_integer,
    check_size,
    check_tensor,
    wide,
)
from attnspec.fast.engines.scan import scan, scan_backward
from attnspec.fast.growing import checkable
from attnspec.fast.linear.lightning_attention_2_chunks import as_state, check_slopes, check_upstream


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    offsets: Tensor,
    S0: Tensor | None = None,
    *,
    block: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o (heads, total, e) and the last states S (sequences, heads, d, e) of sequences laid end to
    end.

    q (heads, total, d), k (kv_heads, total, d), v (kv_heads, total, e), s (heads,); offsets int
    (sequences + 1), increasing from 0 to the total; S0 as S. All but s and offsets may have a batch
    axis in front, whose members share the offsets; more than one of them are copied end to end.
    """
    Q, K, V, S, cuts = _pack(q, k, v, s, offsets, S0, block)
    o, last = scan(Q, K, V, slopes=s, state=S, offsets=cuts, block=block, backend=backend)
    return _unpack(o, q), _sequences(last, q)


def attend_packed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    offsets: Tensor,
    S0: Tensor | None,
    do: Tensor,
    dS: Tensor | None = None,
    *,
    block: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, ds (heads,), dS0 (sequences, heads, d, e) of `attend_packed`."""
    Q, K, V, S, cuts = _pack(q, k, v, s, offsets, S0, block)
    check_upstream("do", do, (*q.shape[:-1], v.shape[-1]), q)
    upstream = as_state("dS", dS, _states_shape(q, v, offsets), q)
    dq, dk, dv, ds, dS0 = scan_backward(
        Q, K, V, _lay(do), None if upstream is None else _flat(upstream), slopes=s, state=S,
        offsets=cuts, block=block, backend=backend,
    )  # fmt: skip
    return _unpack(dq, q), _unpack(dk, q), _unpack(dv, q), ds, _sequences(dS0, q)


def attend_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    valid: Tensor,
    S0: Tensor | None = None,
    *,
    block: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o (batch, heads, T, e) and S (batch, heads, d, e) as if the padded tokens were cut out.

    T rows in each of q, k and v; `valid` bool (batch, T) is True at real tokens. What is stored at
    a padded token is replaced by 0 in copies of q, k and v; its output is 0.
    """
    real, g = _check_padded(q, k, v, s, valid, block)
    S0 = as_state("S0", S0, (*q.shape[:2], q.shape[3], v.shape[3]), q)
    q, k, v = (torch.where(real, x, 0.0) for x in (q, k, v))
    o, S = scan(q, k, v, log_decay=g, state=S0, block=block, backend=backend)
    return torch.where(real, o, 0.0), S


def attend_padded_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    valid: Tensor,
    S0: Tensor | None,
    do: Tensor,
    dS: Tensor | None = None,
    *,
    block: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, which are 0 at padded tokens, ds (heads,), dS0 of `attend_padded`."""
    real, g = _check_padded(q, k, v, s, valid, block)
    check_upstream("do", do, (*q.shape[:3], v.shape[3]), q)
    shape = (*q.shape[:2], q.shape[3], v.shape[3])
    first, last = as_state("S0", S0, shape, q), as_state("dS", dS, shape, q)
    q, k, v, do = (torch.where(real, x, 0.0) for x in (q, k, v, do))
    dq, dk, dv, dg, dS0 = scan_backward(
        q, k, v, do, last, log_decay=g, state=first, block=block, backend=backend
    )
    dq, dk, dv = (torch.where(real, x, 0.0) for x in (dq, dk, dv))
    ds = -torch.where(valid[:, None], dg, 0.0).sum((0, 2))
    return dq, dk, dv, ds.to(s.dtype), dS0


def _check_padded(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, valid: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Where tokens are real, (batch, 1, T, 1), and the log decays, float32 at least so that ds is
    summed in it, once the arguments fit one another (K14).
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_slopes(s, q.shape[1])
    check_integer("block", block, least=1)
    check_tensor("valid", valid, ("batch", "tokens"), (torch.bool,))
    if valid.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"valid: got shape {tuple(valid.shape)}, expected {(q.shape[0], q.shape[2])}"
        )
    return valid[:, None, :, None], torch.where(valid[:, None], -wide(s)[:, None], 0.0)


def _pack(
    q: Any, k: Any, v: Any, s: Any, offsets: Any, S0: Any, block: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """One packed batch of 1 and its offsets, once the arguments fit one another (K14)."""
    batched = isinstance(q, Tensor) and q.dim() == 4
    axes = (*(["batch"] if batched else []), "heads", "tokens", "d")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, axes, FLOATS)
    Q, K, V = (x if x.dim() == 4 else x[None] for x in (q, k, v))
    check_attention_inputs(Q, K, V, FLOATS)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_slopes(s, q.shape[-3])
    check_integer("block", block, least=1)
    check_tensor("offsets", offsets, ("sequences + 1",), (torch.int64, torch.int32))
    total = q.shape[-2]
    if checkable(offsets):
        ends_right = len(offsets) >= 2 and int(offsets[0]) == 0 and int(offsets[-1]) == total
        if not ends_right or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"offsets: got {offsets.tolist()}, expected offsets that increase from 0 to {total}"
            )
    state = as_state("S0", S0, _states_shape(q, v, offsets), q)
    cuts, batch = offsets, q.shape[0] if q.dim() == 4 else 1
    if batch > 1:
        starts = torch.arange(batch, device=offsets.device)[:, None] * total + offsets[:-1]
        cuts = torch.cat([starts.flatten(), offsets[-1:] + (batch - 1) * total])
    return _lay(q), _lay(k), _lay(v), None if state is None else _flat(state), cuts


def _lay(x: Tensor) -> Tensor:
    """x with the members of its batch, if any, laid end to end in a batch of 1."""
    if x.dim() == 3:
        return x[None]
    return x if x.shape[0] == 1 else x.transpose(0, 1).flatten(1, 2)[None]


def _unpack(x: Tensor, like: Tensor) -> Tensor:
    """Undo `_lay` for the leading axes of `like`."""
    if like.dim() == 3:
        return x[0]
    return x[0].unflatten(1, (like.shape[0], like.shape[-2])).transpose(0, 1)


def _flat(states: Tensor) -> Tensor:
    """States with the sequences of all members of the batch in one axis."""
    return states.flatten(0, 1) if states.dim() == 5 else states


def _sequences(states: Tensor, like: Tensor) -> Tensor:
    """Undo `_flat` for the leading axes of `like`."""
    return states if like.dim() == 3 else states.unflatten(0, (like.shape[0], -1))


def _states_shape(q: Tensor, v: Tensor, offsets: Tensor) -> tuple[int, ...]:
    return (*q.shape[:-3], offsets.shape[0] - 1, q.shape[-3], q.shape[-1], v.shape[-1])
