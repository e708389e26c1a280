"""Benchmarks of SinkLoRA: training with groups and sinks, and H2O's prompt and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import (
    attention_cost,
    bytes_of,
    forward_and_backward,
    qkv,
)
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa
from attnspec.conformance.contracts.patterns.longlora_speed import (
    pairs_of,
    rolled_sdpa,
    same_segment,
)
from attnspec.reference.patterns.sinklora_h2o import State
from attnspec.reference.patterns.sinklora_heads import plain_heads

SINKS = 4


def pairs_a_head(tokens: int, G: int, heads: int, s: int = SINKS, rho: float = 0.5) -> float:
    """How many pairs a head attends to, on average over plain and shifted ones."""
    stay = plain_heads(heads, rho)
    plain, shifted = (pairs_of(tokens, G, moved, s) for moved in (False, True))
    return (stay * plain + (heads - stay) * shifted) / heads


def groups_and_sinks(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The causal segments with their sinks as a FlexAttention mask function."""
    together = same_segment(arguments["G"], plain_heads(arguments["q"].shape[1], 0.5))
    return lambda batch, h, i, j: (j <= i) & ((j < SINKS) | together(h, i, j))


def training(
    device: str,
    tokens: int,
    heads: tuple[int, int],
    d: int,
    ratio: int = 4,
    backward: bool = False,
    rivals: Any = (),
) -> Benchmark:
    G = tokens // ratio
    return Benchmark(
        "sinklora.sf_attend",
        f"causal {tokens // 1024}k G={G} sinks={SINKS} heads={heads[0]}/{heads[1]}"
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, *heads, tokens, tokens, d, G=G),
        attention_cost(pairs_a_head(tokens, G, heads[0]), 3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": list(heads), "G": G, "s": SINKS},
    )


def cuda(tokens: int, kv_heads: int, backward: bool, ratio: int = 4) -> Benchmark:
    """Beside the authors' way, which is LongLoRA's roll without sinks."""
    rivals = (
        sdpa("flash", backward, causal=True),
        sdpa("cudnn", backward, causal=True),
        rolled_sdpa(backward),
        flex(groups_and_sinks, backward, per_head=True),
    )
    return training("cuda", tokens, (32, kv_heads), 128, ratio, backward, rivals)


def cached(
    heads: int, kv_heads: int, rows: int, new: int, d: int, hh: int, rec: int
) -> Callable[[str, str], dict[str, Any]]:
    """`new` tokens and a state of so many rows."""
    tokens = qkv(1, heads, kv_heads, new, new, d)
    old = qkv(1, kv_heads, kv_heads, rows, rows, d)

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        _, k, v = old(device, dtype).values()
        a = torch.rand(kv_heads, rows, generator=torch.Generator().manual_seed(0)).to(device)
        pos = torch.arange(rows, device=device).expand(kv_heads, rows)
        fields: Any = k, v, a, pos, rows
        return {**tokens(device, dtype), "state": State(*fields), "hh": hh, "rec": rec}

    return make


def step_cost(arguments: Mapping[str, Any]) -> Cost:
    """The rows and the new tokens are read, the output and the rows that stay are written."""
    q, k, v, state = (arguments[name] for name in ("q", "k", "v", "state"))
    w, rows = q.shape[2], state.k.shape[2]
    pairs = w * rows + w * (w + 1) / 2
    read = bytes_of(q, k, v, state.k, state.v, state.a, state.pos)
    kept = min(rows + w, arguments["hh"] + arguments["rec"]) / (rows + w)
    written = bytes_of(q) + kept * (read - bytes_of(q))
    return Cost(2.0 * q.shape[1] * pairs * (k.shape[3] + v.shape[3]), read + written)


def plain_step(compiled: bool) -> Rival:
    """H2O's own way, in torch operations: the weights are a tensor."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v, state = (arguments[name] for name in ("q", "k", "v", "state"))
        hh, rec, w = arguments["hh"], arguments["rec"], q.shape[2]
        group, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
        here = torch.arange(state.seen, state.seen + w, device=q.device).expand(k.shape[1], w)

        def step(state: Any) -> Any:
            keys, values = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            pos, n = torch.cat([state.pos, here], 1), keys.shape[2]
            rows = torch.arange(w, device=q.device)[:, None] + (n - w)
            scores = (q @ keys.repeat_interleave(group, 1).transpose(2, 3)).float() * scale
            scores = scores.masked_fill(torch.arange(n, device=q.device) > rows, float("-inf"))
            weights = scores.softmax(-1)
            out = weights.to(v.dtype) @ values.repeat_interleave(group, 1)
            a = weights.sum(2)[0].unflatten(0, (-1, group)).sum(1)
            a[:, : n - w] += state.a
            heavy = a[:, : n - rec].topk(hh).indices.sort().values
            recent = torch.arange(n - rec, n, device=q.device).expand(len(heavy), rec)
            idx = torch.cat([heavy, recent], 1)
            wide = idx[None, :, :, None].expand(1, *idx.shape, keys.shape[3])
            kept: Any = keys.gather(2, wide), values.gather(2, wide), a.gather(1, idx)
            return out, (*kept, pos.gather(1, idx), state.seen + w)

        call = torch.compile(step, dynamic=False) if compiled else step
        return lambda: call(state)

    return Rival("plain-compiled" if compiled else "plain-torch", prepare)


def stepping(
    device: str, heads: tuple[int, int], rows: int, new: int, d: int, hh: int, rec: int,
    rivals: Any,
) -> Benchmark:  # fmt: skip
    name = f"prompt of {new // 1024}k tokens" if rows == 0 else f"{rows} rows, a token"
    return Benchmark(
        "sinklora.h2o_step",
        f"{name}, heavy {hh} recent {rec}, heads {heads[0]}/{heads[1]}",
        device,
        cached(*heads, rows, new, d, hh, rec),
        step_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=rivals,
        settings={"rows": rows, "new": new, "d": d, "heads": list(heads), "hh": hh, "rec": rec},
    )


CPU_RIVALS = (torch_sdpa(causal=True), rolled_sdpa(False))
PLAIN = (plain_step(False), plain_step(True))
STEPS = (
    stepping("cuda", (32, 8), 2048, 1, 128, 1024, 1024, PLAIN),
    stepping("cuda", (32, 32), 8192, 1, 128, 4096, 4096, PLAIN),
)
BENCHMARKS = (
    cuda(8192, 32, backward=True),
    cuda(32768, 32, backward=True),
    cuda(32768, 8, backward=True),
    cuda(32768, 32, backward=False),
    cuda(32768, 32, backward=False, ratio=16),
    *STEPS,
    *(each.in_a_graph() for each in STEPS),
    stepping("cuda", (32, 8), 0, 8192, 128, 1024, 1024, PLAIN),
    training("cpu", 2048, (8, 8), 64, rivals=CPU_RIVALS),
    stepping("cpu", (8, 2), 1024, 1, 64, 512, 512, PLAIN[:1]),
    stepping("cpu", (8, 2), 0, 2048, 64, 256, 256, PLAIN[:1]),
)
