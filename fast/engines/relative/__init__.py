"""Attention whose scores get a learned term for the distance of query and key (a band)."""

from attnspec.fast.engines.relative.op import relative

__all__ = ["relative"]
