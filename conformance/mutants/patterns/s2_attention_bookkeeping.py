"""Wrong patterns of S2-Attention and wrong lists of them: phases, windows, what fills a list up."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling

CSC = right("s2_attention.to_csc")
CSR = right("s2_attention.to_csr")
EFFICIENT = right("s2_attention.is_kv_efficient")
LIVE = right("s2_attention.live_blocks")
MERGE_Q = right("s2_attention.merge_q")
PATTERN = right("s2_attention.block_pattern")
STRIDE = right("s2_attention.stride_mask")
UNION = right("s2_attention.union_coverage")


def later_phases(N: int, c: int, step: int, o: int, v: int) -> np.ndarray:
    """A head's stride begins later than that of the head before it, not earlier."""
    STRIDE(N, c, step, o, v)
    return (np.arange(N) - c * step - o) % v == 0


def phases_of_rank(arguments: dict[str, Any]) -> None:
    """A rank counts its own heads from 0."""
    if arguments["active_head_range"] is not None:
        first, last = arguments["active_head_range"]
        arguments["active_head_range"] = (0, last - first)


def short_window(arguments: dict[str, Any]) -> None:
    """The window does not count the diagonal."""
    if isinstance(arguments["local"], int):
        arguments["local"] += 1


def one_short(arguments: dict[str, Any]) -> None:
    """The window is a block short, where it is longer than the diagonal."""
    if isinstance(arguments["local"], int) and arguments["local"] > 1:
        arguments["local"] -= 1


def long_right(M: int, N: int, H: int, Hk: int, local: Any, *rest: Any, **options: Any) -> Any:
    """The noncausal window counts the current block on the left only."""
    if isinstance(local, int) and local >= 0:
        both = PATTERN(M, N, H, Hk, (local, local + 1), *rest, **{**options, "causal": False})
        causal = rest[5] if len(rest) > 5 else options.get("causal", True)
        return both if not causal else PATTERN(M, N, H, Hk, local, *rest, **options)
    return PATTERN(M, N, H, Hk, local, *rest, **options)


def step_of_kv_heads(arguments: dict[str, Any]) -> None:
    """The default step counts kv heads."""
    if arguments["step"] is None and isinstance(arguments["v"], int):
        arguments["step"] = max(1, arguments["v"] // max(1, arguments["Hk"]))


def dense_heads_first(pattern: np.ndarray) -> np.ndarray:
    return pattern[::-1]


def relative_blocks(arguments: dict[str, Any]) -> None:
    """Strides are counted from the first key of the chunk."""
    arguments["kv_block"] = 0


def common_blocks(pattern: np.ndarray) -> np.ndarray:
    """What all heads read, not what any of them does."""
    UNION(pattern)
    return np.all(pattern, axis=0)


def rows_of_columns(pattern: np.ndarray) -> Any:
    """The pattern is not transposed."""
    CSC(pattern)
    return CSR(pattern)


def padding_is_block_zero(result: Any) -> Any:
    """What fills a list up is block 0."""
    return (result[0], np.maximum(result[1], 0), *result[2:])


def micro_of_tile(pattern: Any, b: int, bm: int, bn: int, causal: bool = True) -> Any:
    """All queries of a tile use all blocks of it."""
    crow, col, micro = MERGE_Q(pattern, b, bm, bn, causal)
    return crow, col, np.where(micro > 0, bm, 0)


def on_the_diagonal(arguments: dict[str, Any]) -> None:
    """A block counts as behind the diagonal one row too late."""
    arguments["bn"] = arguments["bn"] + 1


def live_in_window(arguments: dict[str, Any]) -> None:
    arguments["local"] = arguments["local"] + 1


def of(operation: str, name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"s2_attention.{name}", f"s2_attention.{operation}", law, bug, call)


MUTANTS = (
    of("stride_mask", "later-phases", "agreement", "phases go the other way", later_phases),
    of("block_pattern", "rank-phases", "agreement", "a rank counts its heads from 0",
       altering(PATTERN, phases_of_rank)),
    of("block_pattern", "short-window", "agreement", "the window does not count the diagonal",
       altering(PATTERN, short_window)),
    of("block_pattern", "one-short", "agreement", "the window is a block short",
       altering(PATTERN, one_short)),
    of("block_pattern", "long-right", "agreement", "the right of the window is a block too long",
       long_right),
    of("block_pattern", "kv-step", "agreement", "the default step counts kv heads",
       altering(PATTERN, step_of_kv_heads)),
    of("block_pattern", "dense-first", "agreement", "the first heads are dense, not the last",
       spoiling(PATTERN, dense_heads_first)),
    of("block_pattern", "relative-blocks", "agreement", "strides count from the chunk's first key",
       altering(PATTERN, relative_blocks)),
    of("union_coverage", "common", "agreement", "only what all heads read counts", common_blocks),
    of("to_csc", "untransposed", "agreement", "columns are listed as rows", rows_of_columns),
    of("to_csr", "padding", "agreement", "what fills a list up is block 0",
       spoiling(CSR, padding_is_block_zero)),
    of("merge_q", "micro", "agreement", "all queries of a tile use its blocks", micro_of_tile),
    of("merge_q", "merge-padding", "agreement", "what fills a list up is block 0",
       spoiling(MERGE_Q, padding_is_block_zero)),
    of("is_kv_efficient", "late-diagonal", "agreement", "the diagonal is a row too low",
       altering(EFFICIENT, on_the_diagonal)),
    of("live_blocks", "long-window", "agreement", "the window is a block too long",
       altering(LIVE, live_in_window)),
)  # fmt: skip
