"""Additive attention scores v . tanh(k + q), and the log of their softmax denominator."""

from attnspec.fast.engines.additive.dense import masked_log_softmax, project
from attnspec.fast.engines.additive.op import additive_lse, additive_scores

__all__ = ["additive_lse", "additive_scores", "masked_log_softmax", "project"]
