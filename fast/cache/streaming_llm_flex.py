"""StreamingLLM's static view as a mask function of FlexAttention, with ALiBi as a score function.

A rotation that depends on the pair, as that of a sink which moves along with the query, is neither:
without positions, with ALiBi, or up to S + R tokens, one pass with these is the whole stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer
from attnspec.fast.cache.streaming_llm_rows import calls_of, check_slopes
from attnspec.fast.flex import MaskMod, ScoreMod


def mask_mod(
    S: int = 4,
    R: int = 512,
    chunk: int | Sequence[int] = 1,
    *,
    device: str | torch.device = "cpu",
) -> MaskMod:
    """For a stream of any length; the parameters are those of `streaming_attend`.

    A list of call sizes belongs to streams of as many tokens, and is read from a tensor on
    `device`.
    """
    begin = _begins(S, R, chunk, device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((key < S) | (key >= begin(query) - R))

    return visible


def score_mod(
    alibi_slopes: Tensor,
    S: int = 4,
    R: int = 512,
    chunk: int | Sequence[int] = 1,
    *,
    device: str | torch.device = "cpu",
) -> ScoreMod:
    """Adds the bias of `alibi_slopes` (heads), on the device of the attention, by cache positions.

    With S + R of at least the stream's tokens these are the positions in the text.
    """
    check_slopes(alibi_slopes)
    begin = _begins(S, R, chunk, device)

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        evicted = (begin(query) - (S + R)).clamp(min=0)
        row = torch.where(key < S, key, key - evicted)
        return score + alibi_slopes[head].to(score.dtype) * (row - (query - evicted))

    return biased


def _begins(
    S: int, R: int, chunk: int | Sequence[int], device: str | torch.device
) -> Callable[[Tensor], Tensor]:
    """The function from a token to the first token of its call."""
    check_integer("S", S, least=0)
    check_integer("R", R, least=0)
    if not isinstance(chunk, Sequence):
        check_integer("chunk", chunk, least=1)
        return lambda token: token - token % chunk
    if not chunk:
        raise ValueError(f"chunk: got {chunk!r}, expected at least one size")
    for size in chunk:
        check_integer("chunk", size, least=1)
    begins = calls_of(sum(chunk), chunk).begins(0, torch.device(device))
    return lambda token: begins[token]
