"""The attention function that a model's layers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.transformers.plans import Plan

HARMLESS = frozenset(
    {
        "cache_position",
        "cache_positions",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "sliding_window",
        "use_cache",
    }
)
"""Arguments that models pass on and that change nothing here: a window and packing are in the
mask."""

Attention = Callable[..., tuple[Tensor, None]]


def attention_function(name: str, plan: Plan) -> Attention:
    """The function to be registered as the attention of the implementation `name`."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        _check_options(name, dropout, options)
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        if plan.always_causal and not is_causal:
            raise ValueError(
                f"is_causal: got False, expected True: {name!r} ({plan.mechanism}) is causal"
            )
        padding, mask = _split(name, plan, attention_mask, query, key, options)
        causal = is_causal and mask is None
        out = plan.call(query, key, value, causal=causal, padding=padding, mask=mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _check_options(name: str, dropout: float, options: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"dropout: got {dropout}, expected 0.0: {name!r} has no dropout; set the model's "
            "attention dropout to 0"
        )
    for option, value in options.items():
        if option not in HARMLESS and value is not None and value is not False:
            shown = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
            hint = "; 'eager' returns weights" if option == "output_attentions" else ""
            raise ValueError(
                f"{option}: got {shown}, expected none: {name!r} has no {option}{hint}"
            )


def _split(
    name: str,
    plan: Plan,
    attention_mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    """The padding (batch, k_tokens) or the whole mask in `attention_mask`; at most one of them."""
    if attention_mask is None:
        for packed in ("cu_seq_lens_q", "cu_seq_lens_k"):
            if options.get(packed) is not None:
                raise ValueError(f"{packed}: got packed sequences without a mask, expected one")
        return None, None
    if attention_mask.dtype != torch.bool:
        raise TypeError(
            f"attention_mask: got dtype {attention_mask.dtype}, expected bool, True = visible: "
            f"{name!r} adds nothing to the scores"
        )
    shape, tokens = tuple(attention_mask.shape), (query.shape[2], key.shape[2])
    if len(shape) == 2:
        if not plan.takes_padding:
            raise ValueError(f"attention_mask: got padding, expected none for {plan.mechanism}")
        if shape != (query.shape[0], tokens[1]):
            expected = (query.shape[0], tokens[1])
            raise ValueError(f"attention_mask: got shape {shape}, expected {expected}")
        return attention_mask, None
    if not plan.takes_mask:
        raise ValueError(
            f"attention_mask: got shape {shape}, expected padding (batch, k_tokens) alone: "
            f"{name!r} ({plan.mechanism}) has its own pattern"
        )
    if len(shape) != 4 or shape[3] != tokens[1] or shape[2] not in (1, tokens[0]):
        raise ValueError(f"attention_mask: got shape {shape}, expected (batch, 1, {tokens})")
    return None, attention_mask
