"""Wrong steps of relative attention: tables reversed, shifted or clipped, blocks of other keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling

SLICE = right("music_transformer.relative_table_slice")
LOGITS = right("music_transformer.relative_logits")
GATHER = right("music_transformer.relative_logits_gather")
SKEW = right("music_transformer.skew")
UNSKEW = right("music_transformer.unskew")
FULL = right("music_transformer.skew_full")
GLOBAL = right("music_transformer.global_logits")
VISIBILITY = right("music_transformer.local_visibility")
LOCAL_LOGITS = right("music_transformer.local_logits")
ATTEND = right("music_transformer.attend")
DECODE = right("music_transformer.decode_relative")
VALUES = right("music_transformer.relative_values")
GRADIENT = right("music_transformer.table_gradient")


def reversed_table(arguments: dict[str, Any]) -> None:
    """Row 0 is taken for distance 0."""
    arguments["E"] = arguments["E"][..., ::-1, :]


def first_rows(E: np.ndarray, L: int, causal: bool = True, clip: bool = False) -> np.ndarray:
    """A long table gives its first rows."""
    used = SLICE(E, L, causal, clip)
    rows = used.shape[-2]
    return E[..., :rows, :] if E.shape[-2] > rows else used


def clipped(arguments: dict[str, Any]) -> None:
    arguments["clip"] = True


def clipping_slice(E: np.ndarray, L: int, causal: bool = True, clip: bool = False) -> np.ndarray:
    """Distances beyond the table get its last row, as in Shaw et al."""
    return SLICE(E, L, causal, True)


def padded_right(R: np.ndarray) -> np.ndarray:
    SKEW(R)
    L = R.shape[-1]
    padded = np.concatenate([R, np.zeros_like(R[..., :1])], axis=-1)
    return padded.reshape(*R.shape[:-2], L + 1, L)[..., 1:, :]


def last_row_dropped(S: np.ndarray) -> np.ndarray:
    UNSKEW(S)
    L = S.shape[-1]
    padded = np.concatenate([S, np.zeros_like(S[..., :1, :])], axis=-2)
    return padded.reshape(*S.shape[:-2], L, L + 1)[..., 1:]


def one_column_off(result: np.ndarray) -> np.ndarray:
    return np.roll(result, 1, axis=-1)


def sliding(L: int, b: int) -> np.ndarray:
    """A window of b keys in place of the own block and the one before."""
    VISIBILITY(L, b)
    i, j = np.arange(L)[:, None], np.arange(L)[None, :]
    return (j <= i) & (j > i - b)


def own_block_only(L: int, b: int) -> np.ndarray:
    seen = VISIBILITY(L, b)
    i, j = np.arange(L)[:, None], np.arange(L)[None, :]
    return seen & ((j // b == i // b) | (2 * b > L))


def blocks_even_if_short(L: int, b: int) -> np.ndarray:
    """Fewer than 2 b tokens are blocks too, and the own one alone is seen."""
    seen = VISIBILITY(L, b)
    i, j = np.arange(L)[:, None], np.arange(L)[None, :]
    return seen & (j // b == i // b) if 2 * b > L else seen


def table_from_the_front(arguments: dict[str, Any]) -> None:
    """The offset of 2 b rows is applied to a table that has more."""
    E, b = arguments["E"], arguments["b"]
    if isinstance(b, int) and b >= 1 and E.shape[-2] > 2 * b:
        arguments["E"] = E[..., : 2 * b, :]


def table_of_last_entry(dlogits: Any, qs: Any, M: int, causal: bool = True) -> Any:
    """The gradient of the last batch entry overwrites the others'."""
    dE = GRADIENT(dlogits, qs, M, causal)
    return GRADIENT(dlogits[-1:], qs[-1:], M, causal) if dlogits.shape[0] else dE


def mutant(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(
        f"music_transformer.{name}", f"music_transformer.{operation}", law, bug, call, **rest
    )


MUTANTS = (
    mutant("relative_table_slice", "first-rows", "agreement", "a long table gives its first rows",
           first_rows),
    mutant("relative_table_slice", "clipped", "agreement", "far distances get the last row",
           altering(SLICE, clipped)),
    mutant("global_logits", "clipped-logits", "agreement", "far distances get the last row",
           replacing(GLOBAL, relative_table_slice=clipping_slice)),
    mutant("global_logits", "column-off", "ordered-logits", "the zero column is on the right",
           replacing(GLOBAL, skew=padded_right)),
    mutant("relative_logits_gather", "reversed-gather", "agreement", "row 0 is distance 0",
           altering(GATHER, reversed_table)),
    mutant("relative_logits", "reversed-logits", "agreement", "columns come in falling order",
           spoiling(LOGITS, lambda R: R[..., ::-1])),
    mutant("skew", "padded-right", "agreement", "the zero column is on the right", padded_right),
    mutant("unskew", "last-row", "agreement", "the zero row is at the bottom", last_row_dropped),
    mutant("skew_full", "one-off", "agreement", "columns are one too far to the right",
           spoiling(FULL, one_column_off)),
    mutant("local_visibility", "sliding", "agreement", "a window of b keys", sliding),
    mutant("local_visibility", "own-block", "agreement", "the block before is not seen",
           own_block_only),
    mutant("local_visibility", "short", "agreement", "fewer than 2 b tokens are blocks too",
           blocks_even_if_short),
    mutant("local_logits", "front-rows", "agreement", "the first 2 b rows of the table are used",
           altering(LOCAL_LOGITS, table_from_the_front)),
    mutant("attend", "weights-of-hidden", "poison", "hidden logits take part",
           lambda logits, mask, v: ATTEND(
               logits if mask is None else logits + np.where(mask, 0, -1e9).astype(logits.dtype),
               None, v)),
    mutant("decode_relative", "newest-first", "agreement", "the newest key comes first",
           spoiling(DECODE, lambda rel: rel[..., ::-1])),
    mutant("relative_values", "reversed-values", "agreement", "row 0 is distance 0",
           altering(VALUES, lambda a: a.update(Ev=a["Ev"][..., ::-1, :]))),
    mutant("table_gradient", "lost-batch", "agreement", "the last batch entry overwrites the rest",
           table_of_last_entry),
)  # fmt: skip
