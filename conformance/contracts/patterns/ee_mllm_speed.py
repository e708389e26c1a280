"""Benchmarks of composite attention and of a layer around it, beside attention of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import with_backward
from attnspec.reference.patterns.ee_mllm_layers import Layer


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


def prompt_states(
    texts: int, images: int, heads: int, kv_heads: int, d: int, F: int
) -> Callable[[str, str], dict[str, Any]]:
    """Random states of an image and of the text behind it, and a layer of width heads d."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        D = heads * d

        def random(*shape: int) -> Any:
            x = torch.randn(shape, generator=generator, device=device)
            return x.to(getattr(torch, dtype))

        def weights(rows: int, columns: int) -> Any:
            return random(rows, columns) * rows**-0.5

        one: Any = torch.ones(D, device=device, dtype=getattr(torch, dtype))
        Wq, Wk, Wv = (weights(D, n * d) for n in (heads, kv_heads, kv_heads))
        ffn = (weights(D, F), weights(D, F), weights(F, D))
        layer = Layer(one, Wq, Wk, Wv, weights(D, D), one, ffn, heads, kv_heads)
        pos = torch.arange(images + texts, device=device)
        states = {"Xt": random(1, texts, D), "Xv": random(1, images, D)}
        return {**states, "layer": layer, "pos_t": pos[images:], "pos_v": pos[:images]}

    return make


def layer_cost(arguments: Mapping[str, Any]) -> Cost:
    """All products of a layer but the queries of image tokens, and the attention of text."""
    Xt, Xv, layer = (arguments[name] for name in ("Xt", "Xv", "layer"))
    texts, images = Xt.shape[1], Xv.shape[1]
    weights = (layer.Wq, layer.Wk, layer.Wv, layer.Wo, *layer.ffn)
    every = sum(W.numel() for W in weights)
    products = texts * every + images * (every - layer.Wq.numel())
    pairs = texts * images + texts * (texts + 1) / 2
    attention = pairs * (layer.Wq.shape[1] + layer.Wo.shape[0])
    return Cost(2.0 * (products + attention), bytes_of(*weights) + 2 * bytes_of(Xt, Xv))


def dense_layer() -> Rival:
    """The same layer in torch, in which image tokens are queries as well; its angles are ready."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn import functional

        layer: Any = arguments["layer"]
        gate, up, down = layer.ffn
        X = torch.cat([arguments["Xv"], arguments["Xt"]], dim=1)
        D, d = X.shape[-1], layer.Wq.shape[1] // layer.H
        steps = torch.arange(0, d, 2, device=X.device, dtype=torch.float64) / d
        angles = torch.arange(X.shape[1], device=X.device)[:, None] * layer.rope**-steps
        cos, sin = (x.repeat(1, 2).to(X.dtype) for x in (angles.cos(), angles.sin()))

        def heads_of(h: Any, W: Any, heads: int) -> Any:
            return (h @ W).unflatten(-1, (heads, -1)).transpose(1, 2)

        def rotated(x: Any) -> Any:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        def forward() -> Any:
            h = functional.rms_norm(X, (D,), layer.norm1, layer.eps)
            out = functional.scaled_dot_product_attention(
                rotated(heads_of(h, layer.Wq, layer.H)),
                rotated(heads_of(h, layer.Wk, layer.Hk)),
                heads_of(h, layer.Wv, layer.Hk),
                is_causal=True,
                enable_gqa=layer.Hk < layer.H,
            )
            Y = X + out.transpose(1, 2).flatten(2) @ layer.Wo
            h = functional.rms_norm(Y, (D,), layer.norm2, layer.eps)
            return Y + (functional.silu(h @ gate) * (h @ up)) @ down

        return forward

    return Rival("torch layer, all tokens", prepare)


def whole_layer(
    device: str, texts: int, images: int, heads: tuple[int, int], d: int, F: int
) -> Benchmark:
    return Benchmark(
        "ee_mllm.layer_step",
        f"layer, {images} image and {texts} text tokens, heads={heads[0]}/{heads[1]} F={F}",
        device,
        prompt_states(texts, images, *heads, d, F),
        layer_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=(dense_layer(),),
        settings={"texts": texts, "images": images, "d": d, "heads": list(heads), "F": F},
    )


BENCHMARKS = (
    whole_layer("cuda", 100, 576, (32, 32), 128, 11008),
    whole_layer("cuda", 1024, 2880, (32, 32), 128, 11008),
    whole_layer("cpu", 64, 192, (8, 8), 64, 1376),
    composite("cuda", 1024, 2880, (32, 32), 128),
    composite("cuda", 1024, 2880, (32, 8), 128),
    composite("cuda", 1024, 2880, (32, 32), 128, placed=True),
    composite("cuda", 4096, 11520, (32, 32), 128),
    composite("cuda", 1024, 2880, (32, 32), 128, backward=True),
    composite("cpu", 256, 720, (8, 8), 64),
)
