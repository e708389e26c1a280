"""The rivals several benchmarks share: torch's attention backends and flash-linear-attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.model import Rival, Unavailable


def sdpa(
    backend: str, backward: bool = False, causal: bool | None = None, lengths: bool = False
) -> Rival:
    """torch's scaled_dot_product_attention on one backend: "flash", "cudnn", "efficient", "math".

    Takes q, k, v and causal from the arguments (`causal` here overrides them); with `lengths` a
    mask hides the keys beyond each batch entry's length.
    """

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        choices = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "math": SDPBackend.MATH,
        }
        call = _sdpa_call(arguments, causal, lengths)

        def forward() -> Any:
            with sdpa_kernel(choices[backend]):
                return call()

        return with_backward(forward, _inputs(arguments)) if backward else forward

    return Rival(f"sdpa-{backend}", prepare)


def torch_sdpa(causal: bool | None = None) -> Rival:
    """torch's scaled_dot_product_attention on the backend it chooses itself."""
    return Rival("torch-sdpa", lambda arguments: _sdpa_call(arguments, causal, False))


def _inputs(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(arguments[name] for name in ("q", "k", "v"))


def _sdpa_call(
    arguments: Mapping[str, Any], causal: bool | None, lengths: bool
) -> Callable[[], Any]:
    import torch

    q, k, v = _inputs(arguments)
    ordered = bool(arguments.get("causal")) if causal is None else causal
    if ordered and q.shape[-2] != k.shape[-2]:
        raise Unavailable("is_causal is aligned at the top left for unequal lengths")
    mask = None
    if lengths:
        keys = torch.arange(k.shape[-2], device=k.device)
        mask = (keys < arguments["lengths"][:, None])[:, None, None]
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None:
        # The backends that take a mask do not group heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=ordered, enable_gqa=grouped and mask is None
    )


def installed(package: str, module: str, name: str) -> Any:
    """`name` of a module that `package` brings; without it a rival is unavailable."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise Unavailable(f"{package} is not installed") from None


def flash_linear(module: str, name: str) -> Any:
    """`name` of a module of flash-linear-attention."""
    return installed("flash-linear-attention", f"fla.ops.{module}", name)


def counted_in_32_bits(numbers: int) -> None:
    """Unavailable if FlexAttention must look up more numbers than 32 bits count: it reads where
    nothing is, and the device is lost for all benchmarks after it.
    """
    if numbers > 2**31:
        raise Unavailable(f"{numbers} products, and FlexAttention's lookups count with 32 bits")


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


def flex(
    mask: Callable[[Mapping[str, Any]], Callable[..., Any]],
    backward: bool = False,
    per_head: bool = False,
) -> Rival:
    """FlexAttention, compiled, with the mask function that `mask` makes from the arguments.

    `per_head` says that the mask differs from head to head.
    """

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        block_mask = create_block_mask(
            mask(arguments),
            q.shape[0] if per_head else None,
            q.shape[1] if per_head else None,
            q.shape[-2],
            k.shape[-2],
            device=q.device,
            _compile=True,
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
