"""Benchmarks of relative attention: the band inside the kernel, beside writing it to memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival, Unavailable
from attnspec.conformance.bench.rivals import (
    counted_in_32_bits,
    reference,
    sdpa,
    torch_sdpa,
    with_backward,
)
from attnspec.reference.scores.music_transformer import global_attention, local_attention

LARGEST = 16e9
"""Bytes of an array of products that plain torch is asked to write, pad and mask."""


def with_table(
    heads: int, tokens: int, d: int, rows: int, **parameters: Any
) -> Callable[[str, str], dict[str, Any]]:
    """Random q, k, v and a table of N(0, 1/d) for each head."""
    tokens_of = qkv(1, heads, heads, tokens, tokens, d)

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(1)
        table = torch.randn(heads, rows, d, generator=generator, device=device) * d**-0.5
        return {**tokens_of(device, dtype), "E": table.to(getattr(torch, dtype)), **parameters}

    return make


def relative_cost(factor: float = 1.0) -> Callable[[Mapping[str, Any]], Cost]:
    """Attention, and the products of the queries with the table rows they can reach."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v, E = (arguments[name] for name in ("q", "k", "v", "E"))
        batch, heads, tokens, d = q.shape
        b = arguments.get("b")
        if b is None or tokens < 2 * b:
            pairs = tokens * (tokens + 1) / 2
        else:
            pairs = sum(min(i + 1, b + i % b + 1) for i in range(tokens))
        reach = min(E.shape[-2], tokens)
        near = pairs if b is not None else tokens * reach - reach * (reach - 1) / 2
        flops = 2.0 * batch * heads * (pairs * (d + v.shape[3]) + near * d) * factor
        out = batch * heads * tokens * v.shape[3] * q.element_size()
        return Cost(flops, (bytes_of(q, k, v, E) + out) * (1 if factor == 1 else 3))

    return cost


def all_gradients(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The timed call: the operation and the gradients of q, k, v and E."""
    inputs = tuple(arguments[name] for name in ("q", "k", "v", "E"))
    return with_backward(lambda: function(**arguments), inputs)


def flex_gather(backward: bool = False) -> Rival:
    """FlexAttention that looks up the products of queries and table, written to memory before."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v, E = (arguments[name] for name in ("q", "k", "v", "E"))
        tokens, rows, b = q.shape[2], E.shape[-2], arguments.get("b")
        counted_in_32_bits(q.shape[:3].numel() * rows)
        scale = q.shape[3] ** -0.5

        def seen(batch: Any, h: Any, i: Any, j: Any) -> Any:
            ordered = j <= i
            return ordered if b is None or tokens < 2 * b else ordered & (j // b >= i // b - 1)

        blocks = create_block_mask(seen, None, None, tokens, tokens, device=q.device, _compile=True)
        compiled = torch.compile(flex_attention, dynamic=False)

        def forward() -> Any:
            products = (q * scale) @ E.mT

            def score(x: Any, batch: Any, h: Any, i: Any, j: Any) -> Any:
                row = rows - 1 - (i - j)
                found = products[batch, h, i, row.clamp(0, rows - 1)]
                return x + torch.where(row >= 0, found, 0.0)

            return compiled(q, k, v, score_mod=score, block_mask=blocks)

        return with_backward(forward, (q, k, v, E)) if backward else forward

    return Rival("flex, products in memory", prepare)


def skewed() -> Rival:
    """The paper's own way in plain torch: products, one padded column, a reshape, SDPA's bias."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.functional import pad, scaled_dot_product_attention

        q, k, v, E = (arguments[name] for name in ("q", "k", "v", "E"))
        tokens, scale = q.shape[2], q.shape[3] ** -0.5
        size = q.shape[:3].numel() * tokens * q.element_size()
        if size > LARGEST:
            raise Unavailable(f"its arrays of products, {size / 1e9:.0f} GB each, are too large")
        used = pad(E, (0, 0, max(tokens - E.shape[-2], 0), 0))[:, -tokens:]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)

        def forward() -> Any:
            rel = pad((q * scale) @ used.mT, (1, 0))
            rel = rel.reshape(*q.shape[:2], tokens + 1, tokens)[..., 1:, :]
            bias = rel.masked_fill(hidden, -torch.inf)
            return scaled_dot_product_attention(q, k, v, attn_mask=bias)

        return forward

    return Rival("torch, skewed bias", prepare)


def benchmark(
    device: str, tokens: int, d: int, rows: int, b: int | None = None, backward: bool = False
) -> Benchmark:
    on_gpu = device == "cuda"
    heads = 32 if on_gpu else 8
    kind = "global" if b is None else "local"
    own: dict[str, Any] = {} if b is None else {"b": b}
    if on_gpu:
        rivals = [flex_gather(backward)]
        if b is None:
            rivals = [sdpa("flash", backward, causal=True), *rivals]
            rivals += [] if backward else [skewed()]
    else:
        rivals = [torch_sdpa(causal=True), skewed()] if b is None else []
        rivals.append(reference(global_attention if b is None else local_attention))
    return Benchmark(
        f"music_transformer.{kind}_attention",
        f"{tokens // 1024}k d={d} rows={rows} heads={heads}"
        + ("" if b is None else f" b={b}")
        + (" forward+backward" if backward else ""),
        device,
        with_table(heads, tokens, d, rows, **own),
        relative_cost(3.5 if backward else 1.0),
        dtype="bfloat16" if on_gpu else "float32",
        call=all_gradients if backward else None,
        rivals=tuple(rivals),
        settings={"tokens": tokens, "d": d, "rows": rows, "heads": heads, **own},
    )


BENCHMARKS = (
    benchmark("cuda", 8192, 128, 8192),
    benchmark("cuda", 8192, 128, 4096),
    benchmark("cuda", 8192, 64, 8192),
    benchmark("cuda", 32768, 128, 32768),
    benchmark("cuda", 8192, 128, 8192, backward=True),
    benchmark("cuda", 32768, 128, 2048, b=512),
    benchmark("cuda", 32768, 128, 2048, b=512, backward=True),
    benchmark("cpu", 1024, 64, 1024),
    benchmark("cpu", 4096, 64, 512, b=128),
)
