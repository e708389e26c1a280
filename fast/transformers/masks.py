"""The mask a model hands to its layers: none, padding alone, or everything.

The library builds a mask once a forward pass. Where it is the causal or the bidirectional rule with
nothing but padding, the layers get the padding (batch, k_tokens) or None, as those of
FlashAttention do, and keep the rule themselves: no array of queries times keys is made. Any other
mask (a sliding window, packed sequences, a cache of fixed size) is the whole one, bool
(batch, 1, q_tokens, k_tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.transformers.plans import Plan


def mask_function(name: str, plan: Plan) -> Callable[..., Tensor | None]:
    """The function to be registered as the mask of the implementation `name`."""

    def make_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: int = 0,
        mask_function: Any = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor | None:
        from transformers import masking_utils

        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if _plain(masking_utils, mask_function, q_length, kv_length, q_offset, kv_offset):
            return _unless_all(padding, kv_length, kv_offset)
        if not plan.takes_mask:
            raise ValueError(
                f"attention_mask: {name!r} ({plan.mechanism}) takes the causal rule and padding, "
                "got another mask: sliding windows, packed sequences and caches of fixed size are "
                "not supported"
            )
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function or masking_utils.causal_mask_function,
            attention_mask=attention_mask,
            **options,
        )

    return make_mask


def _plain(
    library: Any, rule: Any, q_length: int, kv_length: int, q_offset: Any, kv_offset: int
) -> bool:
    """Whether the rule, kept by a layer that knows how many queries and keys it has, is enough."""
    if rule is library.bidirectional_mask_function:
        return True
    if rule not in (None, library.causal_mask_function) or isinstance(q_offset, Tensor):
        return False
    # The last query stands at the last key: then the causal rule is K3.
    return q_offset + q_length == kv_offset + kv_length


def _unless_all(padding: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """`padding` of the keys at hand, None if there is none.

    Like the library's own masks it reads the padding, once a forward pass.
    """
    if padding is None:
        return None
    padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding
