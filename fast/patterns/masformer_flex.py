"""MASFormer's spans as mask functions of FlexAttention."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.backend import check_bool
from attnspec.fast.flex import MaskMod
from attnspec.fast.patterns.masformer_spans import Span, check_span, sees


def mask_mod(span: Span, causal: bool = True, lengths: Tensor | None = None) -> MaskMod:
    """For layers of this `span`, of any length; the parameters are those of `layer_attend`.

    `lengths` int (batch,), on the device of the mask, hides padding on the right, whose rows then
    see nothing.
    """
    check_span(span)
    check_bool("causal", causal)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = sees(query, key, span, causal)
        if lengths is not None:
            seen = seen & (query < lengths[batch]) & (key < lengths[batch])
        return seen

    return visible
