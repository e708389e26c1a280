"""The Taylor engine: attention with the weights 1 + s + s^2 / 2 as a recurrence on polynomial
features, which the CUDA kernels form in registers; states, packing, gradients, one decoded token.
"""

from attnspec.fast.engines.taylor.api import step, taylor
from attnspec.fast.engines.taylor.configs import CANDIDATES, TaylorConfig, use_config
from attnspec.fast.engines.taylor.layout import unpacked_count, unpacked_features

__all__ = [
    "CANDIDATES",
    "TaylorConfig",
    "step",
    "taylor",
    "unpacked_count",
    "unpacked_features",
    "use_config",
]
