"""Attention with softplus weights, plain or sharpened by a power, forward and backward."""

from attnspec.fast.engines.softplus.op import Sharpening, softplus

__all__ = ["Sharpening", "softplus"]
