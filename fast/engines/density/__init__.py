"""Weights along an axis: how probable each entry is among those of its own slice."""

from attnspec.fast.engines.density.op import Options, density

__all__ = ["Options", "density"]
