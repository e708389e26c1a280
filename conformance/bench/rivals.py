"""The rivals several benchmarks share: torch's attention backends and flash-linear-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.model import Rival, Unavailable


def sdpa(backend: str, backward: bool = False) -> Rival:
    """torch's scaled_dot_product_attention on one backend: "flash", "cudnn", "efficient", "math".

    Takes q, k, v and causal from the arguments; causal needs equal lengths.
    """

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        choices = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "math": SDPBackend.MATH,
        }
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        causal = bool(arguments.get("causal")) and q.shape[-2] > 1
        if causal and q.shape[-2] != k.shape[-2]:
            raise Unavailable("is_causal is aligned at the top left for unequal lengths")
        grouped = q.shape[1] != k.shape[1]

        def forward() -> Any:
            with sdpa_kernel(choices[backend]):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=grouped
                )

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival(f"sdpa-{backend}", prepare)


def with_backward(forward: Callable[[], Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """Forward and backward of `forward` with a fixed random upstream."""
    import torch

    leaves = [x.requires_grad_() for x in inputs]
    with torch.enable_grad():
        first = forward()
    first = first[0] if isinstance(first, tuple) else first
    upstream = torch.randn_like(first)

    def call() -> Any:
        out = forward()
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, leaves, upstream)

    return call


def flex(mask: Callable[[Mapping[str, Any]], Callable[..., Any]], backward: bool = False) -> Rival:
    """FlexAttention, compiled, with the mask function that `mask` makes from the arguments."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        block_mask = create_block_mask(
            mask(arguments), None, None, q.shape[-2], k.shape[-2], device=q.device, _compile=True
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        grouped = q.shape[1] != k.shape[1]

        def forward() -> Any:
            return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("flex", prepare)


def reference(function: Callable[..., Any]) -> Rival:
    """The NumPy reference itself, on CPU tensors."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        plain = {
            name: value.numpy() if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        return lambda: function(**plain)

    return Rival("numpy-reference", prepare)
