"""Benchmarks of Mixture-of-Head attention: what skipping rows saves, beside all heads and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa, with_backward

SHARED = 0.25
"""Share of the heads that all tokens use."""


def routed(
    heads: int,
    kv_heads: int,
    tokens: int,
    d: int,
    share: float,
    batch: int = 1,
    causal: bool = True,
) -> Callable[[str, str], dict[str, Any]]:
    """Random q, k, v; a token uses the shared heads and a random choice of the others."""
    whole = qkv(batch, heads, kv_heads, tokens, tokens, d, causal=causal)

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(1)
        order = torch.rand(batch, tokens, heads, generator=generator, device=device)
        order[..., : int(heads * SHARED)] = -1.0
        active = order.argsort(-1).argsort(-1) < round(heads * share)
        return {**whole(device, dtype), "active": active}

    return make


def all_heads(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with every head active, which is dense attention."""
    return {**arguments, "active": None}


def active_cost(factor: float = 1.0) -> Callable[[Mapping[str, Any]], Cost]:
    """Scores and sums of the active rows; `factor` 3.5 for forward and backward together."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        batch, heads, queries, d = q.shape
        keys, dv = k.shape[2], v.shape[3]
        pairs = queries * keys
        if arguments["causal"]:
            pairs -= queries * (queries - 1) / 2
        active = arguments["active"]
        share = 1.0 if active is None else float(active.float().mean())
        out = batch * heads * queries * dv * q.element_size()
        moved = share * bytes_of(q) + bytes_of(k, v) + out
        return Cost(
            2.0 * batch * heads * share * pairs * (d + dv) * factor,
            moved * (1 if factor == 1 else 3),
        )

    return cost


def masked_heads(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """FlexAttention's mask of the rows that are active: it skips tiles without any."""
    keep = arguments["active"].transpose(1, 2).contiguous()
    causal = arguments["causal"]

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        kept = keep[b, h, i]
        return kept & (j <= i) if causal else kept

    return visible


def gated(backward: bool = False) -> Rival:
    """What the authors do: all heads by torch's attention, times 0 or 1."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        gates = arguments["active"].mT[..., None].to(q.dtype)
        grouped = q.shape[1] != k.shape[1]

        def forward() -> Any:
            h = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=arguments["causal"], enable_gqa=grouped
            )
            return h * gates

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("all heads, gated", prepare)


def weighted(
    heads: int, kv_heads: int, tokens: int, d: int, share: float
) -> Callable[[str, str], dict[str, Any]]:
    """As `routed`, with random gates in the active rows and a projection to heads * d channels."""
    whole = routed(heads, kv_heads, tokens, d, share)

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        arguments = whole(device, dtype)
        active = arguments.pop("active")
        generator = torch.Generator(device).manual_seed(2)
        gates = torch.rand(active.shape, generator=generator, device=device) + 0.5
        width = heads * d
        Wo = torch.randn(width, width, generator=generator, device=device) * width**-0.5
        kind = arguments["q"].dtype
        return {**arguments, "gates": torch.where(active, gates, 0.0).to(kind), "Wo": Wo.to(kind)}

    return make


def mixed_cost(arguments: Mapping[str, Any]) -> Cost:
    """The active rows, and the projection of all tokens, which is what is written."""
    gates, Wo = arguments["gates"], arguments["Wo"]
    heads = active_cost()({**arguments, "active": gates != 0})
    tokens = gates.shape[0] * gates.shape[1]
    moved = bytes_of(gates, Wo) + tokens * (Wo.shape[0] - Wo.shape[1]) * Wo.element_size()
    return Cost(heads.flops + 2.0 * tokens * Wo.numel(), heads.bytes + moved)


def gated_and_projected() -> Rival:
    """What the authors do: all heads by torch's attention, times their gates, projected."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v, gates, Wo = (arguments[name] for name in ("q", "k", "v", "gates", "Wo"))
        grouped = q.shape[1] != k.shape[1]

        def forward() -> Any:
            h = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=arguments["causal"], enable_gqa=grouped
            )
            return (h.transpose(1, 2) * gates[..., None]).flatten(2) @ Wo.mT

        return forward

    return Rival("all heads, gated", prepare)


def layer(device: str, heads: tuple[int, int], tokens: int, share: float, d: int) -> Benchmark:
    """Attention, gates and projection together."""
    return Benchmark(
        "moh.moh_attend",
        f"{tokens} tokens, {heads[0]}/{heads[1]} heads of {d}, causal, {share:.0%} active",
        device,
        weighted(*heads, tokens, d, share),
        mixed_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=(gated_and_projected(),),
        settings={"tokens": tokens, "d": d, "heads": list(heads), "active": share},
    )


def attention(
    device: str,
    heads: tuple[int, int],
    tokens: int,
    share: float | None,
    d: int = 128,
    batch: int = 1,
    causal: bool = True,
    backward: bool = False,
) -> Benchmark:
    """`share` of the heads active; None is the same call with all of them, the yardstick."""
    make = routed(*heads, tokens, d, share or 1.0, batch, causal)
    rivals: tuple[Rival, ...] = (torch_sdpa(),)
    if share is not None:
        rivals = (gated(backward), flex(masked_heads, backward, per_head=True))
    elif backward:
        rivals = (sdpa("flash", backward), sdpa("cudnn", backward))
    name = f"{tokens} tokens, {heads[0]}/{heads[1]} heads of {d}"
    name += "" if batch == 1 else f", batch {batch}"
    name += ", causal" if causal else ""
    name += ", all heads" if share is None else f", {share:.0%} active"
    return Benchmark(
        "moh.head_outputs",
        name + (" forward+backward" if backward else ""),
        device,
        make if share is not None else lambda device, dtype: all_heads(make(device, dtype)),
        active_cost(3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={
            "tokens": tokens,
            "d": d,
            "heads": list(heads),
            "batch": batch,
            "active": share or 1.0,
        },
    )


BENCHMARKS = (
    *(attention("cuda", (32, 8), 8192, share) for share in (None, 0.75, 0.5)),
    *(attention("cuda", (32, 8), 32768, share) for share in (None, 0.75, 0.5)),
    *(attention("cuda", (32, 32), 8192, share) for share in (None, 0.75, 0.5)),
    *(attention("cuda", (32, 8), 8192, share, backward=True) for share in (None, 0.75, 0.5)),
    *(
        attention("cuda", (16, 16), 1024, share, d=64, batch=32, causal=False)
        for share in (None, 0.75, 0.5)
    ),
    *(layer("cuda", (32, 8), tokens, 0.75, d=128) for tokens in (8192, 32768)),
    *(attention("cpu", (8, 2), 2048, share, d=64) for share in (None, 0.75, 0.5)),
    layer("cpu", (8, 2), 2048, 0.75, d=64),
)
