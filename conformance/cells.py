"""Moves of a case into a cell of the coverage matrix, for the contracts that share them."""

from __future__ import annotations

from collections.abc import Callable

from attnspec.conformance.case import Case

Move = Callable[[Case], Case]


def keys_cell(causal: bool, extra_keys: int) -> Move:
    """Self attention, or with `extra_keys` cross attention, with or without causal order."""

    def move(case: Case) -> Case:
        keys = case.sizes["queries"] + extra_keys
        return case.with_(sizes={"keys": keys}, parameters={"causal": causal})

    return move


def heads_cell(kv_heads: int, group: int) -> Move:
    """So many kv heads, each for a group of query heads."""
    return lambda case: case.with_(sizes={"kv_heads": kv_heads, "group": group})


def padded_cell(side: str) -> Move:
    """A key mask with its padding on one `side`."""
    return lambda case: case.with_(options=("key_mask", side))
