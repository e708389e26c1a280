"""Benchmarks of LightNet: one scan of an image against Lightning Attention-2 on as many tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival, Unavailable
from attnspec.conformance.bench.rivals import flash_linear, torch_sdpa, with_backward


def scan_cost(causal: bool, factor: float = 1.0) -> Any:
    """Read q, k, v and write o once; two products with the state a token."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        batch, heads, tokens, d = q.shape
        e = v.shape[3]
        moved = bytes_of(q, k, v) + batch * heads * tokens * e * q.element_size()
        inside = 64 * (d + e) if causal else 0
        return Cost(2.0 * batch * heads * tokens * (2 * d * e + inside) * factor, moved * factor)

    return cost


def fla(backward: bool = False) -> Rival:
    """flash-linear-attention's gla on the gates that LightNet's layer hands to it."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        chunk_gla = flash_linear("gla", "chunk_gla")
        q, k, v = (arguments[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))

        def forward() -> Any:
            z = k.float().logcumsumexp(1)
            keys = torch.exp(k - z).to(k.dtype)
            before = torch.cat([z[:, :1], z[:, :-1]], 1)
            return chunk_gla(q=q, k=keys, v=v, g=before - z, scale=1.0)[0]

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("flash-linear-attention", prepare)


def plain_torch(backward: bool = False) -> Rival:
    """A softmax over time and two products, as torch has them."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))

        def forward() -> Any:
            return q @ (k.softmax(2).mT @ v)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("torch", prepare)


def lightning() -> Rival:
    """An installed Lightning Attention-2 on the same tokens: what one scan is held against."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        from attnspec.conformance.registry import registered_kernels

        name, device = "lightning_attention_2.attend", arguments["q"].device.type
        kernels = [x for x in registered_kernels() if (x.operation, x.device) == (name, device)]
        if not kernels:
            raise Unavailable(f"no kernel claims {name}")
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        heads = q.shape[1]
        slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=q.device))
        return lambda: kernels[0].call(q, k, v, slopes)

    return Rival("lightning_attention_2", prepare)


HEADS = {"cuda": 32, "cpu": 8}
"""What a name does not tell."""


def lightnet(
    operation: str, device: str, heads: int, d: int, tokens: int, backward: bool, rivals: Any
) -> Benchmark:
    causal = operation == "lightnet_causal"
    return Benchmark(
        f"lightnet.{operation}",
        f"{tokens // 1024}k tokens d={d}"
        + ("" if heads == HEADS[device] else f" heads={heads}")
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, heads, heads, tokens, tokens, d),
        scan_cost(causal, 3.0 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads},
    )


BENCHMARKS = (
    lightnet("lightnet_noncausal", "cuda", 32, 128, 16384, False, (lightning(), plain_torch())),
    lightnet("lightnet_noncausal", "cuda", 32, 128, 16384, True, (plain_torch(True),)),
    lightnet("lightnet_causal", "cuda", 32, 128, 16384, False, (lightning(), fla())),
    lightnet("lightnet_causal", "cuda", 32, 128, 131072, False, (fla(),)),
    lightnet("lightnet_causal", "cuda", 8, 128, 131072, False, (fla(),)),
    lightnet("lightnet_causal", "cuda", 8, 128, 1048576, False, ()),
    lightnet("lightnet_causal", "cuda", 32, 128, 16384, True, (fla(True),)),
    lightnet("lightnet_noncausal", "cpu", 8, 64, 4096, False, (plain_torch(),)),
    lightnet("lightnet_causal", "cpu", 8, 64, 4096, False, (torch_sdpa(causal=True),)),
)
