"""Attention on a grid of one to three axes, each query in a window of its own: fused and not."""

from attnspec.fast.engines.neighborhood.grid import Axis, check_grid
from attnspec.fast.engines.neighborhood.op import neighborhood, window_scores, window_values

__all__ = ["Axis", "check_grid", "neighborhood", "window_scores", "window_values"]
