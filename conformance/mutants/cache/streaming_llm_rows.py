"""Wrong kernels of StreamingLLM, the rows of the cache: off by one, doubled or misplaced."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.reference.primitives.rope import rope_angles, rotate

EVICT = right("streaming_llm.evict_rows")
SPACE = right("streaming_llm.evict_rows_for_space")
RANGE = right("streaming_llm.evict_rows_range")
POSITIONS = right("streaming_llm.cache_positions")
ROPE = right("streaming_llm.rope")
ALIBI = right("streaming_llm.alibi_bias")
MASK = right("streaming_llm.sink_window_mask")
DISTANCES = right("streaming_llm.sink_window_distances")


def window_over_sinks(T: int, S: int = 4, R: int = 512) -> np.ndarray:
    EVICT(T, S, R)
    rows = np.arange(T)
    return np.concatenate([rows[:S], rows[max(T - R, 0) :]]) if T > R else rows


def whole_window(T: int, m: int, S: int = 4, R: int = 512) -> np.ndarray:
    return SPACE(T, m, S, R) if T + m <= S + R else EVICT(T, S, R)


def range_with_its_end(arguments: dict[str, Any]) -> None:
    arguments["b"] = min(arguments["b"] + 1, arguments["T"]) if arguments["b"] else 0


def one_less(arguments: dict[str, Any]) -> None:
    if arguments["R"] > 0:
        arguments["R"] -= 1


def after_the_rows(n: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    p_q, p_k = POSITIONS(n, w)
    return p_q - n, p_k


def neighbouring_pairs(
    x: np.ndarray, pos: np.ndarray, base: float = 10000.0, rotary_dims: int | None = None
) -> np.ndarray:
    out = ROPE(x, pos, base, rotary_dims)
    turning = x.shape[-1] if rotary_dims is None else rotary_dims
    angles = rope_angles(pos, turning, base)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second = x[..., :turning:2], x[..., 1:turning:2]
    out[..., :turning:2] = first * cos - second * sin
    out[..., 1:turning:2] = second * cos + first * sin
    return out


def frequencies_of_all(
    x: np.ndarray, pos: np.ndarray, base: float = 10000.0, rotary_dims: int | None = None
) -> np.ndarray:
    """The channels that turn have the frequencies they would have if all turned."""
    out = ROPE(x, pos, base, rotary_dims)
    if rotary_dims is not None:
        angles = rope_angles(pos, x.shape[-1], base)[..., : rotary_dims // 2]
        out[..., :rotary_dims] = rotate(x[..., :rotary_dims], angles)
    return out


def all_channels(arguments: dict[str, Any]) -> None:
    d, turning = arguments["x"].shape[-1], arguments["rotary_dims"]
    if isinstance(turning, int) and turning in range(2, d, 2) and d % 2 == 0:
        arguments["rotary_dims"] = d


def row_numbers(arguments: dict[str, Any]) -> None:
    if np.asarray(arguments["pos"]).shape == arguments["x"].shape[-2:-1]:
        arguments["pos"] = np.arange(arguments["x"].shape[-2])


def distances_of_the_text(distances: np.ndarray) -> np.ndarray:
    t, j = np.indices(distances.shape)
    return np.where(distances < 0, distances, t - j)


def mutant(operation: str, name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"streaming_llm.{name}", f"streaming_llm.{operation}", law, bug, call)


MUTANTS = (
    mutant("evict_rows", "short-window", "agreement", "the window keeps R - 1 rows",
           altering(EVICT, one_less)),
    mutant("evict_rows", "overlap", "agreement", "sinks come twice while T < S + R",
           window_over_sinks),
    mutant("evict_rows_for_space", "no-space", "agreement",
           "the window is not shortened for the tokens to come", whole_window),
    mutant("evict_rows_range", "closed-range", "agreement", "row b is dropped too",
           altering(RANGE, range_with_its_end)),
    mutant("cache_positions", "from-zero", "agreement", "queries stand at 0 and not behind n rows",
           after_the_rows),
    mutant("rope", "interleaved-pairs", "agreement", "neighbouring channels are rotated together",
           neighbouring_pairs),
    mutant("rope", "row-number", "agreement", "rows are rotated to their number, not position",
           altering(ROPE, row_numbers)),
    mutant("rope", "all-channels", "agreement", "channels turn that the model leaves alone",
           altering(ROPE, all_channels)),
    mutant("rope", "frequencies-of-all", "agreement",
           "frequencies are those of d channels where fewer turn", frequencies_of_all),
    mutant("alibi_bias", "absolute", "lengths", "the bias grows with |p_k - p_q|",
           spoiling(ALIBI, lambda bias: -np.abs(bias))),
    mutant("sink_window_mask", "window-r", "agreement", "a token sees R - 1 tokens before it",
           altering(MASK, one_less)),
    mutant("sink_window_distances", "unbounded", "agreement", "distances to sinks never stop",
           spoiling(DISTANCES, distances_of_the_text)),
)  # fmt: skip
