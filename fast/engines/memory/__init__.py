"""The memory engine: weights trained token by token, in chunks that are a few products each.

The gradient point is fixed for a chunk, so that momentum and forgetting become scalars of pairs of
tokens; the scan engine cannot do this, because what a chunk writes depends on the weights it
entered with, and two states move together.
"""

from attnspec.fast.engines.memory.api import memory, scalars, weight_path
from attnspec.fast.engines.memory.configs import CANDIDATES, DEEP, MemoryConfig, use_config

__all__ = ["CANDIDATES", "DEEP", "MemoryConfig", "memory", "scalars", "use_config", "weight_path"]
