"""The decode engine: one or a few queries against a long cache, shared evenly among workers."""

from attnspec.fast.engines.decode.configs import CANDIDATES, DecodeConfig, use_config
from attnspec.fast.engines.decode.op import decode

__all__ = ["CANDIDATES", "DecodeConfig", "decode", "use_config"]
