"""Wrong kernels of relative attention: tables reversed, shifted, clipped or of another head."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.scores import music_transformer, music_transformer_steps

ATTENTION = right("music_transformer.global_attention")
BACKWARD = music_transformer.global_attention_backward
LOCAL = right("music_transformer.local_attention")
LOCAL_BACKWARD = music_transformer.local_attention_backward
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


def content_scaled_alone(
    q: Any, k: Any, E: Any, scale: float | None = None, causal: bool = True
) -> Any:
    """The relative term is not scaled."""
    plain = GLOBAL(q, k, E, scale, causal)
    if not q.shape[-2]:
        return plain
    factor = music_transformer_steps.default_scale(q.shape[-1]) if scale is None else scale
    rel = GLOBAL(q, np.zeros_like(k), E, 1.0, causal)
    return plain + (rel * (1 - factor)).astype(plain.dtype)


def no_causal_mask(q_tokens: int, k_tokens: int) -> np.ndarray:
    """The garbage above the diagonal takes part."""
    return np.ones((q_tokens, k_tokens), bool)


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


def first_head(arguments: dict[str, Any]) -> None:
    """Every head uses the first head's table."""
    E = arguments["E"]
    if isinstance(E, np.ndarray) and E.ndim == 3:
        arguments["E"] = np.repeat(E[:1], E.shape[0], axis=0)


def of_the_kv_head(q: Any, k: Any, v: Any, E: Any, **options: Any) -> Any:
    """The table is looked up by the kv head's number."""
    out = ATTENTION(q, k, v, E, **options)
    if E.ndim < 3 or not k.shape[-3]:
        return out
    group = q.shape[-3] // k.shape[-3]
    return ATTENTION(q, k, v, E[np.arange(len(E)) // group], **options)


def reads_far_rows(q: Any, k: Any, v: Any, E: Any, **options: Any) -> Any:
    """Rows for distances that do not occur are multiplied by 0."""
    out = ATTENTION(q, k, v, E, **options)
    return out + (0 * np.sum(E)).astype(out.dtype)


def table_of_last_entry(dlogits: Any, qs: Any, M: int, causal: bool = True) -> Any:
    """The gradient of the last batch entry overwrites the others'."""
    dE = GRADIENT(dlogits, qs, M, causal)
    return GRADIENT(dlogits[-1:], qs[-1:], M, causal) if dlogits.shape[0] else dE


def without_table_term(x: np.ndarray, rows: int, causal: bool) -> np.ndarray:
    """dq lacks the products with the table."""
    return np.zeros_like(x, shape=(*x.shape[:-1], rows))


def unscaled_table(result: Any) -> Any:
    dq, dk, dv, dE = result
    return dq, dk, dv, 2 * dE


def fresh_table(q: Any, k: Any, v: Any, E: Any, **options: Any) -> Any:
    """A random table in place of the trained one."""
    ATTENTION(q, k, v, E, **options)
    other = np.random.default_rng(0).standard_normal(E.shape).astype(E.dtype)
    return ATTENTION(q, k, v, other, **options)


def mutant(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(
        f"music_transformer.{name}", f"music_transformer.{operation}", law, bug, call, **rest
    )


def whole(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return mutant("global_attention", name, law, bug, call, **rest)


MUTANTS = (
    whole("reversed", "agreement", "row 0 of the table is distance 0",
          altering(ATTENTION, reversed_table)),
    whole("unmasked", "agreement", "what lies above the diagonal is not masked",
          replacing(ATTENTION, causal_mask=no_causal_mask)),
    whole("content-scaled", "agreement", "only the content term is scaled",
          replacing(ATTENTION, global_logits=content_scaled_alone)),
    whole("random-table", "agreement", "the table is drawn anew", fresh_table),
    whole("first-head", "agreement", "every head uses the first head's table",
          altering(ATTENTION, first_head)),
    whole("kv-head-table", "heads", "tables are looked up by kv head", of_the_kv_head),
    whole("reads-far-rows", "poison", "rows for distances that do not occur are read",
          reads_far_rows),
    whole("no-table-term", "gradient", "dq lacks the products with the table", ATTENTION,
          backward=replacing(BACKWARD, by_distance=without_table_term)),
    whole("table-scale", "gradient", "the gradient of the table is twice too large", ATTENTION,
          backward=spoiling(BACKWARD, unscaled_table)),
    whole("last-entry", "gradient", "the table's gradient is that of the last batch entry",
          ATTENTION, backward=replacing(BACKWARD, table_gradient=table_of_last_entry)),
    mutant("relative_table_slice", "first-rows", "agreement", "a long table gives its first rows",
           first_rows),
    mutant("relative_table_slice", "clipped", "agreement", "far distances get the last row",
           altering(SLICE, clipped)),
    mutant("global_logits", "clipped-logits", "agreement", "far distances get the last row",
           replacing(GLOBAL, relative_table_slice=clipping_slice)),
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
    mutant("local_attention", "local-own-block", "agreement", "the block before is not seen",
           replacing(LOCAL, local_logits=lambda q, k, E, b, scale=None: np.where(
               own_block_only(q.shape[-2], b), LOCAL_LOGITS(q, k, E, b, scale), -np.inf
           ).astype(q.dtype))),
    mutant("local_attention", "local-dq", "gradient", "dq lacks the products with the table",
           LOCAL, backward=replacing(LOCAL_BACKWARD, by_distance=without_table_term)),
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
