"""Short causal filters along the tokens, one a channel: a depthwise convolution."""

from attnspec.fast.engines.filters.op import causal_filter

__all__ = ["causal_filter"]
