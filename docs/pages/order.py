"""The order of the book."""

from __future__ import annotations

from itertools import chain

from attnspec.reference import Mechanism, mechanisms

ORDER = (
    "dense",
    "scores",
    "positions",
    "heads",
    "patterns",
    "selection",
    "cache",
    "linear",
    "editing",
    "analysis",
    "tasks",
    "parallel",
)


def families() -> dict[str, list[Mechanism]]:
    """Chapters by family, in the order of the book; a family not listed comes last."""
    found: dict[str, list[Mechanism]] = {}
    for mechanism in mechanisms().values():
        found.setdefault(mechanism.family, []).append(mechanism)
    rank = {family: n for n, family in enumerate(ORDER)}
    return {f: found[f] for f in sorted(found, key=lambda f: (rank.get(f, len(rank)), f))}


def chapters() -> list[Mechanism]:
    """All chapters in the order of the book."""
    return list(chain.from_iterable(families().values()))
