"""Wrong kernels of relative attention: other tables, other scales, gradients that are lost."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.scores.music_transformer_steps import (
    GLOBAL,
    LOCAL_LOGITS,
    mutant,
    own_block_only,
    reversed_table,
    table_of_last_entry,
)
from attnspec.reference.conventions import default_scale
from attnspec.reference.scores import music_transformer

ATTENTION = right("music_transformer.global_attention")
BACKWARD = music_transformer.global_attention_backward
LOCAL = right("music_transformer.local_attention")
LOCAL_BACKWARD = music_transformer.local_attention_backward


def content_scaled_alone(
    q: Any, k: Any, E: Any, scale: float | None = None, causal: bool = True
) -> Any:
    """The relative term is not scaled."""
    plain = GLOBAL(q, k, E, scale, causal)
    if not q.shape[-2]:
        return plain
    factor = default_scale(q.shape[-1]) if scale is None else scale
    rel = GLOBAL(q, np.zeros_like(k), E, 1.0, causal)
    return plain + (rel * (1 - factor)).astype(plain.dtype)


def no_causal_mask(q_tokens: int, k_tokens: int) -> np.ndarray:
    """The garbage above the diagonal takes part."""
    return np.ones((q_tokens, k_tokens), bool)


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


def last_head_of_shared(**arguments: Any) -> Any:
    """The gradient of a shared table is that of the last head alone."""
    dq, dk, dv, dE = BACKWARD(**arguments)
    E = arguments["E"]
    if E.ndim == 2:
        each = np.repeat(E[None], arguments["q"].shape[-3], axis=0)
        dE = BACKWARD(**{**arguments, "E": each})[3][-1]
    return dq, dk, dv, dE


def padded_queries(q: Any, k: Any, v: Any, E: Any, b: int, **options: Any) -> Any:
    """The queries that fill the last block are written out as well."""
    out = LOCAL(q, k, v, E, b, **options)
    missing = -out.shape[-2] % b if 2 * b <= out.shape[-2] else 0
    return np.concatenate([out, np.zeros_like(out[..., :missing, :])], axis=-2)


def padding_seen(q: Any, k: Any, v: Any, E: Any, b: int, **options: Any) -> Any:
    """The zeros that fill the last block are keys of every query in it."""
    out = LOCAL(q, k, v, E, b, **options)
    L = q.shape[-2]
    missing = -L % b if 2 * b <= L else 0
    if missing:
        scale = options.get("scale")
        mass = np.sum(np.exp(LOCAL_LOGITS(q, k, E, b, scale)), axis=-1, keepdims=True)
        share = mass / (mass + missing)
        last = np.arange(L)[:, None] >= L - L % b
        out = np.where(last, out * share, out).astype(out.dtype)
    return out


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
    whole("shared-last-head", "gradient", "a shared table gets one head's gradient", ATTENTION,
          backward=last_head_of_shared),
    mutant("local_attention", "local-own-block", "agreement", "the block before is not seen",
           replacing(LOCAL, local_logits=lambda q, k, E, b, scale=None: np.where(
               own_block_only(q.shape[-2], b), LOCAL_LOGITS(q, k, E, b, scale), -np.inf
           ).astype(q.dtype))),
    mutant("local_attention", "padded-queries", "ragged", "padded queries are written out",
           padded_queries),
    mutant("local_attention", "padding-seen", "ragged", "padded keys are seen", padding_seen),
    mutant("local_attention", "local-dq", "gradient", "dq lacks the products with the table",
           LOCAL, backward=replacing(LOCAL_BACKWARD, by_distance=without_table_term)),
)  # fmt: skip
