"""Benchmarks of composite attention: prompts with images, beside attention of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import with_backward


def prompt(
    texts: int, images: int, heads: int, kv_heads: int, d: int, placed: bool
) -> Callable[[str, str], dict[str, Any]]:
    """Random qt of the text tokens, k and v of all, images first; with `placed`, positions too."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        tokens = texts + images
        shapes = {"qt": (heads, texts), "k": (kv_heads, tokens), "v": (kv_heads, tokens)}
        arguments = {
            name: torch.randn(1, *shape, d, generator=generator, device=device).to(
                getattr(torch, dtype)
            )
            for name, shape in shapes.items()
        }
        arguments["is_visual"] = torch.arange(tokens, device=device) < images
        if placed:
            arguments["pos"] = torch.arange(tokens, device=device)
        return arguments

    return make


def cost(factor: float) -> Callable[[Mapping[str, Any]], Cost]:
    def of(arguments: Mapping[str, Any]) -> Cost:
        q, k, v = (arguments[name] for name in ("qt", "k", "v"))
        texts, tokens = q.shape[2], k.shape[2]
        pairs = texts * (tokens - texts) + texts * (texts + 1) / 2
        flops = 2.0 * q.shape[1] * pairs * (q.shape[3] + v.shape[3]) * factor
        return Cost(flops, (bytes_of(q, k, v) + bytes_of(q)) * (1 if factor == 1 else 3))

    return of


def all_tokens(backend: str, backward: bool) -> Rival:
    """torch's causal attention in which image tokens have queries too."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        choices = {
            "flash": [SDPBackend.FLASH_ATTENTION],
            "cudnn": [SDPBackend.CUDNN_ATTENTION],
            "any": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
        }
        k, v = arguments["k"], arguments["v"]
        heads = arguments["qt"].shape[1]
        q = torch.randn(1, heads, *k.shape[2:], device=k.device, dtype=k.dtype)

        def forward() -> Any:
            with sdpa_kernel(choices[backend]):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=heads != k.shape[1]
                )

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival(f"sdpa-{backend}, all tokens", prepare)


def text_rows(backward: bool) -> Rival:
    """FlexAttention of the text rows alone, compiled."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = (arguments[name] for name in ("qt", "k", "v"))
        texts, tokens = q.shape[2], k.shape[2]

        def visible(batch: Any, head: Any, i: Any, j: Any) -> Any:
            return j <= i + (tokens - texts)

        block_mask = create_block_mask(visible, None, None, texts, tokens, device=q.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        grouped = q.shape[1] != k.shape[1]

        def forward() -> Any:
            return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("flex, text rows", prepare)


def forward_and_backward(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[], Any]:
    inputs = tuple(arguments[name] for name in ("qt", "k", "v"))
    return with_backward(lambda: function(**arguments), inputs)


def composite(
    device: str,
    texts: int,
    images: int,
    heads: tuple[int, int],
    d: int,
    backward: bool = False,
    placed: bool = False,
) -> Benchmark:
    rivals = [all_tokens("flash" if device == "cuda" else "any", backward)]
    if device == "cuda":
        rivals += [all_tokens("cudnn", backward), text_rows(backward)]
    return Benchmark(
        "ee_mllm.composite_attention",
        f"{images} image and {texts} text tokens, heads={heads[0]}/{heads[1]}"
        + (", by position" if placed else "")
        + (" forward+backward" if backward else ""),
        device,
        prompt(texts, images, *heads, d, placed),
        cost(3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=tuple(rivals),
        settings={"texts": texts, "images": images, "d": d, "heads": list(heads)},
    )


BENCHMARKS = (
    composite("cuda", 1024, 2880, (32, 32), 128),
    composite("cuda", 1024, 2880, (32, 8), 128),
    composite("cuda", 1024, 2880, (32, 32), 128, placed=True),
    composite("cuda", 4096, 11520, (32, 32), 128),
    composite("cuda", 1024, 2880, (32, 32), 128, backward=True),
    composite("cpu", 256, 720, (8, 8), 64),
)
