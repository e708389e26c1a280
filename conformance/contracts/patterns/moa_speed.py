"""Benchmarks of MoA: prefill and training with unequal heads, decoding, and the influence profile.

Half of the heads have a long window and half a short one, in turns or side by side, and their mean
is the density bound of a half or less.
"""

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

SINK = 64


def plan(heads: int, long: int, short: int, mixed: bool) -> dict[str, Any]:
    """Spans of `long` and `short` tokens for half of the heads each, sinks included."""
    spans = (
        [long, short] * (heads // 2) if mixed else [long] * (heads // 2) + [short] * (heads // 2)
    )
    return {"s": (SINK,) * heads, "c": tuple(n - SINK for n in spans)}


def sinks_and_windows(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The token mask as a FlexAttention mask function."""
    import torch

    q, k = arguments["q"], arguments["k"]
    group = q.shape[1] // k.shape[1]
    s, c = (torch.tensor(arguments[name], device=q.device) for name in ("s", "c"))
    return lambda b, h, i, j: (j <= i) & ((j < s[h // group]) | (i - j < c[h // group]))


def seen_a_head(tokens: int, long: int, short: int) -> float:
    """Pairs a head sees, on average of the two spans."""
    return sum(tokens * n - n * (n - 1) / 2 for n in (long, short)) / 2


def prefill(
    device: str,
    tokens: int,
    heads: tuple[int, int],
    d: int,
    spans: tuple[int, int],
    mixed: bool = False,
    backward: bool = False,
    rivals: Any = (),
) -> Benchmark:
    return Benchmark(
        "moa.moa_attend",
        f"{tokens // 1024}k, spans {spans[0]} and {spans[1]}, heads={heads[0]}/{heads[1]}"
        + (" in turns" if mixed else "")
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, *heads, tokens, tokens, d, **plan(heads[1], *spans, mixed)),
        attention_cost(pairs=seen_a_head(tokens, *spans), factor=3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": list(heads), "spans": list(spans)},
    )


def cuda(
    tokens: int, kv_heads: int, spans: tuple[int, int], mixed: bool = False, backward: bool = False
) -> Benchmark:
    rivals = (
        sdpa("flash", backward, causal=True),
        sdpa("cudnn", backward, causal=True),
        flex(sinks_and_windows, backward, per_head=True),
    )
    return prefill("cuda", tokens, (32, kv_heads), 128, spans, mixed, backward, rivals)


def caches(
    batch: int, heads: tuple[int, int], d: int, spans: tuple[int, int]
) -> Callable[[str, str], dict[str, Any]]:
    """Full caches of every head, and a query."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        from attnspec.reference.patterns.moa_cache import Cache

        sizes = plan(heads[1], *spans, mixed=True)
        slots = sum(sizes["s"]) + sum(sizes["c"])
        kind = getattr(torch, dtype)
        generator = torch.Generator(device).manual_seed(0)
        k: Any = torch.randn(batch, slots, d, generator=generator, device=device).to(kind)
        v: Any = torch.randn(batch, slots, d, generator=generator, device=device).to(kind)
        q = torch.randn(batch, heads[0], 1, d, generator=generator, device=device).to(kind)
        count: Any = torch.full((batch,), 2 * max(spans), device=device)
        return {"q": q, "cache": Cache(k, v, count), **sizes}

    return make


def decoding_cost(arguments: Mapping[str, Any]) -> Cost:
    """All slots are read once."""
    q, cache = arguments["q"], arguments["cache"]
    group = q.shape[1] // len(arguments["s"])
    return Cost(4.0 * cache.k.numel() * group, bytes_of(cache.k, cache.v, q, q))


def padded(backend: str) -> Rival:
    """SDPA on caches of one length, the longest, with a mask of the valid slots."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, cache = arguments["q"], arguments["cache"]
        sizes = [a + b for a, b in zip(arguments["s"], arguments["c"], strict=True)]
        most, batch = max(sizes), q.shape[0]
        mask = torch.arange(most, device=q.device) < torch.tensor(sizes, device=q.device)[:, None]
        k, v = (
            torch.stack(
                [
                    torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1]))
                    for part in x.split(sizes, dim=1)
                ],
                dim=1,
            )
            for x in (cache.k, cache.v)
        )
        group = q.shape[1] // len(sizes)
        queries = q.reshape(batch, len(sizes), group, q.shape[3])
        visible = mask[None, :, None].expand(batch, -1, group, -1)
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            queries, k, v, attn_mask=visible
        )

    return Rival(backend, prepare)


def decoding(
    device: str, batch: int, heads: tuple[int, int], d: int, spans: tuple[int, int]
) -> Benchmark:
    return Benchmark(
        "moa.decode",
        f"caches of {spans[0]} and {spans[1]}, batch {batch}, heads={heads[0]}/{heads[1]}",
        device,
        caches(batch, heads, d, spans),
        decoding_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=(padded("sdpa-padded"),),
        settings={"batch": batch, "d": d, "heads": list(heads), "spans": list(spans)},
    )


def with_gradient(tokens: int, heads: tuple[int, int], d: int) -> Any:
    """q, k, v and the gradient of the output."""
    make_inputs = qkv(1, *heads, tokens, tokens, d)

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        arguments = make_inputs(device, dtype)
        return {**arguments, "g": torch.randn_like(arguments["q"])}

    return make


def profile_cost(arguments: Mapping[str, Any]) -> Cost:
    """Scores and slopes of all causal pairs, once for the sums of the rows and once for entries."""
    q, k, v, g = (arguments[name] for name in ("q", "k", "v", "g"))
    batch, heads, tokens, d = q.shape
    pairs = batch * heads * tokens * (tokens + 1) / 2
    blocks = 4.0 * batch * heads * (tokens / 64) ** 2
    return Cost(4.0 * pairs * (d + v.shape[3]), bytes_of(q, k, v, g) + blocks)


def in_torch(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """What the definition says, a head at a time, in float32."""
    import torch

    q, k, v, g = (arguments[name] for name in ("q", "k", "v", "g"))
    heads, T = q.shape[1:3]
    group, b = heads // k.shape[1], 64
    lower = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()

    def call() -> Any:
        blocks = []
        for h in range(heads):
            keys, values = k[:, h // group], v[:, h // group]
            scores = (q[:, h] @ keys.mT).float() * q.shape[3] ** -0.5
            P = torch.softmax(scores.masked_fill(~lower, -torch.inf), dim=-1)
            G = (g[:, h] @ values.mT).float()
            E = P * (G - (P * G).sum(-1, keepdim=True)) / (1 - P + 2.0**-23)
            E[:, 0, 0] = G[:, 0, 0]
            blocks.append(E.abs().unflatten(-1, (-1, b)).unflatten(-3, (-1, b)).sum((-3, -1)))
        return torch.stack(blocks, dim=1)

    return call


def compiled(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The same by torch.compile."""
    import torch

    call: Callable[[], Any] = torch.compile(in_torch(arguments), dynamic=False)
    return call


def profile(device: str, tokens: int, heads: tuple[int, int], d: int, rivals: Any) -> Benchmark:
    return Benchmark(
        "moa.block_influence",
        f"profile of {tokens} tokens, heads={heads[0]}/{heads[1]}",
        device,
        with_gradient(tokens, heads, d),
        profile_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": list(heads)},
    )


TORCH = Rival("torch", in_torch)
STEPS = (
    decoding("cuda", 1, (32, 32), 128, (24576, 4096)),
    decoding("cuda", 16, (32, 8), 128, (8192, 1024)),
)
BENCHMARKS = (
    cuda(131072, 32, (8192, 1024)),
    cuda(131072, 32, (8192, 1024), mixed=True),
    cuda(32768, 32, (24576, 4096)),
    cuda(32768, 8, (8192, 1024)),
    cuda(32768, 32, (8192, 1024), backward=True),
    *STEPS,
    *(each.in_a_graph() for each in STEPS),
    profile("cuda", 8192, (32, 8), 128, (TORCH, Rival("torch-compile", compiled))),
    profile("cuda", 32768, (32, 8), 128, ()),
    prefill("cpu", 4096, (8, 8), 64, (1024, 256), rivals=(torch_sdpa(causal=True),)),
    decoding("cpu", 1, (8, 8), 64, (4096, 512)),
    profile("cpu", 1024, (4, 4), 64, (TORCH,)),
)
