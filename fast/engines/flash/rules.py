"""Who sees whom, as the kernels of the flash engine take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attnspec.fast.engines.flash.configs import BRIEF, MEDIUM, SPECIAL_KEYS, SPECIAL_ROWS, WIDE


class Rules(NamedTuple):
    """The options of `flash` behind q, k and v, in the order of its custom op; absent ones are
    None, absent block sizes 0.
    """

    scale: float
    causal: bool
    window: int | None
    sinks: int
    row_start: Tensor | None
    row_end: Tensor | None
    key_mask: Tensor | None
    mask: Tensor | None
    block_index: Tensor | None
    block_count: Tensor | None
    block_full: Tensor | None
    q_block: int
    k_block: int
    q_offsets: Tensor | None
    k_offsets: Tensor | None
    sink_logit: Tensor | None
    slopes: Tensor | None
    slope_positions: Tensor | None

    @property
    def ranged(self) -> bool:
        return self.window is not None or self.row_start is not None

    @property
    def known(self) -> bool:
        """Whether the specialised kernel knows all rules: all but masks and slopes, and lists only
        of blocks that fill its tiles and with counts of those seen whole.
        """
        if self.block_index is not None and (
            self.block_full is None or self.q_block % SPECIAL_ROWS or self.k_block % SPECIAL_KEYS
        ):
            return False
        return all(x is None for x in (self.key_mask, self.mask, self.slopes))

    @property
    def plain(self) -> bool:
        """Whether the causal order, a window with sinks and sink logits are all there is."""
        others = (self.row_start, self.row_end, self.q_offsets, self.block_index)
        return self.known and all(x is None for x in others)

    @property
    def kept_sinks(self) -> int | None:
        """How many sinks there are that a range would hide."""
        return self.sinks if self.sinks and self.ranged else None

    def walk(self, q_tokens: int) -> str:
        """How long the walk of a program of these rules is, for the choice of a configuration."""
        if self.k_block:
            if self.q_block < WIDE:
                return "short"
            return "medium" if self.k_block >= WIDE else "long"
        if self.q_offsets is not None and q_tokens <= BRIEF * (self.q_offsets.shape[0] - 1):
            return "brief"
        if self.row_start is not None:
            return "long"
        if self.window is not None:
            return "short"
        return "medium" if q_tokens in MEDIUM else "long"
