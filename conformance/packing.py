"""What contracts of sequences laid end to end share; that each is alone is in `laws/packed.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue

Handed = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Packed:
    """What belongs to which sequence: see `Contract.packed`.

    `tokens` names for each argument of offsets, that of the queries first, those that it cuts, with
    their axis of tokens from the end; `states` have an axis of sequences in front. `fill` is what
    others hold where NaN would be refused, None for what is there. `handed(results, arguments)` is
    with what a call goes on behind one that returned these, if one can, and `stride(arguments)`
    says of what its tokens must then be a multiple.
    """

    tokens: Mapping[str, Mapping[str, int]]
    states: tuple[str, ...] = ()
    fill: Mapping[str, float | None] = field(default_factory=dict)
    handed: Handed | None = None
    stride: Callable[[Mapping[str, Any]], int] = lambda arguments: 1


def cut_rows(*names: str) -> dict[str, dict[str, int]]:
    """`Packed.tokens` of arguments (..., tokens, channels) and one argument of offsets."""
    return {"offsets": dict.fromkeys(names, -2)}


def make_offsets(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Cuts anywhere: some sequences have no token."""
    tokens, sequences = case.shape("tokens sequences")
    cuts = np.sort(rng.integers(0, tokens + 1, sequences - 1))
    return np.concatenate([[0], cuts, [tokens]]).astype(np.int64)


def packed_sizes(sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """`sizes` with sequences for a batch."""
    return {**{axis: span for axis, span in sizes.items() if axis != "batch"}, "sequences": (1, 4)}


def last_as(name: str) -> Handed:
    """`Packed.handed` of an operation whose second result is its state called `name`."""
    return lambda results, arguments: {name: results[1]}


OFFSETS = Array("offsets", make=make_offsets)
PACKED = {"packed": lambda case: case.with_(sizes={"sequences": 3})}
BAD_OFFSETS = (
    ("offsets that stop short", "offsets", lambda a: np.append(a["offsets"][:-1], 0)),
    BadValue("offsets that fall", "offsets", lambda a: np.insert(a["offsets"], 1, 99)),
    ("offsets that are floats", "offsets", lambda a: a["offsets"] + 0.5),
)
NO_SEQUENCES = (
    ("one offset", "offsets", lambda a: a["offsets"][:1]),
    ("no offsets", "offsets", lambda a: None),
)
