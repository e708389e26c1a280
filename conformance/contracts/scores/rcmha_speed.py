"""Benchmarks of RCMHA: its attention with a memory and without, and its filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import (
    counted_in_32_bits,
    reference,
    sdpa,
    torch_sdpa,
    with_backward,
)
from attnspec.reference.scores.rcmha import depthwise_causal_conv, relative_attention

INPUTS = ("q", "k", "v", "R", "b", "u")


def with_tables(
    heads: int, queries: int, memory: int, d: int
) -> Callable[[str, str], dict[str, Any]]:
    """Random q, k and v with tables of N(0, 1/d) just long enough."""
    keys = memory + queries
    tokens_of = qkv(1, heads, heads, queries, keys, d)

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(1)
        shapes = {"R": (2 * keys, heads, d), "b": (2 * keys, heads), "u": (heads, d)}
        tables = {
            name: torch.randn(shape, generator=generator, device=device) * d**-0.5
            for name, shape in shapes.items()
        }
        tables = {name: x.to(getattr(torch, dtype)) for name, x in tables.items()}
        return {**tokens_of(device, dtype), **tables}

    return make


def attention_cost(factor: float = 1.0) -> Callable[[Mapping[str, Any]], Cost]:
    """Two products of width d and one of width dv for every visible pair.

    Of the tables only the rows of distances that occur need be read.
    """

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v, u = (arguments[name] for name in ("q", "k", "v", "u"))
        batch, heads, queries, d = q.shape
        keys, dv = v.shape[2:]
        pairs = queries * keys - queries * (queries - 1) / 2
        tables = keys * heads * (d + 1) * q.element_size()
        moved = bytes_of(q, k, v, u) + tables + batch * heads * queries * dv * q.element_size()
        flops = 2.0 * batch * heads * pairs * (2 * d + dv) * factor
        return Cost(flops, moved * (1 if factor == 1 else 3))

    return cost


def all_gradients(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The timed call: the attention and the gradients of all its inputs."""
    inputs = tuple(arguments[name] for name in INPUTS)
    return with_backward(lambda: function(**arguments), inputs)


def table_products(arguments: Mapping[str, Any]) -> Any:
    """B = q R' + b for the rows that S keys need, (batch, heads, T, S + T)."""
    q, R, b = (arguments[name] for name in ("q", "R", "b"))
    T, S, P = q.shape[2], arguments["k"].shape[2], len(R) // 2
    rows = slice(P - S, P + T)
    return q @ R[rows].permute(1, 2, 0) + b[rows].T[:, None]


def flex_gather(backward: bool = False) -> Rival:
    """FlexAttention on q + u that looks up the products with the table, written out before."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v, u = (arguments[name] for name in ("q", "k", "v", "u"))
        T, S, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
        counted_in_32_bits(q.shape[0] * q.shape[1] * T * (S + T))

        def seen(batch: Any, h: Any, i: Any, j: Any) -> Any:
            return j - (S - T) <= i

        blocks = create_block_mask(seen, None, None, T, S, device=q.device, _compile=True)
        compiled = torch.compile(flex_attention, dynamic=False)

        def forward() -> Any:
            products = table_products(arguments) * scale

            def score(x: Any, batch: Any, h: Any, i: Any, j: Any) -> Any:
                return x + products[batch, h, i, T + j - i]

            return compiled(q + u[:, None], k, v, score_mod=score, block_mask=blocks)

        inputs = tuple(arguments[name] for name in INPUTS)
        return with_backward(forward, inputs) if backward else forward

    return Rival("flex, products in memory", prepare)


def shifted(compiled: bool = False) -> Rival:
    """The authors' own way in plain torch: products, the shift, a mask, and SDPA's bias."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.functional import pad, scaled_dot_product_attention

        q, k, v, u = (arguments[name] for name in ("q", "k", "v", "u"))
        T, S = q.shape[2], k.shape[2]
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)

        def forward() -> Any:
            flat = pad(table_products(arguments), (0, 1)).flatten(2)[..., : T * (S + T)]
            bias = flat.unflatten(-1, (T, S + T))[..., T:] * q.shape[3] ** -0.5
            bias = bias.masked_fill(hidden, -torch.inf)
            return scaled_dot_product_attention(q + u[:, None], k, v, attn_mask=bias)

        return torch.compile(forward, dynamic=False) if compiled else forward

    return Rival("torch.compile, shifted bias" if compiled else "torch, shifted bias", prepare)


def attention(
    device: str, queries: int, memory: int, d: int, heads: int, backward: bool = False
) -> Benchmark:
    on_gpu = device == "cuda"
    if on_gpu:
        rivals = [flex_gather(backward)]
        rivals += [] if memory else [sdpa("flash", backward, causal=True)]
        rivals += [] if backward else [shifted(), shifted(compiled=True)]
    else:
        rivals = [shifted(), reference(relative_attention)]
        rivals += [] if memory else [torch_sdpa(causal=True)]
    return Benchmark(
        "rcmha.relative_attention",
        f"{queries} queries, {memory} before, d={d} heads={heads}"
        + (" forward+backward" if backward else ""),
        device,
        with_tables(heads, queries, memory, d),
        attention_cost(3.5 if backward else 1.0),
        dtype="bfloat16" if on_gpu else "float32",
        call=all_gradients if backward else None,
        rivals=tuple(rivals),
        settings={"queries": queries, "memory": memory, "d": d, "heads": heads},
    )


def make_filter(heads: int, tokens: int, d: int, taps: int) -> Callable[[str, str], dict[str, Any]]:
    """Projected rows as they come from a projection, heads side by side, and filters."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        shapes = {"p": (1, tokens, heads, d), "w": (d, taps), "b": (d,)}
        arrays = {
            name: torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
            for name, shape in shapes.items()
        }
        return {**arrays, "p": arrays["p"].transpose(1, 2)}

    return make


def filter_cost(factor: int) -> Callable[[Mapping[str, Any]], Cost]:
    """Every row read once and written once; backward also reads the upstream gradient."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        p, w = arguments["p"], arguments["w"]
        moved = bytes_of(p) * (2 if factor == 1 else 5)
        return Cost(2.0 * p.numel() * w.shape[1] * factor, moved)

    return cost


def filter_gradients(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[], Any]:
    """The timed call: the filter and the gradients of rows, taps and biases."""
    inputs = tuple(arguments[name] for name in ("p", "w", "b"))
    return with_backward(lambda: function(**arguments), inputs)


def torch_conv(backward: bool = False) -> Rival:
    """torch's depthwise convolution, channels before tokens, as the authors call it."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        from torch.nn.functional import conv1d

        p, w, b = (arguments[name] for name in ("p", "w", "b"))
        batch, heads, tokens, d = p.shape

        def forward() -> Any:
            rows = p.transpose(2, 3).reshape(batch * heads, d, tokens)
            y = conv1d(rows, w[:, None], b, padding=w.shape[1] - 1, groups=d)[..., :tokens]
            return y.reshape(batch, heads, d, tokens).transpose(2, 3).contiguous()

        return with_backward(forward, (p, w, b)) if backward else forward

    return Rival("torch conv1d", prepare)


def compiled_shifts(backward: bool = False) -> Rival:
    """A sum of shifted copies, fused by torch.compile."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.functional import pad

        p, w, b = (arguments[name] for name in ("p", "w", "b"))
        taps, tokens = w.shape[1], p.shape[2]

        def run(p: Any, w: Any, b: Any) -> Any:
            rows = pad(p, (0, 0, taps - 1, 0))
            return b + sum(w[:, u] * rows[:, :, u : u + tokens] for u in range(taps))

        compiled = torch.compile(run, dynamic=False)
        return with_backward(lambda: compiled(p, w, b), (p, w, b)) if backward else (
            lambda: compiled(p, w, b)
        )  # fmt: skip

    return Rival("torch.compile, shifted sums", prepare)


def short_filter(device: str, tokens: int, heads: int, d: int, backward: bool = False) -> Benchmark:
    on_gpu = device == "cuda"
    rivals = [torch_conv(backward)]
    rivals += [compiled_shifts(backward)] if on_gpu else [reference(depthwise_causal_conv)]
    return Benchmark(
        "rcmha.depthwise_causal_conv",
        f"{tokens} tokens, d={d} heads={heads}" + (" forward+backward" if backward else ""),
        device,
        make_filter(heads, tokens, d, 3),
        filter_cost(3 if backward else 1),
        dtype="bfloat16" if on_gpu else "float32",
        call=filter_gradients if backward else None,
        rivals=tuple(rivals),
        settings={"tokens": tokens, "d": d, "heads": heads},
    )


BENCHMARKS = (
    attention("cuda", 8192, 0, 128, 32),
    attention("cuda", 2048, 6144, 128, 32),
    attention("cuda", 8192, 0, 64, 32),
    attention("cuda", 8192, 0, 128, 32, backward=True),
    attention("cuda", 2048, 2048, 64, 32, backward=True),
    short_filter("cuda", 32768, 32, 128),
    short_filter("cuda", 32768, 32, 128, backward=True),
    attention("cpu", 1024, 0, 64, 8),
    attention("cpu", 256, 768, 64, 8),
    short_filter("cpu", 4096, 8, 64),
)
