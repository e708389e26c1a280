"""A learned prefix, kept as a state of linear attention, merged into a softmax by its lse."""

from attnspec.fast.engines.prefix.configs import PrefixConfig, use_config
from attnspec.fast.engines.prefix.op import add_prefix

__all__ = ["PrefixConfig", "add_prefix", "use_config"]
