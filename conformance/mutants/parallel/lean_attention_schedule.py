"""Wrong schedules of lean attention: tiles that nobody owns, workers that wait for nobody."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling

TILE = right("lean_attention.tile_size")
LINE = right("lean_attention.line_order")
TILES = right("lean_attention.tiles_per_output")
GRID = right("lean_attention.grid_size")
SCHEDULE = right("lean_attention.lean_schedule")
BOUND = right("lean_attention.split_bound")
SEGMENTS = right("lean_attention.segments")
HELPERS = right("lean_attention.helpers")


def strictly_below(d: int, rule: str = "authors") -> int:
    return TILE(d, rule) if d not in (64, 128) else TILE(d + 1, rule)


def sequences_first(Hkv: int, batch: int, blocks: int, order: str = "natural") -> Any:
    return sorted(LINE(Hkv, batch, blocks, order), key=lambda output: output[1])


def first_then_last(Hkv: int, batch: int, blocks: int, order: str = "natural") -> Any:
    """The paired order starts with the last block."""
    line = LINE(Hkv, batch, blocks, order)
    if order == "natural":
        return line
    return [(head, entry, blocks - 1 - i) for head, entry, i in line]


def rounded_down(arguments: dict[str, Any]) -> None:
    lengths, N = arguments["lengths"], arguments["N"]
    if isinstance(lengths, np.ndarray) and lengths.dtype.kind == "i" and isinstance(N, int) and N:
        arguments["lengths"] = lengths // N * N


def square(arguments: dict[str, Any]) -> None:
    """A causal block i sees (i + 1) M keys, as if there were no more keys than queries."""
    if arguments["causal"] and isinstance(arguments["lengths"], np.ndarray):
        arguments["lengths"] = np.minimum(arguments["lengths"], arguments["Tq"])


def unclamped(n: np.ndarray, slots: int, rule: str = "authors") -> int:
    """All slots are launched, with or without work."""
    return slots if GRID(n, slots, rule) else 0


def thirty_two(n: np.ndarray, slots: int, rule: str = "authors") -> int:
    """The cap on the pieces of an output is left out."""
    G, W = GRID(n, slots, rule), int(n.sum())
    few = (2 * slots if rule == "authors" else slots) >= W
    return G if few else slots


def equal_shares(n: np.ndarray, G: int) -> Any:
    """Every worker takes ceil(W / G) tiles, and the last ones what is left."""
    start, end = SCHEDULE(n, G)
    if not len(start):
        return start, end
    T = int(end[0])
    edges = np.minimum(np.arange(len(start) + 1) * T, end[-1])
    return edges[:-1], edges[1:]


def idle_workers(n: np.ndarray, G: int) -> Any:
    """Workers without a tile are listed too."""
    start, end = SCHEDULE(n, G)
    idle = np.full(max(G - len(start), 0), n.sum())
    return np.concatenate([start, idle]), np.concatenate([end, idle])


def divides_by_zero(n: np.ndarray, G: int) -> int:
    """Shares of one tile are not told apart."""
    start, end = SCHEDULE(n, G)
    bound = BOUND(n, G)
    if not len(start):
        return bound
    T, longest = int(end[0]), int(n.max())
    return 1 + (longest + T - 3) // (T - 1)


def loose(n: np.ndarray, G: int) -> int:
    """The tiles of all outputs are taken to be one output's."""
    return BOUND(np.array([n.sum()]), G) if BOUND(n, G) else 0


def inclusive(n: np.ndarray, start: np.ndarray, end: np.ndarray) -> Any:
    """A tile on the boundary belongs to the output that ends there."""
    found = SEGMENTS(n, start, end)
    return [s._replace(u=s.u - 1) if s.u and n[s.u - 1] and s.host else s for s in found]


def hosts_finish(segments: Any) -> Any:
    """A host writes the result, whether it holds the last tile or not."""
    return [s._replace(finishing=s.finishing or s.host) for s in segments]


def up_to_the_last(found: range) -> range:
    return range(found.start, max(found.stop - 1, found.start))


def all_behind(n: np.ndarray, start: np.ndarray, end: np.ndarray, u: int) -> range:
    """The host waits for every worker behind it."""
    found = HELPERS(n, start, end, u)
    return range(found.start, len(start)) if len(found) else found


def mutant(name: str, operation: str, bug: str, call: Any) -> Mutant:
    name = f"lean_attention.{name}"
    return Mutant(name, f"lean_attention.{operation}", "agreement", bug, call)


MUTANTS = (
    mutant("strictly-below", "tile_size", "heads of 64 and 128 get the next tile",
           strictly_below),
    mutant("sequences-first", "line_order", "the line runs over sequences, then heads",
           sequences_first),
    mutant("last-first", "line_order", "the paired order starts with the last block",
           first_then_last),
    mutant("rounded-down", "tiles_per_output", "a partial tile is not counted",
           altering(TILES, rounded_down)),
    mutant("square", "tiles_per_output", "causal blocks count keys from the first query",
           altering(TILES, square)),
    mutant("unclamped", "grid_size", "more workers are launched than there are tiles", unclamped),
    mutant("no-cap", "grid_size", "an output may be cut into any number of pieces", thirty_two),
    mutant("equal-shares", "lean_schedule", "the last workers take what the others leave",
           equal_shares),
    mutant("idle-workers", "lean_schedule", "workers without tiles are scheduled", idle_workers),
    mutant("zero-division", "split_bound", "shares of one tile divide by T - 1 = 0",
           divides_by_zero),
    mutant("loose-bound", "split_bound", "the bound is that of all outputs together", loose),
    mutant("inclusive", "segments", "outputs are looked up by inclusive sums", inclusive),
    mutant("hosts-finish", "segments", "every host is a finisher",
           spoiling(SEGMENTS, hosts_finish)),
    mutant("one-helper-less", "helpers", "the owner of the last tile is not waited for",
           spoiling(HELPERS, up_to_the_last)),
    mutant("all-behind", "helpers", "the host waits for workers of other outputs", all_behind),
)  # fmt: skip
