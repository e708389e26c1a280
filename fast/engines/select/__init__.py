"""Choosing keys: block pooling, block scores, exact top-k, and the lists the flash engine reads."""

from attnspec.fast.engines.select.op import (
    block_scores,
    mask_lists,
    pool_blocks,
    top_k,
    top_k_lists,
    top_k_mask,
)
from attnspec.fast.engines.select.packed import packed_rows
from attnspec.fast.engines.select.places import Places, places
from attnspec.fast.engines.select.rows import inverse, last_unflagged, take_rows
from attnspec.fast.engines.select.tokens import take_tokens

__all__ = [
    "Places",
    "block_scores",
    "inverse",
    "last_unflagged",
    "mask_lists",
    "packed_rows",
    "places",
    "pool_blocks",
    "take_rows",
    "take_tokens",
    "top_k",
    "top_k_lists",
    "top_k_mask",
]
