"""The scan on the CPU: forward, backward, the states and outputs of segments, and one step.

float16 and bfloat16 inputs are widened to float32 and results rounded back; float64 is computed in
float64. Inputs that are not contiguous are copied, as are value channels that do not fill vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numba
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.backend import count_launch, wide_dtype
from attnspec.fast.engines.scan.numba_walk import REGISTER_BYTES, VECTORS, walk


@dataclass(frozen=True)
class Spans:
    """Where sequences lie: rows starts[n] .. ends[n] of batches[n]."""

    starts: Tensor
    ends: Tensor
    batches: Tensor

    @classmethod
    def of(cls, batch: int, tokens: int, offsets: Tensor | None, segment: int = 0) -> Spans:
        """One span a batch, one a packed sequence, or one for each `segment` rows of a batch."""
        if offsets is not None:
            offsets = offsets.to(torch.int64).contiguous()
            return cls(offsets[:-1], offsets[1:], torch.zeros_like(offsets[1:]))
        starts = torch.arange(0, tokens, segment) if segment else torch.zeros(1, dtype=torch.int64)
        ends = (starts + (segment or tokens)).clamp(max=tokens)
        batches = torch.arange(batch).repeat_interleave(len(starts))
        return cls(starts.repeat(batch), ends.repeat(batch), batches)

    def each(self) -> Iterator[tuple[int, int, int]]:
        """Batch, first row and end row of every span."""
        return zip(self.batches.tolist(), self.starts.tolist(), self.ends.tolist(), strict=True)


def _wide(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic, contiguous."""
    return x.to(wide_dtype(x)).contiguous()


def _fill(x: Tensor) -> Tensor:
    """`x` with zeros behind its channels, so that they fill vector registers."""
    missing = -x.shape[-1] % (REGISTER_BYTES // x.element_size())
    return pad(x, (0, missing)) if missing else x


def _decays(q: Tensor, heads: int, slopes: Tensor | None, log_decay: Tensor | None) -> Tensor:
    """The decay of every step, (batch, heads, tokens, 1 or d), in the dtype of q."""
    batch, _, tokens, _ = q.shape
    if slopes is not None:
        if not bool((slopes >= 0).all()):
            raise ValueError(f"slopes: got {slopes.tolist()}, expected slopes >= 0")
        decay = torch.exp(-slopes.to(q.dtype))[None, :, None, None]
        return decay.expand(batch, heads, tokens, 1).contiguous()
    if log_decay is not None:
        if not bool((log_decay <= 0).all()):
            most = float(log_decay.max())
            raise ValueError(f"log_decay: got values up to {most}, expected values <= 0")
        decay = torch.exp(log_decay.to(q.dtype))
        return (decay if log_decay.dim() == 4 else decay[..., None]).contiguous()
    return torch.ones(batch, heads, tokens, 1, dtype=q.dtype)


def check_offsets(offsets: Tensor | None, tokens: int) -> None:
    """Offsets of packed sequences, if any, increase from 0 to `tokens`."""
    if offsets is None:
        return
    rising = bool((offsets.diff() >= 0).all())
    if int(offsets[0]) != 0 or int(offsets[-1]) != tokens or not rising:
        raise ValueError(
            f"offsets: got {offsets.tolist()}, expected offsets that increase from 0 to {tokens}"
        )


def _walk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, spans: Spans, *,
    backward: bool = False, lanewise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (batch, heads, tokens, width of v) and last states, `state` (sequences, heads, width
    of q, width of v) being the first; see `numba_walk.walk`.
    """
    (batch, _, tokens, _), width, heads = q.shape, v.shape[3], state.shape[1]
    v, state = _fill(v), _fill(state).clone()
    out = torch.empty(batch, heads, tokens, v.shape[3], dtype=q.dtype)
    tasks = max(1, len(spans.starts) * heads)
    groups = -(-v.shape[3] * v.element_size() // (REGISTER_BYTES * VECTORS))
    splits = max(1, min(groups, -(-2 * numba.get_num_threads() // tasks)))
    if lanewise:
        decay = _fill(decay)
    count_launch()
    walk(
        q.numpy(), k.numpy(), v.numpy(), decay.numpy(), state.numpy(), out.numpy(),
        spans.starts.numpy(), spans.ends.numpy(), spans.batches.numpy(), splits, backward, lanewise,
    )  # fmt: skip
    return out[..., :width].contiguous(), state[..., :width].contiguous()


def _scaled(o: Tensor, scale: float) -> Tensor:
    """o times `scale`, in place: a second buffer would cost as much as the scan."""
    return o if scale == 1.0 else o.mul_(scale)


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    """Rows of x (batch, heads, tokens, width) times their weights (batch, heads, tokens)."""
    return x if weights is None else x * weights.to(x.dtype)[..., None]


def _first(state: Tensor | None, q: Tensor, v: Tensor, heads: int, sequences: int) -> Tensor:
    if state is None:
        return torch.zeros(sequences, heads, q.shape[3], v.shape[3], dtype=q.dtype)
    return state.to(q.dtype).contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None,
    reads: Tensor | None, writes: Tensor | None, state: Tensor | None, offsets: Tensor | None,
    scale: float, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (batch, heads, tokens, dv) and the last states (sequences, heads, d, dv)."""
    check_offsets(offsets, q.shape[2])
    dtype, heads = q.dtype, q.shape[1]
    q, k, v = _wide(q), _wide(k), _weighted(_wide(v), writes)
    spans = Spans.of(q.shape[0], q.shape[2], offsets)
    first = _first(state, q, v, heads, len(spans.starts))
    o, final = _walk(q, k, v, _decays(q, heads, slopes, log_decay), first, spans)
    return _weighted(_scaled(o, scale), reads).to(dtype), final


def segment_states(
    k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None, state: Tensor | None,
    heads: int, segment: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The states (batch, heads, segments, d, dv) entering segments, and the last."""
    k, v = _wide(k), _wide(v)
    batch, _, tokens, d = k.shape
    decay = _decays(k, heads, slopes, log_decay)
    spans = Spans.of(batch, tokens, None, segment)
    many = len(spans.starts) // max(batch, 1)
    _, sums = _walk(k, k, v, decay, _first(None, k, v, heads, len(spans.starts)), spans)
    sums = sums.view(batch, many, heads, d, v.shape[3])
    S = _first(state, k, v, heads, batch)
    entering = torch.empty_like(sums)
    for n in range(many):
        entering[:, n] = S
        through = decay[:, :, n * segment : (n + 1) * segment].prod(2)[..., None]
        S = through * S + sums[:, n]
    return entering.transpose(1, 2).contiguous(), S.clone()


def segment_outputs(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None,
    entering: Tensor, scale: float, segment: int,
) -> Tensor:  # fmt: skip
    """o (batch, heads, tokens, dv) from the states entering segments."""
    dtype, heads = q.dtype, q.shape[1]
    q, k, v = _wide(q), _wide(k), _wide(v)
    spans = Spans.of(q.shape[0], q.shape[2], None, segment)
    first = entering.to(q.dtype).transpose(1, 2).flatten(0, 1).contiguous()
    o, _ = _walk(q, k, v, _decays(q, heads, slopes, log_decay), first, spans)
    return _scaled(o, scale).to(dtype)


def backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    log_decay: Tensor | None, reads: Tensor | None, writes: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, final: Tensor, scale: float, block: int, decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, the gradients of the decay (empty unless wanted), of reads and writes (empty
    where there are none) and of the initial state.
    """
    dtype, heads, given = q.dtype, q.shape[1], slopes if slopes is not None else log_decay
    q, k, do, values = _wide(q), _wide(k), _wide(do), _wide(v)
    do = do if scale == 1.0 else do * scale
    unread, do, v = do, _weighted(do, reads), _weighted(values, writes)
    spans = Spans.of(q.shape[0], q.shape[2], offsets)
    decay = _decays(q, heads, slopes, log_decay)
    first = _first(state, q, v, heads, len(spans.starts))
    R = dfinal.to(q.dtype).contiguous()
    lanewise = log_decay is not None and log_decay.dim() == 4
    # Backward, a step decays by the next token's decay, and the first step by none.
    later, full = decay.roll(-1, 2), spans.ends > spans.starts
    later[spans.batches[full], :, spans.ends[full] - 1] = 1.0

    dq, _ = _walk(do, v, k, decay, first.mT.contiguous(), spans, lanewise=lanewise)
    dk, _ = _walk(v, do, q, later, R.mT.contiguous(), spans, backward=True, lanewise=lanewise)
    dv, dstate = _walk(k, q, do, later, R, spans, backward=True)
    dstate[full] *= decay[spans.batches[full], :, spans.starts[full]][..., None]
    dreads, dwrites = q.new_empty(0), q.new_empty(0)
    if reads is not None:
        o, _ = _walk(q, k, v, decay, first, spans)
        dreads = (unread * o).sum(-1).to(reads.dtype)
    ddecay = q.new_empty(0, dtype=dtype)
    if decay_gradient and given is not None:
        keys = k.repeat_interleave(heads // k.shape[1], 1)
        dG, base = (q * dq - keys * dk).double(), (final.double() * R.double()).sum(-1)
        if not lanewise:
            dG, base = dG.sum(-1, keepdim=True), base.sum(-1, keepdim=True)
        dg = torch.empty_like(dG)
        for n, (b, lo, hi) in enumerate(spans.each()):
            dg[b, :, lo:hi] = dG[b, :, lo:hi].flip(1).cumsum(1).flip(1) + base[n][:, None]
        dg = dg if lanewise else dg[..., 0]
        ddecay = (-dg.sum((0, 2)) if slopes is not None else dg).to(given.dtype)
    dv = _sum_groups(dv, v.shape[1])
    if writes is not None:
        dwrites = (dv * values).sum(-1).to(writes.dtype)
    return (
        dq.to(dtype),
        _sum_groups(dk, k.shape[1]).to(dtype),
        _weighted(dv, writes).to(dtype),
        ddecay,
        dreads,
        dwrites,
        dstate,
    )


def _sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """x (batch, heads, tokens, width) summed over the query heads of each kv head."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


def step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    log_decay: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (batch, heads, 1, dv) of one token and the state with it."""
    return forward(q, k, v, slopes, log_decay, None, None, state, None, scale, 0)
